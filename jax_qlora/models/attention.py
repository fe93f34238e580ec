# SPDX-License-Identifier: Apache-2.0
"""Who may attend to whom, and grouped-query attention over it."""

import jax
import jax.numpy as jnp
from jax import lax

from ..typing import Array, Bool, Float, Int, Shaped
from .matmul import matmul

MASKED = -1e30
"""Score of a pair that may not attend: finite, so that a query with no key at all gives no NaN."""


def default_positions(
    valid: Bool[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None = None
) -> Int[Array, "batch seq"]:
    """Number the tokens of each document from 0, skipping padding on either side.

    Args:
        valid: Which tokens are not padding.
        segment_ids: Which document each token belongs to, in a packed row; a document is one run of
            equal ids. None: a row is one document.

    Returns:
        int32 positions; those of padding are 0 or more and mean nothing.
    """
    count = jnp.cumsum(valid, axis=-1, dtype=jnp.int32)
    start = jnp.zeros((valid.shape[0], 1), jnp.int32)
    if segment_ids is not None:
        changed = jnp.diff(segment_ids, axis=-1, prepend=segment_ids[:, :1]) != 0
        start = lax.cummax(jnp.where(changed, count - valid.astype(jnp.int32), 0), axis=1)
    return jnp.maximum(count - 1 - start, 0)


def attention_mask_of(
    valid: Bool[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    *,
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "batch seq seq"]:
    """Say which keys each query sees: not later, not padding, and of the same document.

    Args:
        valid: Which tokens are not padding.
        segment_ids: Which document each token belongs to, in a packed row.
        window: How many tokens back a query sees, itself included; None: all.

    Returns:
        True where query (axis 1) may attend to key (axis 2).
    """
    seq = valid.shape[1]
    back = jnp.arange(seq)[:, None] - jnp.arange(seq)[None, :]
    mask = (back >= 0) if window is None else (back >= 0) & (back < window)
    mask = mask[None] & valid[:, None, :]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return mask


def as_valid(
    attention_mask: Shaped[Array, "batch seq"] | None, tokens: Int[Array, "batch seq"]
) -> Bool[Array, "batch seq"]:
    """Turn an attention mask of booleans or of 0 and 1, or None, into booleans."""
    if attention_mask is None:
        return jnp.ones(tokens.shape, jnp.bool_)
    return jnp.asarray(attention_mask).astype(jnp.bool_)


def grouped_query_attention(
    scale: float,
    q: Float[Array, "batch queries n_heads head_dim"],
    k: Float[Array, "batch n_kv_heads keys head_dim"],
    v: Float[Array, "batch n_kv_heads keys head_dim"],
    mask: Bool[Array, "batch queries keys"],
    *,
    softcap: float | None = None,
) -> Float[Array, "batch queries n_heads head_dim"]:
    """Attend, each key/value head serving `n_heads / n_kv_heads` query heads.

    Args:
        scale: Factor of the scores.
        q: Queries.
        k: Keys, heads before positions.
        v: Values, likewise.
        mask: Which keys each query sees.
        softcap: Bound of the scores, `softcap * tanh(scores / softcap)`; None: unbounded.

    Returns:
        The attended values, in the dtype of `q`. Scores and softmax are float32.
    """
    batch, queries, n_heads, head_dim = q.shape
    n_kv, keys = k.shape[1], k.shape[2]
    group = n_heads // n_kv
    # one batched matmul over batch x key/value head, with the group's queries as its rows
    q = jnp.moveaxis(q.reshape(batch, queries, n_kv, group, head_dim), 1, 3)
    q = q.reshape(batch * n_kv, group * queries, head_dim)
    scores = matmul(q, k.reshape(batch * n_kv, keys, head_dim), y_axis=-1) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(batch, n_kv, group, queries, keys)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch * n_kv, group * queries, keys)
    out = matmul(weights, v.reshape(batch * n_kv, keys, head_dim)).astype(q.dtype)
    out = jnp.moveaxis(out.reshape(batch, n_kv, group, queries, head_dim), 3, 1)
    return out.reshape(batch, queries, n_heads, head_dim)
