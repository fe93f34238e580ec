# SPDX-License-Identifier: Apache-2.0
"""What people see of a run: a progress bar, metrics as JSON lines, a loss curve, one page."""

from .figure import draw_losses as draw_losses
from .metrics import Metrics as Metrics
from .metrics import Record as Record
from .metrics import read_metrics as read_metrics
from .metrics import write_json as write_json
from .metrics import write_text as write_text
from .page import write_page as write_page
from .progress import Display as Display
