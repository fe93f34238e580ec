# SPDX-License-Identifier: Apache-2.0
"""A loss of some rows, a chunk of them at a time, whose gradient is computed on the way.

Logits are the widest activations of a model. Here they exist for one chunk of tokens, and are
computed once: a chunk's gradient is taken when its loss is, before the next chunk, and overwrites
the hidden states that it came from. The backward only scales it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..typing import Array, Float, Int, PyTree
from .trained import add, cast_like, find_trained, instantiate, values_of, zeros_of

Loss = Callable[..., Array]


def chunked_loss(
    loss: Loss,
    params: PyTree,
    hidden: Float[Array, "rows d"],
    places: Int[Array, " n"],
    data: PyTree,
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Return the sum of `loss` over chunks of rows.

    Args:
        loss: `(params, rows, data) -> sum of their losses`, float32, where rows are some of
            `hidden` and data is theirs; a row whose data are all zero must count nothing.
        params: What `loss` takes, any pytree.
        hidden: Hidden states.
        places: Which rows count; no row twice.
        data: Arrays whose first axis goes with `places`.
        chunk: Rows at once.

    Returns:
        The sum; reverse-mode differentiable, once, in `hidden` and in those floating-point leaves
        of `params` that are being differentiated. `hidden` may be overwritten if it is not used
        elsewhere.
    """
    count = places.shape[0]
    chunks = max(-(-count // chunk), 1)
    size = -(-count // chunks)
    padding = chunks * size - count

    def cut(a: Array, fill: int) -> Array:
        a = jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1), constant_values=fill)
        return a.reshape(chunks, size, *a.shape[1:])

    cut_data = jax.tree.map(lambda a: cut(a, 0), data)
    return _sum(loss, params, hidden, cut(places, hidden.shape[0]), cut_data)


def _rows(hidden: Array, places: Array) -> Array:
    return hidden.at[places].get(mode="fill", fill_value=0, unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(loss: Loss, params: PyTree, hidden: Array, places: Array, data: PyTree) -> Array:
    def one(total: Array, part: tuple) -> tuple[Array, None]:
        places, data = part
        return total + loss(params, _rows(hidden, places), data), None

    return lax.scan(one, jnp.float32(0), (places, data))[0]


def _sum_fwd(
    loss: Loss, params: PyTree, hidden: PyTree, places: PyTree, data: PyTree
) -> tuple[Array, tuple]:
    trained = find_trained(params)
    params, hidden, places, data = map(values_of, (params, hidden, places, data))
    leaves, put_back = trained.split(params)

    def one(state: tuple, part: tuple) -> tuple[tuple, None]:
        total, hidden, grads = state
        places, data = part

        def of(leaves: list[Array], rows: Array) -> Array:
            return loss(put_back(leaves), rows, data)

        value, vjp = jax.vjp(of, leaves, _rows(hidden, places))
        more, drows = vjp(jnp.ones_like(value))
        # no other chunk reads these rows
        hidden = hidden.at[places].set(drows, mode="drop", unique_indices=True)
        return (total + value, hidden, add(grads, more)), None

    init = (jnp.float32(0), hidden, zeros_of(leaves))
    (total, overwritten, grads), _ = lax.scan(one, init, (places, data))
    counts = jnp.zeros(hidden.shape[0], jnp.bool_).at[places.reshape(-1)].set(True, mode="drop")
    dhidden = jnp.where(counts[:, None], overwritten, jnp.zeros_like(overwritten))
    return total, (dhidden, cast_like(grads, leaves), trained, params)


def _sum_bwd(loss: Loss, residuals: tuple, ct: PyTree) -> tuple:
    dhidden, grads, trained, params = residuals
    ct = instantiate(ct)

    def scaled(a: Array) -> Array:
        return (a * ct).astype(a.dtype)

    grads = trained.cotangents([scaled(g) for g in grads], params)
    return grads, scaled(dhidden), None, None


_sum.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)
