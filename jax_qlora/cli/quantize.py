# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora quantize MODEL OUTPUT`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from .arguments import parse
from .settings import ensure_downloaded
from .writing import progress, report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a model with the linears of its layers in 4 bits, once.

    The directory is that of bitsandbytes, which transformers loads as it is, unless the model has
    experts (Mixtral, Qwen 3 MoE). Given as --model here, it is read back without work: the codes
    are kept.
    """

    model: Positional[str]
    """A local directory, a .gguf file, a known name, or a Hugging Face Hub id."""
    output: Positional[str]
    """Directory to write."""
    format: Literal["nf4", "fp4"] = "nf4"
    """nf4 is the better one for weights of neural networks."""
    block_size: int = 64
    """Elements that share a constant."""
    double_quant: bool = True
    """Also quantize the constants."""
    shard_gb: float = 5.0
    """Largest file, in GB."""
    overwrite: bool = False
    """Replace a model that is in the directory."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Quantize and write.

    Raises:
        InputError: Bad arguments or model.
    """
    arguments = parse(Arguments, args, prog="jax-qlora quantize")
    ensure_downloaded(arguments.model)

    from ..interop.load_params import Encoding
    from ..interop.quantize_checkpoint import quantize_checkpoint

    encoding = Encoding(arguments.format, arguments.block_size, arguments.double_quant)
    with progress("quantizing") as update:
        saved = quantize_checkpoint(
            arguments.model,
            arguments.output,
            encoding=encoding,
            max_shard_bytes=int(arguments.shard_gb * 1e9),
            overwrite=arguments.overwrite,
            progress=update,
        )
    report(saved, as_json=arguments.json, notes=[], format=arguments.format)
    return 0
