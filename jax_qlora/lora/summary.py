# SPDX-License-Identifier: Apache-2.0
"""Tables for people: what is in a parameter tree, how it is stored, and what of it trains."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from ..quant import QuantizedArray
from ..tree import flatten_paths, nbytes
from .array import LoraArray
from .pair import LoraPair
from .tokens import TokenArray
from .virtual import VirtualTokens, split_virtual


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain-text columns under a header.

    >>> print(table(("name", "n"), [("a", "1")]))
    name  n
    ----  -
    a     1
    """
    lines = [tuple(header), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, tuple("-" * w for w in widths))
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _is_leaf(x: Any) -> bool:
    return isinstance(x, QuantizedArray | LoraArray | LoraPair | TokenArray | VirtualTokens)


def _storage(leaf: Any) -> tuple[str, str]:
    """Format and bits per parameter of a leaf without its update."""
    if isinstance(leaf, QuantizedArray):
        name = f"{leaf.format} b{leaf.block_size}" + " dq" * leaf.double_quant
        return name, f"{leaf.bits_per_param:.3f}"
    return str(leaf.dtype), f"{8 * leaf.dtype.itemsize:.3f}"


def summary(tree: Any, adapter: Any = None) -> str:
    """A table of every parameter: path, shape, format, bits, rank, trainable; and the totals.

    Args:
        tree: Parameters; leaves may be arrays, QuantizedArray or LoraArray. An adapter alone works
            too.
        adapter: Optionally the adapter that trains over `tree`.

    Returns:
        The table as text. Only the update of an adapted kernel trains, or what replaces a weight.
    """
    adapter = dict(adapter or {})
    rows, total, trainable, held = [], 0, 0, 0
    for path, leaf in flatten_paths(tree, is_leaf=_is_leaf).items():
        if not (_is_leaf(leaf) or hasattr(leaf, "dtype")):
            continue  # a number or function that a module holds
        pair = leaf.pair if isinstance(leaf, LoraArray) else adapter.get(path)
        pair = leaf.tokens if isinstance(leaf, TokenArray) else pair
        base = leaf.base if isinstance(leaf, LoraArray | TokenArray) else leaf
        if isinstance(base, LoraPair | VirtualTokens):
            base, pair = None, base
        shape, storage, bits = "", "", ""
        if base is not None:
            shape = "x".join(map(str, base.shape))
            storage, bits = _storage(base)
            total += math.prod(base.shape)
            held += nbytes(base)
        rank, params = "", 0
        if pair is not None:
            if isinstance(pair, LoraPair):
                rank = str(pair.rank) + f" x {len(pair.parts)} parts" * bool(pair.parts)
            params = sum(x.size for x in jax.tree.leaves(pair))
            held += nbytes(pair)
        trainable += params
        rows.append((path, shape, storage, bits, rank, f"{params:,}" if params else ""))
    for path, entry in split_virtual(adapter)[1].items():
        shape, count = "x".join(map(str, entry.values.shape)), entry.values.size
        trainable, held = trainable + count, held + nbytes(entry)
        rows.append((path, shape, "", "", "", f"{count:,}"))
    share = 100 * trainable / max(total + trainable, 1)
    footer = (
        f"trainable {trainable:,} of {total + trainable:,} parameters ({share:.3f}%), "
        f"{held / 2**20:,.1f} MiB held"
    )
    return table(("path", "shape", "format", "bits", "rank", "trainable"), rows) + "\n" + footer
