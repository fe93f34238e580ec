# SPDX-License-Identifier: Apache-2.0
"""Attention of some consecutive queries to all keys that they see, one block of scores at a time.

A loop over blocks of queries holds a loop over the blocks of keys, with a running softmax; its
derivative computes each block of scores again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..typing import Array
from .attention import MASKED

CPU_BLOCK = (128, 128)
"""Queries and keys of one block on a CPU: its scores stay in the cache."""

BLOCK = (512, 1024)
"""The same on an accelerator, where one step of a loop must be worth starting."""

_NO_KEY_YET = 0.1 * MASKED
"""The running maximum before the first key: no score is as low, and `exp(MASKED - it)` is 0."""


class Tokens(NamedTuple):
    """What decides, beside their order, which tokens see which.

    Attributes:
        valid: Bool `[batch, seq]`: which tokens are not padding.
        segment_ids: int `[batch, seq]`: the document of each token, or None for one document.
        window: int32 scalar: how many tokens back a query sees, itself included; None: all.
    """

    valid: Array
    segment_ids: Array | None
    window: Array | None


class Settings(NamedTuple):
    """All that is static: factor and bound of the scores, queries and keys of a block."""

    scale: float
    softcap: float | None
    q_block: int
    k_block: int


class Platforms(NamedTuple):
    """Settings on a CPU, and elsewhere."""

    cpu: Settings
    default: Settings

    def run(self, f: Callable, *arrays: Any) -> Any:
        """`f(settings, *arrays)` with the settings of the platform it is compiled for."""
        if self.cpu == self.default:
            return f(self.cpu, *arrays)
        cpu, default = partial(f, self.cpu), partial(f, self.default)
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)


class Keys(NamedTuple):
    """Keys and values of the whole sequence, its length a multiple of the blocks'.

    Attributes:
        k: `[batch * n_kv_heads, seq, head_dim]`.
        v: Likewise.
        tokens: Who they are.
    """

    k: Array
    v: Array
    tokens: Tokens


def attend(
    settings: Settings, start: Array, q: Array, segments: Array | None, keys: Keys
) -> tuple[Array, Array]:
    """Attend from some consecutive queries to all keys that they see.

    Args:
        settings: What is static.
        start: Place of the first query in the sequence, a multiple of `q_block`.
        q: `[batch, queries, n_heads, head_dim]`, whole blocks of them.
        segments: int `[batch, queries]`: the document of each query, or None.
        keys: All keys.

    Returns:
        The output, like `q`, and of each query the logarithm of its sum of `exp(score)`,
        float32 `[batch, queries, n_heads, 1]`.
    """
    window, n_kv = keys.tokens.window, keys.k.shape[0] // q.shape[0]

    def one(_: None, item: tuple) -> tuple[None, tuple]:
        index, segments, q = item

        def add(block: Array, state: tuple) -> tuple:
            top, total, out = state
            near = _at(settings, keys, block)
            visible = _visible(settings, index, block, segments, near.tokens)
            scores = _hide(_scores(settings, q, near.k), visible)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
            total = shrink * total + jnp.sum(weights, axis=-1, keepdims=True)
            out = shrink * out + _dot("bqk,bkd->bqd", weights.astype(q.dtype), near.v)
            return new_top, total, out

        zero = jnp.zeros((*q.shape[:2], 1), jnp.float32)
        init = (zero + _NO_KEY_YET, zero, jnp.zeros(q.shape, jnp.float32))
        first, end = _seen(settings, index, keys.k.shape[1], window)
        top, total, out = lax.fori_loop(first, end, add, init)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        return None, ((out / total).astype(q.dtype), jnp.where(empty, 0.0, top + jnp.log(total)))

    items = (*_numbered(settings, start, q.shape[1], segments), _cut_queries(settings, q, n_kv))
    _, blocks = lax.scan(one, None, items)
    out, lse = (_join_queries(settings, x, q) for x in blocks)
    return out, lse


def attend_backward(
    settings: Settings,
    start: Array,
    q: Array,
    segments: Array | None,
    keys: Keys,
    out: Array,
    lse: Array,
    dout: Array,
    dk: Array,
    dv: Array,
) -> tuple[Array, Array, Array]:
    """The derivative of `attend`.

    Args:
        settings: As given to `attend`, like the four after it.
        start: As there.
        q: As there.
        segments: As there.
        keys: As there.
        out: What `attend` returned.
        lse: Likewise.
        dout: Cotangent of `out`.
        dk: float32 like `keys.k`: the cotangents so far, to which these queries' are added.
        dv: Likewise.

    Returns:
        The cotangent of `q`, and the sums for keys and values.
    """
    window, n_kv = keys.tokens.window, keys.k.shape[0] // q.shape[0]
    # the derivative of a softmax subtracts the mean of the cotangents under its weights
    mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def one(grads: tuple, item: tuple) -> tuple[tuple, Array]:
        index, segments, q, dout, lse, mean = item

        def add(block: Array, state: tuple) -> tuple:
            dq, dk, dv = state
            near = _at(settings, keys, block)
            visible = _visible(settings, index, block, segments, near.tokens)
            scores = _scores(settings, q, near.k)
            weights = jnp.exp(_hide(scores, visible) - lse)
            dscores = weights * (_dot("bqd,bkd->bqk", dout, near.v) - mean)
            if settings.softcap is not None:
                dscores = dscores * (1 - (scores / settings.softcap) ** 2)
            # in the operands' dtype, as in `matmul`
            dscores = (dscores * settings.scale).astype(q.dtype)
            dq = dq + _dot("bqk,bkd->bqd", dscores, near.k)
            dk = _add_at(settings, dk, block, _over_queries(dscores, q))
            dv = _add_at(settings, dv, block, _over_queries(weights.astype(q.dtype), dout))
            return dq, dk, dv

        first, end = _seen(settings, index, keys.k.shape[1], window)
        dq, dk, dv = lax.fori_loop(first, end, add, (jnp.zeros(q.shape, jnp.float32), *grads))
        return (dk, dv), dq.astype(q.dtype)

    by_query = (_cut_queries(settings, x, n_kv) for x in (q, dout, lse, mean))
    items = (*_numbered(settings, start, q.shape[1], segments), *by_query)
    (dk, dv), dq = lax.scan(one, (dk, dv), items)
    return _join_queries(settings, dq, q), dk, dv


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _over_queries(x: Array, y: Array) -> Array:
    """`[batch, keys, d]`, of `[batch, queries, keys]` and `[batch, queries, d]`."""

    def turned(x: Array, y: Array) -> Array:
        # XLA's library for a CPU knows no product over the rows of both; its own code is slower
        # than turning x first, which XLA would undo without the barrier
        return _dot("bkq,bqd->bkd", lax.optimization_barrier(x.mT), y)

    plain = partial(_dot, "bqk,bqd->bkd")
    return lax.platform_dependent(x, y, cpu=turned, default=plain)


def _scores(settings: Settings, q: Array, k: Array) -> Array:
    scores = _dot("bqd,bkd->bqk", q, k) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    return scores


def _visible(
    settings: Settings, index: Array, block: Array, segments: Array | None, keys: Tokens
) -> Array:
    """Which keys of a block each query of block `index` sees: `[batch, q_block, k_block]`."""
    query = index * settings.q_block + jnp.arange(settings.q_block, dtype=jnp.int32)
    key = block * settings.k_block + jnp.arange(settings.k_block, dtype=jnp.int32)
    back = query[:, None] - key[None, :]
    seen = back >= 0
    if keys.window is not None:
        seen &= back < keys.window
    seen = seen[None] & keys.valid[:, None, :]
    if segments is not None and keys.segment_ids is not None:
        seen &= segments[:, :, None] == keys.segment_ids[:, None, :]
    return seen


def _seen(settings: Settings, index: Array, seq: int, window: Array | None) -> tuple[Array, Array]:
    """The first key block of which query block `index` may see some, and the end."""
    start = index * settings.q_block
    end = (start + settings.q_block - 1) // settings.k_block + 1
    first = jnp.int32(0)
    if window is not None:
        first = jnp.maximum(start - window + 1, 0) // settings.k_block
    return first, jnp.minimum(end, seq // settings.k_block)


def _hide(scores: Array, visible: Array) -> Array:
    """Put `MASKED` for pairs that may not attend: the same in all heads of a row."""
    batch, queries, keys = visible.shape
    by_row = scores.reshape(batch, -1, queries, keys)
    return jnp.where(visible[:, None], by_row, MASKED).reshape(scores.shape)


def _at(settings: Settings, keys: Keys, block: Array) -> Keys:
    def slice_of(x: Any) -> Any:
        size = settings.k_block
        return None if x is None else lax.dynamic_slice_in_dim(x, block * size, size, axis=1)

    tokens = keys.tokens
    near = Tokens(slice_of(tokens.valid), slice_of(tokens.segment_ids), tokens.window)
    return Keys(slice_of(keys.k), slice_of(keys.v), near)


def _add_at(settings: Settings, total: Array, block: Array, x: Array) -> Array:
    place = block * settings.k_block
    old = lax.dynamic_slice_in_dim(total, place, settings.k_block, axis=1)
    return lax.dynamic_update_slice_in_dim(total, old + x, place, axis=1)


def _numbered(
    settings: Settings, start: Array, queries: int, segments: Array | None
) -> tuple[Array, Array | None]:
    """For a scan over query blocks: their numbers, and the documents of their tokens."""
    numbers = start // settings.q_block
    numbers += jnp.arange(queries // settings.q_block, dtype=jnp.int32)
    return numbers, None if segments is None else _cut(segments, settings.q_block)


def _cut(x: Array, block: int) -> Array:
    """Cut axis 1 into whole blocks; the axis of blocks goes in front."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _cut_queries(settings: Settings, x: Array, n_kv: int) -> Array:
    """`[batch, queries, heads, d]` as `[blocks, batch * n_kv, group * q_block, d]`.

    So all query heads that share a key/value head are the rows of one matmul.
    """
    x = _cut(x, settings.q_block)
    blocks, batch, block, heads, d = x.shape
    x = x.reshape(blocks, batch, block, n_kv, heads // n_kv, d)
    return jnp.moveaxis(x, 2, 4).reshape(blocks, batch * n_kv, -1, d)


def _join_queries(settings: Settings, blocks: Array, like: Array) -> Array:
    """Undo `_cut_queries`; batch and heads are those of `like`."""
    batch, _, heads = like.shape[:3]
    d = blocks.shape[-1]
    x = blocks.reshape(-1, batch, heads, settings.q_block, d)
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(batch, -1, heads, d)
