# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: what they are (`tables`), reading and checking them, and their values."""

from .reading import check_config as check_config
from .reading import from_table as from_table
from .reading import load_config as load_config
from .reading import nearest as nearest
from .tables import Config as Config
from .tables import DataConfig as DataConfig
from .tables import EvalConfig as EvalConfig
from .tables import LoraConfig as LoraConfig
from .tables import OptimConfig as OptimConfig
from .tables import PromptConfig as PromptConfig
from .tables import QuantConfig as QuantConfig
from .tables import Range as Range
from .tables import TrainConfig as TrainConfig
from .values import describe_adapter as describe_adapter
from .values import flat_settings as flat_settings
from .values import replaced as replaced
from .values import run_identity as run_identity
from .values import to_toml as to_toml
from .values import toml_value as toml_value
