# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA for JAX: a pure parameter-tree transform over frozen 4-bit weights.

The core (everything imported here) needs only jax and numpy; what reads or writes files,
plans a run or needs a decoder needs the `train` extra and is imported when first used.
"""

import importlib
from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any

from .errors import InputError as InputError
from .lift import find_targets as find_targets
from .lift import lift as lift
from .lora import LoraArray as LoraArray
from .lora import LoraPair as LoraPair
from .lora import Target as Target
from .lora import Targets as Targets
from .lora import VirtualTokens as VirtualTokens
from .lora import adapter_index as adapter_index
from .lora import add_magnitudes as add_magnitudes
from .lora import attach as attach
from .lora import attach_many as attach_many
from .lora import combine_adapters as combine_adapters
from .lora import init_adapter as init_adapter
from .lora import init_from_weights as init_from_weights
from .lora import merge as merge
from .lora import over_rows as over_rows
from .lora import quantize as quantize
from .lora import select_adapter as select_adapter
from .lora import stack_adapters as stack_adapters
from .lora import summary as summary
from .lora import train_tokens as train_tokens
from .lora import train_whole as train_whole
from .lora import unmerge as unmerge
from .quant import QuantizedArray as QuantizedArray
from .quant import dequantize as dequantize
from .quant import quantize_array as quantize_array
from .quant import stream as stream
from .tree import ABSENT as ABSENT
from .tree import combine as combine
from .tree import partition as partition

if TYPE_CHECKING:
    from .interop.load import load_model as load_model
    from .interop.peft import load_adapter as load_adapter
    from .interop.peft import save_adapter as save_adapter
    from .planner import fit as fit
    from .prompts import init_prefix as init_prefix
    from .prompts import init_prompt as init_prompt

__version__ = _metadata.version("jax-qlora")

_LAZY = {
    "fit": "planner",
    "init_prefix": "prompts",
    "init_prompt": "prompts",
    "load_model": "interop.load",
    "load_adapter": "interop.peft",
    "save_adapter": "interop.peft",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jax_qlora' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("jax_qlora"):
            raise
        raise ModuleNotFoundError(
            f"jax_qlora.{name} needs the package {e.name!r}. Install the trainer's dependencies: "
            "pip install 'jax-qlora[train]'",
            name=e.name,
        ) from e


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
