# SPDX-License-Identifier: Apache-2.0
"""Optimizers for adapters, as plain optax transformations.

The first way to freeze is not to differentiate: `jax.grad(loss)(adapter, base, batch)` gives
gradients of the adapter alone, and `adamw` here is initialized with the adapter alone. Those who
keep one joined tree use `train_only`, which holds no state for what is frozen and sets its updates
to zero. (`optax.masked` alone does not freeze: it passes the raw gradient of the unmasked leaves
on to the parameters.)

AdamW's two moments can be held in 32, 16 or 8 bits (`adamw(..., state=...)`), and outside the
accelerator's memory (`paged`).
"""

from .adamw import adamw as adamw
from .adamw import make_schedule as make_schedule
from .masks import decay_mask as decay_mask
from .masks import lora_b_mask as lora_b_mask
from .masks import lora_mask as lora_mask
from .masks import train_only as train_only
from .moments import Moment8 as Moment8
from .moments import scale_by_adam_8bit as scale_by_adam_8bit
from .moments import scale_by_adam_bfloat16 as scale_by_adam_bfloat16
from .paging import Paging as Paging
from .paging import make_paging as make_paging
from .paging import page_between as page_between
from .paging import paged as paged
