# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora inspect PATH`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from .arguments import parse
from .settings import ensure_downloaded
from .writing import size


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Say what is in a checkpoint or an adapter. Headers are read, no weights."""

    path: Positional[str]
    """A model's directory, a .gguf file, an adapter's directory, a known name, or a Hub id."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Look and print.

    Raises:
        InputError: There is nothing like that, or it is damaged.
    """
    arguments = parse(Arguments, args, prog="jax-qlora inspect")
    ensure_downloaded(arguments.path)

    from ..interop.inspect import inspect

    found = inspect(arguments.path)
    lines = _model(found) if found["kind"] == "model" else _adapter(found)
    print(json.dumps(found) if arguments.json else "\n".join(lines))
    return 0


def _model(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['path']}: a {found['family']} model ({found['format']})"
    yield "shape: " + ", ".join(f"{name} {value}" for name, value in found["shape"].items())
    yield (
        f"{found['parameters']:,} parameters in {size(found['bytes'])}: "
        f"{found['bits_per_parameter']} bits each"
    )
    for kind, counts in found["formats"].items():
        yield (
            f"  {kind:<10} {counts['parameters']:>15,} parameters in {counts['tensors']} tensors, "
            f"{size(counts['bytes'])}"
        )
    yield "linears [out, in]:"
    for linear in found["linears"]:
        kinds = ", ".join(linear["formats"])
        yield f"  {linear['name']:<20} {linear['count']:>3} x {linear['shape']}  {kinds}"
    memory = ", ".join(f"{size(count)} as {how}" for how, count in found["memory"].items())
    yield f"weights in memory: {memory} (`jax-qlora fit` plans a run)"


def _adapter(found: dict[str, Any]) -> Iterator[str]:
    method = found.get("method") or "LoRA"
    yield f"{found['path']}: a {method} adapter ({found['format']}) of {found['base_model']}"
    yield (
        f"{found['parameters']:,} parameters in {found['tensors']} tensors, "
        f"{size(found['bytes'])}" + (f", alpha {found['alpha']}" if found["targets"] else "")
    )
    if found.get("virtual_tokens"):
        yield f"{found['virtual_tokens']} virtual tokens"
    if found["targets"]:
        yield "targets:"
    for name, ranks in found["targets"].items():
        text = ", ".join(f"{count} of rank {rank}" for rank, count in ranks.items())
        yield f"  {name:<20} {text}"
    if found.get("whole"):
        yield "trained whole:"
    for name, count in found.get("whole", {}).items():
        yield f"  {name:<32} {count}"
    yield "loads here" if found["loads"] is True else f"does not load here: {found['loads']}"
