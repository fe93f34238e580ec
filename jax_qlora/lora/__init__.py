# SPDX-License-Identifier: Apache-2.0
"""LoRA as a transform of parameter trees: targets, adapters, attach, merge."""

from .adapter import Adapter as Adapter
from .adapter import attach as attach
from .adapter import init_adapter as init_adapter
from .adapter import merge as merge
from .adapter import quantize as quantize
from .adapter import train_tokens as train_tokens
from .adapter import train_whole as train_whole
from .adapter import unmerge as unmerge
from .array import LoraArray as LoraArray
from .combine import combine_adapters as combine_adapters
from .inits import add_magnitudes as add_magnitudes
from .inits import init_from_weights as init_from_weights
from .inits import relative_to_start as relative_to_start
from .many import RowAdapters as RowAdapters
from .many import attach_many as attach_many
from .many import over_rows as over_rows
from .pair import LoraPair as LoraPair
from .stack import adapter_index as adapter_index
from .stack import select_adapter as select_adapter
from .stack import stack_adapters as stack_adapters
from .summary import summary as summary
from .targets import Target as Target
from .targets import Targets as Targets
from .tokens import TokenArray as TokenArray
from .tokens import TokenRows as TokenRows
from .virtual import VirtualTokens as VirtualTokens
from .virtual import split_virtual as split_virtual
