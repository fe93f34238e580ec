# SPDX-License-Identifier: Apache-2.0
"""Will it fit? The memory of a training step on a GPU, planned by XLA's compiler without one."""

from ..costs.gpus import GPUS as GPUS
from ..costs.tpus import TPUS as TPUS
from .plan import fit as fit
from .plan import read_decoder as read_decoder
from .report import Report as Report
