# SPDX-License-Identifier: Apache-2.0
"""Causal attention in memory linear in the sequence: scores exist one block at a time.

FlashAttention as plain XLA, of whole rows; the loops over blocks are in `attention_blocks`. What is
kept for the backward is the output and one logarithm for each query.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..typing import Array, Bool, Float, Int
from .attention import attention_mask_of, grouped_query_attention
from .attention_blocks import (
    BLOCK,
    CPU_BLOCK,
    Keys,
    Platforms,
    Settings,
    Tokens,
    attend,
    attend_backward,
)
from .layers import economical

ATTENTION_OUTPUT = "attention_output"
"""Name of the output and of the logarithms, for the rematerialization policy that saves those."""


def blockwise_attention(
    scale: float,
    q: Float[Array, "batch seq n_heads head_dim"],
    k: Float[Array, "batch n_kv_heads seq head_dim"],
    v: Float[Array, "batch n_kv_heads seq head_dim"],
    valid: Bool[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    *,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    block: tuple[int, int] | None = None,
) -> Float[Array, "batch seq n_heads head_dim"]:
    """Attend causally, each key/value head serving `n_heads / n_kv_heads` query heads.

    Memory is that of the arguments and the result, and of a few float32 blocks of scores,
    `[batch, n_heads, q_block, k_block]`. A block that lies wholly in the future, or before the
    window, is not computed. The derivative is reverse mode's, once.

    A sequence no longer than `CPU_BLOCK` is left to `grouped_query_attention`.

    Args:
        scale: Factor of the scores.
        q: Queries.
        k: Keys, heads before positions.
        v: Values, likewise.
        valid: Which tokens are not padding, which may be on either side. A query that sees no key
            gets zeros, and passes no gradient on.
        segment_ids: Which document each token belongs to, in a packed row; None: one document.
        window: How many tokens back a query sees, itself included; None: all.
        softcap: Bound of the scores, `softcap * tanh(scores / softcap)`; None: unbounded.
        block: Queries and keys of one block, at most; None: what suits the platform.

    Returns:
        The attended values, in the dtype of `q`. Scores, softmax and all sums are float32.

    References:
        Rabe and Staats, Self-attention Does Not Need O(n^2) Memory (arXiv 2112.05682).
        Dao et al., FlashAttention (arXiv 2205.14135), Algorithms 1 and 4.
    """
    seq = q.shape[1]
    tokens = Tokens(valid, segment_ids, None if window is None else jnp.int32(window))
    if seq <= max(block or CPU_BLOCK):
        out = economical(partial(_plain, softcap=softcap))(scale, q, k, v, tokens)
        return checkpoint_name(out, ATTENTION_OUTPUT)

    def settings(block: tuple[int, int]) -> Settings:
        return Settings(scale, softcap, _even(seq, block[0]), _even(seq, block[1]))

    platforms = Platforms(settings(block or CPU_BLOCK), settings(block or BLOCK))
    return _blockwise(platforms, q, k, v, tokens)


def _plain(
    scale: float, q: Array, k: Array, v: Array, tokens: Tokens, *, softcap: float | None
) -> Array:
    mask = attention_mask_of(tokens.valid, tokens.segment_ids, window=tokens.window)
    return grouped_query_attention(scale, q, k, v, mask, softcap=softcap)


def _even(seq: int, block: int) -> int:
    """The least block, a multiple of 16, that cuts the sequence into no more blocks."""
    blocks = -(-seq // block)
    return min(block, -(-seq // (16 * blocks)) * 16)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(platforms: Platforms, q: Array, k: Array, v: Array, tokens: Tokens) -> Array:
    return platforms.run(_forward, q, k, v, tokens)[0]


def _blockwise_fwd(
    platforms: Platforms, q: Array, k: Array, v: Array, tokens: Tokens
) -> tuple[Array, tuple]:
    forward = platforms.run(_forward, q, k, v, tokens)
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in forward)
    return out, (q, k, v, tokens, out, lse)


def _blockwise_bwd(platforms: Platforms, residuals: tuple, dout: Array) -> tuple:
    return *platforms.run(_backward, *residuals, dout), None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _forward(
    settings: Settings, q: Array, k: Array, v: Array, tokens: Tokens
) -> tuple[Array, Array]:
    seq = q.shape[1]
    keys = _whole_keys(settings, k, v, tokens)
    queries, segments = (_padded(x, settings.q_block) for x in (q, tokens.segment_ids))
    out, lse = attend(settings, jnp.int32(0), queries, segments, keys)
    return out[:, :seq], lse[:, :seq]


def _backward(
    settings: Settings,
    q: Array,
    k: Array,
    v: Array,
    tokens: Tokens,
    out: Array,
    lse: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    keys = _whole_keys(settings, k, v, tokens)
    queries, segments, out, lse, dout = (
        _padded(x, settings.q_block) for x in (q, tokens.segment_ids, out, lse, dout)
    )
    zero = jnp.zeros(keys.k.shape, jnp.float32)
    dq, dk, dv = attend_backward(
        settings, jnp.int32(0), queries, segments, keys, out, lse, dout, zero, zero
    )
    dk, dv = (x[:, : k.shape[2]].reshape(k.shape).astype(k.dtype) for x in (dk, dv))
    return dq[:, : q.shape[1]], dk, dv


def _whole_keys(settings: Settings, k: Array, v: Array, tokens: Tokens) -> Keys:
    k, v, valid, segments = (
        _padded(x, settings.k_block)
        for x in (
            k.reshape(-1, *k.shape[2:]),
            v.reshape(-1, *v.shape[2:]),
            tokens.valid,
            tokens.segment_ids,
        )
    )
    return Keys(k, v, Tokens(valid, segments, tokens.window))


def _padded(x: Any, block: int) -> Any:
    """`x`, unless it is None, with axis 1 filled up with zeros to whole blocks."""
    if x is None or x.shape[1] % block == 0:
        return x
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % block)
    return jnp.pad(x, padding)
