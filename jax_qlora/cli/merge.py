# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora merge OUTPUT --run runs/NAME`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from ..errors import InputError
from .arguments import parse
from .loading import Source, complete, load


@dataclass(frozen=True, kw_only=True)
class Arguments(Source):
    """Fold an adapter into its model and write a directory that transformers loads.

    The sum is taken in float32 with the weights that the adapter was trained on: those of a QLoRA
    run went through 4 bits, and so does the merged model.
    """

    output: Positional[str]
    """Directory to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Merge and write.

    Raises:
        InputError: Bad arguments, model or adapter; or it is not said how the base was held.
    """
    arguments = parse(Arguments, args, prog="jax-qlora merge")
    name, adapter_path, settings = complete(arguments)
    if "quantization" not in settings:
        raise InputError(
            "--quantization: expected nf4 (or fp4, int4) for an adapter trained on a 4-bit base, "
            "none for one trained on dense weights. The merged weights depend on it."
        )
    model, adapter = load(name, adapter_path, settings)

    from ..interop.hf import save_hf
    from ..lora import attach

    params = model.params if adapter is None else attach(model.params, adapter)
    tokenizer, dtype = model.tokenizer, arguments.dtype
    save_hf(arguments.output, params, model.config, dtype=dtype, tokenizer=tokenizer)
    if arguments.json:
        print(json.dumps({"output": arguments.output, "dtype": arguments.dtype}))
    else:
        print(f"Merged model in '{arguments.output}'.")
    return 0
