# SPDX-License-Identifier: Apache-2.0
"""lift: give any traceable function a meaning on quantized and adapted parameters."""

from .discover import find_targets as find_targets
from .lifting import lift as lift
