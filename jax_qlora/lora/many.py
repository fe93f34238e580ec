# SPDX-License-Identifier: Apache-2.0
"""One batch whose rows use different adapters over one base.

`attach_many` gives every row the adapter of its own number, and `over_rows` evaluates a model on
such a tree: `jax.vmap` over the rows and their adapters, with the base shared. Under `vmap` a
product with a shared kernel is one product for the whole batch, so a 4-bit kernel is decoded once;
only the two thin products of the update are batched. Gradients reach the adapter of each row and no
other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import InputError
from ..tree import pytree
from ..typing import ArrayLike, PyTree
from .adapter import Adapter, attach
from .pair import LoraPair
from .stack import checked_index, take


@pytree()
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowAdapters:
    """A base and one adapter for each row of a batch; `over_rows` computes with it.

    Attributes:
        base: Frozen parameters.
        rows: Path -> LoraPair with an axis of rows between the lead axes and the factors: `a` is
            `[*lead, batch, rank, cols]`.
        dropout_keys: One random key for each row, or None.
    """

    base: Any
    rows: Adapter
    dropout_keys: Any


def attach_many(
    base: PyTree, stacked: Mapping[str, LoraPair], index: ArrayLike, *, dropout_key: Any = None
) -> RowAdapters:
    """Gives each row of a batch its own adapter; call it inside the jitted step, as `attach`.

    Args:
        base: Frozen parameters; leaves may be arrays or QuantizedArray.
        stacked: From `stack_adapters`.
        index: Integer `[batch]`: the number of each row's adapter, -1 for the base alone. A traced
            number that is too large gives NaN.
        dropout_key: Random key for dropout in this step; None turns dropout off.

    Returns:
        A tree for `over_rows(model)`, which holds copies of the chosen adapters.

    Raises:
        InputError: a number too large, or an index that is not one number for each row.
    """
    index = checked_index(stacked, index, ndim=1)
    return RowAdapters(
        base=base,
        rows={path: take(pair, index, pair.a.ndim - 3) for path, pair in stacked.items()},
        dropout_keys=None if dropout_key is None else jax.random.split(dropout_key, index.shape),
    )


def over_rows(f: Callable[..., Any], *, in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """Lets a lifted function take what `attach_many` returns: each row under its own adapter.

    The function sees batches of one row, so no row may depend on another, as in any language model.
    On other parameters the result is the function's own.

    Args:
        f: `f(params, *args, **kwargs)`, lifted.
        in_axes: The axis of the batch in each of `args`, as for `jax.vmap`: a number, or a tuple of
            numbers or trees of numbers, None where there is none. In `kwargs` it is the first.
        out_axes: The axis of the batch in the results, likewise.

    Returns:
        A function of the same arguments, for `jit`, `grad` and the rest.

    Raises:
        InputError: (when called) an argument that does not have one row for each adapter.

    >>> import jax_qlora as jq
    >>> model = jq.lift(lambda params, x: x @ params["w"])
    >>> base = {"w": jnp.eye(4)}
    >>> targets = jq.find_targets(lambda p, x: jnp.tanh(x @ p["w"]), base, jnp.ones((1, 4)))
    >>> adapters = [jq.init_adapter(jax.random.key(i), targets, rank=2) for i in range(2)]
    >>> rows = jq.attach_many(base, jq.stack_adapters(adapters), jnp.array([1, 0, -1]))
    >>> jq.over_rows(model)(rows, jnp.ones((3, 4))).shape
    (3, 4)
    """

    @functools.wraps(f)
    def mapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, RowAdapters):
            return f(params, *args, **kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        axes = _broadcast((in_axes, 0), (args, kwargs))
        axes = [a if hasattr(x, "ndim") else None for a, x in zip(axes, leaves, strict=True)]
        batch = next(iter(params.rows.values())).a.shape[-3]
        for x, axis in zip(leaves, axes, strict=True):
            _check_rows(x, axis, batch)
        shared = [x if axis is None else None for x, axis in zip(leaves, axes, strict=True)]
        batched = [None if axis is None else x for x, axis in zip(leaves, axes, strict=True)]

        def row(adapter: Adapter, key: Any, batched: list[Any]) -> Any:
            filled = [
                s if axis is None else jnp.expand_dims(x, axis)
                for s, x, axis in zip(shared, batched, axes, strict=True)
            ]
            row_args, row_kwargs = jax.tree.unflatten(treedef, filled)
            tree = attach(params.base, adapter, dropout_key=key)
            outs, out_tree = jax.tree.flatten(f(tree, *row_args, **row_kwargs))
            flat_axes = _broadcast(out_axes, jax.tree.unflatten(out_tree, outs))
            outs = [
                x if axis is None else jnp.squeeze(x, axis)
                for x, axis in zip(outs, flat_axes, strict=True)
            ]
            return jax.tree.unflatten(out_tree, outs)

        pairs = jax.tree.map(lambda x: x.ndim - 3, params.rows)
        return jax.vmap(row, (pairs, 0, axes), out_axes)(params.rows, params.dropout_keys, batched)

    return mapped


def _broadcast(prefix: Any, full: Any) -> list[Any]:
    """The axis of each leaf of `full`, from a tree of axes that is a prefix of it."""
    axes: list[Any] = []
    jax.tree.map(
        lambda axis, x: axes.extend([axis] * len(jax.tree.leaves(x))),
        prefix,
        full,
        is_leaf=lambda x: x is None,
    )
    return axes


def _check_rows(x: Any, axis: int | None, batch: int) -> None:
    if axis is None or (-x.ndim <= axis < x.ndim and x.shape[axis] == batch):
        return
    raise InputError(
        f"an argument of shape {x.shape} for adapters of {batch} rows: expected {batch} rows along "
        f"axis {axis}. Give the axis of the batch in over_rows(f, in_axes=...), None for an "
        "argument that all rows share."
    )
