# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: the recipe, and the step it is made of."""

from .recipe import Result as Result
from .recipe import train as train
from .step import TrainState as TrainState
from .step import init_state as init_state
from .step import make_step as make_step
