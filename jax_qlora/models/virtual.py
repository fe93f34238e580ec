# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens: places before a row's own tokens whose values are trained, not looked up.

Prompt tuning gives their embeddings, prefix tuning their keys and values in every layer. A virtual
token takes a place in the sequence as any token does, so attention, its windows, padding and remat
need to know nothing of it. What a prefix's places compute beside is not used, by any token.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import InputError
from ..typing import Array, Bool, Float, Int
from .attention import default_positions
from .config import DecoderConfig
from .matmul import matmul

PROMPT = "prompt"
"""Where a parameter tree has the embeddings of virtual tokens, float `[tokens, d_model]`."""

PREFIX = "layers/self_attn/prefix"
"""Where it has their keys and values, `k` and `v`, `[layers, tokens, n_kv_heads, head_dim]`."""


class Prefix(nnx.Module):
    """Keys and values of a layer's virtual tokens; keys are as after the rotation.

    Attributes:
        k: `[tokens, n_kv_heads, head_dim]`.
        v: Likewise.
    """

    def __init__(self, n_kv_heads: int, head_dim: int):
        self.k = nnx.Param(jnp.zeros((1, n_kv_heads, head_dim)))
        self.v = nnx.Param(jnp.zeros((1, n_kv_heads, head_dim)))


def has_prompt(params: Mapping[str, Any]) -> bool:
    """Whether a parameter tree has embeddings of virtual tokens."""
    return PROMPT in params


def has_prefix(layers: Mapping[str, Any]) -> bool:
    """Whether the parameters of a layer, or of all, have keys and values of virtual tokens."""
    return "prefix" in layers["self_attn"]


def count_virtual(params: Any, config: DecoderConfig) -> int:
    """Return how many virtual tokens a parameter tree has.

    Args:
        params: The parameter tree.
        config: The model's shape.

    Raises:
        InputError: It has a prompt and a prefix, or one that is of another model.
    """
    if not isinstance(params, Mapping):
        return 0
    found = {PROMPT: (params[PROMPT], (config.d_model,))} if has_prompt(params) else {}
    if has_prefix(params["layers"]):
        if found:
            raise InputError(
                f"The parameters have '{PROMPT}' and '{PREFIX}': expected virtual tokens of one "
                "kind. Attach one of the two."
            )
        prefix, heads = params["layers"]["self_attn"]["prefix"], config.n_kv_heads
        if sorted(prefix) != ["k", "v"]:
            raise InputError(f"'{PREFIX}' has {sorted(prefix)}: expected keys 'k' and values 'v'.")
        found = {f"{PREFIX}/{x}": (prefix[x], (heads, config.head_dim)) for x in ("k", "v")}
    counts = set()
    for path, (x, rest) in found.items():
        lead = (config.n_layers,) if path != PROMPT else ()
        count = x.shape[len(lead)] if x.ndim == len(lead) + 1 + len(rest) else 0
        if x.shape != (*lead, count, *rest):
            wanted = ", ".join(map(str, (*lead, "tokens", *rest)))
            raise InputError(
                f"'{path}' has the shape {x.shape}: expected [{wanted}]. It was made for another "
                "model."
            )
        counts.add(count)
    if len(counts) > 1:
        raise InputError(
            f"'{PREFIX}' has {sorted(counts)} keys and values: expected equal numbers."
        )
    return max(counts, default=0)


def with_virtual(
    count: int,
    tokens: Int[Array, "batch seq"],
    valid: Bool[Array, "batch seq"],
    positions: Int[Array, "batch seq"] | None,
) -> tuple[Array, Array, Array, Int[Array, "batch more"]]:
    """Put places for virtual tokens before the first token of each row.

    Padding on the left stays on the left, so that no window sees it as a distance. What is computed
    of token i is found at place `count + i`.

    Args:
        count: Virtual tokens.
        tokens: Token ids.
        valid: Which of them are not padding.
        positions: Their positions in the row's own text; None: counted.

    Returns:
        Token ids, with any at virtual places; which places are not padding; positions, those of
        virtual tokens from 0 and those of the row's own after them; and int32: the number of the
        virtual token at each place, -1 at a token's.
    """
    first = jnp.argmax(valid, axis=1)[:, None].astype(jnp.int32)
    place = jnp.arange(count + tokens.shape[1], dtype=jnp.int32)[None]
    virtual = jnp.where((place >= first) & (place < first + count), place - first, -1)
    source = jnp.maximum(jnp.where(place < first, place, place - count), 0)

    def moved(x: Array) -> Array:
        return jnp.take_along_axis(x, source, axis=1)

    valid = moved(valid) | (virtual >= 0)
    if positions is None:
        after = default_positions(valid)
    else:
        after = jnp.where(virtual >= 0, virtual, moved(positions).astype(jnp.int32) + count)
    return moved(tokens), valid, after, virtual


def put_virtual(
    virtual: Int[Array, "batch seq"] | None,
    values: Float[Array, "tokens *rest"],
    x: Float[Array, "batch seq *rest"],
) -> Float[Array, "batch seq *rest"]:
    """Return `x` with the values of virtual tokens at their places.

    A product with ones and zeros: its gradient is a matmul as well, and no scatter.

    Args:
        virtual: The number of the virtual token at each place, -1 at others; None: `x` as it is.
        values: One row for each virtual token.
        x: What there is at all places.
    """
    if virtual is None:
        return x
    batch, seq = virtual.shape
    rows = values.reshape(values.shape[0], -1).astype(x.dtype)
    chosen = jax.nn.one_hot(virtual.reshape(-1), values.shape[0], dtype=x.dtype)
    put = matmul(chosen, rows).astype(x.dtype).reshape(x.shape)
    return jnp.where((virtual >= 0).reshape(batch, seq, *(1,) * (x.ndim - 2)), put, x)
