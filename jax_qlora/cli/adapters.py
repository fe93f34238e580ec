# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora adapters combine OUTPUT ADAPTER ... --method cat`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from ..config import nearest
from ..errors import InputError
from ..lora.combine_factors import MajoritySign, Method
from .arguments import parse
from .writing import size


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Combine adapters of one model into one, as PEFT's add_weighted_adapter does.

    Reads and writes directories in PEFT's format; the model is not needed. "cat" is the exact
    weighted sum, its rank the sum of ranks; "svd" is the nearest update of a given rank. "linear",
    "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on the factors, which is rough;
    with "_svd" after the name, on the updates themselves.
    """

    output: Positional[str]
    """Directory to write."""
    adapters: Positional[tuple[str, ...]]
    """Directories of the adapters."""
    method: Method
    """How to combine."""
    weights: tuple[float, ...] | None = None
    """One number for each adapter, which may be negative; by default equal ones that sum to 1."""
    rank: int | None = None
    """Rank of the result, for the methods with svd; the largest of the adapters' by default."""
    density: float | None = None
    """Share of values to keep, for ties, dare and magnitude_prune."""
    majority_sign: MajoritySign = "total"
    """For ties: the sign of the sum over adapters, or that of most adapters."""
    seed: int = 0
    """Of what dare drops."""
    overwrite: bool = False
    """Replace an adapter that is there."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Combine and write.

    Raises:
        InputError: No such subcommand, bad arguments, or adapters that do not go together.
    """
    if not args:
        print("usage: jax-qlora adapters combine OUTPUT ADAPTER ... --method METHOD")
        return 2
    if args[0] in ("-h", "--help"):
        args = ["combine", "--help"]
    if args[0] != "combine":
        raise InputError(
            f"'adapters {args[0]}' is no command.{nearest(args[0], ['combine'])} "
            "Expected: adapters combine."
        )
    arguments = parse(Arguments, args[1:], prog="jax-qlora adapters combine")

    import jax

    from ..interop.combine import combine_adapter_files
    from ..lora.combine_factors import Settings

    count = len(arguments.adapters)
    combined = combine_adapter_files(
        arguments.output,
        arguments.adapters,
        arguments.weights if arguments.weights is not None else (1 / max(count, 1),) * count,
        Settings(
            method=arguments.method,
            rank=arguments.rank,
            density=arguments.density,
            majority_sign=arguments.majority_sign,
            key=jax.random.key(arguments.seed),
        ),
        overwrite=arguments.overwrite,
    )
    record = {
        "output": str(combined.path),
        "modules": combined.modules,
        "rank": combined.rank,
        "bytes": combined.nbytes,
    }
    text = (
        f"Combined {count} adapters in '{combined.path}': {combined.modules} modules of rank "
        f"{combined.rank}, {size(combined.nbytes)}."
    )
    print(json.dumps(record) if arguments.json else text)
    return 0
