# SPDX-License-Identifier: Apache-2.0
"""A stack of adapters over one base: compiled code is told by number which is meant.

Lower ranks are padded with zeros, so that all have one structure. -1 means none of them.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..typing import Array, ArrayLike
from .adapter import Adapter
from .pair import LoraPair
from .virtual import refuse_virtual


def stack_adapters(
    adapters: Mapping[str, Any] | Sequence[Any],
    *,
    dropout: float | None = None,
) -> Adapter:
    """Puts adapters of one base together, to be chosen from by number.

    Where an adapter has no update it gets one of zeros, and a lower rank is padded with zeros,
    which stay zero in training. Where scales differ, the largest is kept and the `b` of the others
    absorbs the rest: the updates are the same, but train at another pace than alone.

    Args:
        adapters: Adapters by name, which are numbered in the order of their sorted names (`jit`
            sorts dictionaries too), or in a row; their targets and ranks may differ.
        dropout: Dropout of all; by default that of the adapters, which must agree.

    Returns:
        An adapter with one axis more in front, of adapters: `a` is `[n, *lead, rank, cols]`. It is
        an ordinary pytree and trains as such, with `select_adapter` or `attach_many` in the loss.

    Raises:
        InputError: no adapter, updates of different kernels under one path, or of parts of one
            that overlap, DoRA adapters, or different dropout.
    """
    named = dict(sorted(adapters.items()) if isinstance(adapters, Mapping) else enumerate(adapters))
    for name, adapter in named.items():
        _check_adapter(name, adapter)
    if not named:
        raise InputError("no adapters to stack: expected at least one. Pass them in a list.")
    paths = dict.fromkeys(path for adapter in named.values() for path in adapter)
    return {path: _stack(path, named, dropout) for path in paths}


def adapter_index(
    adapters: Mapping[str, Any] | Sequence[str], names: Sequence[str | None]
) -> np.ndarray:
    """The number of the adapter that each row wants, for `attach_many`.

    >>> adapter_index(["pirate", "poet"], ["poet", None, "pirate"])
    array([ 1, -1,  0], dtype=int32)

    Args:
        adapters: What was stacked, by name, or the names alone, in any order.
        names: The name of each row's adapter; None for the base alone.

    Returns:
        int32 `[rows]`.

    Raises:
        InputError: no adapter has a name (those that there are are listed).
    """
    number = {name: i for i, name in enumerate(sorted(adapters))}
    for name in names:
        if name is not None and name not in number:
            raise InputError(
                f"no adapter is called '{name}': expected one of {', '.join(number)}, or None for "
                "the base alone."
            )
    return np.asarray([-1 if name is None else number[name] for name in names], np.int32)


def select_adapter(stacked: Mapping[str, LoraPair], index: ArrayLike) -> Adapter:
    """One adapter of a stack. Inside `jit`, choosing another, or none, compiles nothing anew.

    Args:
        stacked: From `stack_adapters`.
        index: Integer scalar, the adapter's number; -1 for an update of zeros. A traced number that
            is too large gives NaN.

    Returns:
        An adapter as it was stacked, with its padding.

    Raises:
        InputError: there is no adapter of that number.
    """
    index = checked_index(stacked, index)
    return {path: take(pair, index, 0) for path, pair in stacked.items()}


def take(pair: LoraPair, index: Array, axis: int) -> LoraPair:
    """Adapters by number from a stack.

    Args:
        pair: From `stack_adapters`.
        index: int32, any shape; -1 gives a zero `b`.
        axis: Where the axes of `index` go among those of the result.
    """
    place = jnp.maximum(index, 0)

    def take(x: Array) -> Array:
        taken = x.at[place].get(mode="fill", fill_value=jnp.nan)
        return jnp.moveaxis(taken, 0, axis) if index.ndim else taken

    b = take(pair.b)
    off = jnp.expand_dims(index < 0, (-2, -1))
    return dataclasses.replace(pair, a=take(pair.a), b=jnp.where(off, jnp.zeros_like(b), b))


def checked_index(stacked: Mapping[str, LoraPair], index: ArrayLike, *, ndim: int = 0) -> Array:
    """The index as int32, its values checked where they are known.

    Args:
        stacked: From `stack_adapters`.
        index: Numbers of adapters.
        ndim: Expected number of axes.

    Raises:
        InputError: another number of axes, not integer, or a number out of range.
    """
    count = next(iter(stacked.values())).a.shape[0]
    array = jnp.asarray(index)
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(
            f"index {array.dtype} {array.shape}: expected "
            + ("one integer for each row of the batch." if ndim else "one integer.")
        )
    try:
        known = np.asarray(index)
    except jax.errors.TracerArrayConversionError:
        return array.astype(jnp.int32)
    if known.size and not (-1 <= known.min() and known.max() < count):
        raise InputError(
            f"index {known}: expected numbers of the {count} stacked adapters, 0 to {count - 1}, "
            "or -1 for the base alone."
        )
    return array.astype(jnp.int32)


def _check_adapter(name: Any, adapter: Any) -> None:
    if isinstance(adapter, Mapping):
        refuse_virtual(adapter, f"adapter '{name}' of a stack")
    pairs: list[Any] = list(adapter.values()) if isinstance(adapter, Mapping) else [None]
    if not pairs or not all(isinstance(pair, LoraPair) for pair in pairs):
        raise InputError(
            f"adapter '{name}' is no mapping from paths to LoraPair: found "
            f"{type(adapter).__name__}. Expected several adapters, in a list or by name, each as "
            "init_adapter returns it."
        )
    if any(pair.magnitude is not None for pair in pairs):
        raise InputError(
            f"adapter '{name}' is a DoRA adapter: expected plain LoRA adapters in a stack. Attach "
            "it alone, or merge it."
        )


def _stack(path: str, named: Mapping[Any, Mapping[str, LoraPair]], dropout: float | None) -> Any:
    having = {name: adapter[path] for name, adapter in named.items() if path in adapter}
    (first_name, first), *_ = having.items()
    for name, pair in having.items():
        if (pair.layout, pair.lead) != (first.layout, first.lead):
            raise InputError(
                f"'{path}' is a kernel {(*first.lead, *first.layout.shape)} in adapter "
                f"'{first_name}' and {(*pair.lead, *pair.layout.shape)} in '{name}': expected "
                "adapters of one model."
            )
        if dropout is None and pair.dropout != first.dropout:
            raise InputError(
                f"'{path}' has dropout {first.dropout} in adapter '{first_name}' and "
                f"{pair.dropout} in '{name}': expected one. Say which: "
                "stack_adapters(..., dropout=0.0); only training uses it."
            )
    scale = max((pair.scale for pair in having.values()), key=abs)
    rank = max(pair.rank for pair in having.values())
    parts = sorted({part for pair in having.values() for part in _parts(pair)})
    for (_, end), (start, _) in itertools.pairwise(parts):
        if start < end:
            listed = " and ".join(f"{start}:{stop}" for start, stop in parts)
            raise InputError(
                f"'{path}' is adapted in rows {listed} by different adapters: expected the same "
                "parts of a kernel in all, or parts that do not overlap. Merge one of them instead."
            )
    a, b = [], []
    for name in named:
        own = _factors(having[name], rank, scale) if name in having else {}
        blocks = [own.get(part) or _zeros(first, rank, part) for part in parts]
        a.append(jnp.concatenate([x for x, _ in blocks], axis=-2))
        b.append(jnp.concatenate([x for _, x in blocks], axis=-2))
    return LoraPair(
        a=jnp.stack(a),
        b=jnp.stack(b),
        layout=first.layout,
        scale=scale,
        dropout=first.dropout if dropout is None else dropout,
        parts=() if parts == [(0, first.layout.rows)] else tuple(parts),
    )


Part = tuple[int, int]


def _parts(pair: LoraPair) -> tuple[Part, ...]:
    return pair.parts or ((0, pair.layout.rows),)


def _factors(pair: LoraPair, rank: int, scale: float) -> dict[Part, tuple[Array, Array]]:
    """The factors of each part, of a rank and a scale of the stack."""

    def padded(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, rank - x.shape[axis])
        return jnp.pad(x, widths) if rank > x.shape[axis] else jnp.asarray(x)

    found = {}
    for part, (a, b) in pair.by_part().items():
        b = b if pair.scale == scale else b * jnp.asarray(pair.scale / scale, b.dtype)
        found[part] = padded(a, -2), padded(b, -1)
    return found


def _zeros(like: LoraPair, rank: int, part: Part) -> tuple[Array, Array]:
    start, stop = part
    return (
        jnp.zeros((*like.lead, rank, like.layout.cols), like.a.dtype),
        jnp.zeros((*like.lead, stop - start, rank), like.b.dtype),
    )
