# SPDX-License-Identifier: Apache-2.0
"""One layer as Flax NNX modules: plain model code that knows nothing of adapters or 4 bits.

Attributes are named as Hugging Face names its modules, so a parameter's path is its name there.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from ..errors import InputError
from ..typing import Array, Float
from .attention import grouped_query_attention
from .blockwise_attention import blockwise_attention
from .config import DecoderConfig
from .cudnn_attention import AttentionKind, cudnn_attention
from .experts import MixtureOfExperts
from .layers import GATED, UNGATED, LayerNorm, Linear, RMSNorm, economical, in_chunks
from .per_layer import PerLayer
from .rope import Angles, rotate
from .virtual import Prefix, put_virtual

MLP_TOKENS = 8192
"""A longer sequence goes through the MLP in chunks of at most as many tokens."""


class Context(NamedTuple):
    """What all layers share: rotations, and who sees whom.

    Attributes:
        angles: Cosines and sines of the rotations.
        local_angles: Those of local layers, if they are others.
        valid: Bool `[batch, seq]`: which tokens are not padding.
        segment_ids: int `[batch, seq]`: the document of each token, or None.
        virtual: int32 `[batch, seq]`: the number of the virtual token at each place, -1 at a
            token's; None: there are none.
        mask: Bool `[batch, seq, slots]`, with caches, instead of those three: the slots that each
            token sees.
        back: int `[batch, seq, slots]`, with caches and windows: how many tokens before a token the
            one in a slot is.
        window: How many tokens back a token sees in this layer, if any layer is local.
    """

    angles: Angles
    local_angles: Angles | None = None
    valid: Array | None = None
    segment_ids: Array | None = None
    virtual: Array | None = None
    mask: Array | None = None
    back: Array | None = None
    window: Array | None = None

    def of_layer(self, layer: PerLayer) -> "Context":
        """What one layer takes of it: its rotations, and its window."""
        angles = layer.angles(self.angles, self.local_angles)
        context = self._replace(angles=angles, local_angles=None)
        if self.mask is not None and self.back is not None:
            assert layer.window is not None
            return context._replace(mask=self.mask & (self.back < layer.window), back=None)
        return context._replace(window=layer.window)


class Caches(NamedTuple):
    """The caches of all layers, on their way through the scan, and where to write in them."""

    k: Array
    v: Array
    layer: Array
    slot: Array


class Attention(nnx.Module):
    """Grouped-query attention, with rotary positions unless positions are learned."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        kind: AttentionKind = "blocks",
        prefix: bool = False,
        rngs: nnx.Rngs,
    ):
        d, q_dim = config.d_model, config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim

        def linear(d_in: int, d_out: int, use_bias: bool) -> Linear:
            return Linear(d_in, d_out, use_bias=use_bias, dtype=dtype, rngs=rngs)

        self.head_dim = config.head_dim
        self.parts = (q_dim, q_dim + kv_dim)  # where queries and keys end in a fused projection
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attention_softcap
        self.kind = kind
        self.windows = tuple(dict.fromkeys(config.windows))
        fused = config.fused
        self.qkv_proj = linear(d, q_dim + 2 * kv_dim, config.qkv_bias) if fused else None
        if not fused:
            self.q_proj = linear(d, q_dim, config.qkv_bias)
            self.k_proj = linear(d, kv_dim, config.qkv_bias)
            self.v_proj = linear(d, kv_dim, config.qkv_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.o_proj = linear(q_dim, d, config.out_bias)
        self.prefix = Prefix(config.n_kv_heads, config.head_dim) if prefix else None

    def queries_keys_values(
        self, x: Float[Array, "batch seq d"], angles: Angles, virtual: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Return all three at once: a fused projection is one matmul."""
        if self.qkv_proj is None:
            return self.queries(x, angles), *self.keys_values(x, angles, virtual)
        q, k, v = jnp.split(self.qkv_proj(x.reshape(-1, x.shape[-1])), self.parts, axis=-1)
        heads = (*x.shape[:2], -1, self.head_dim)
        return self._queries(q.reshape(heads), angles), *self._keys_values(
            k.reshape(heads), v.reshape(heads), angles, virtual
        )

    def keys_values(
        self, x: Float[Array, "batch seq d"], angles: Angles, virtual: Array | None = None
    ) -> tuple[Float[Array, "batch n_kv seq head_dim"], Float[Array, "batch n_kv seq head_dim"]]:
        """Return rotated keys, and values, heads before positions; a prefix gives its own."""
        if self.qkv_proj is not None:
            return self.queries_keys_values(x, angles, virtual)[1:]
        heads = (*x.shape[:2], -1, self.head_dim)
        rows = x.reshape(-1, x.shape[-1])
        k, v = self.k_proj(rows).reshape(heads), self.v_proj(rows).reshape(heads)
        return self._keys_values(k, v, angles, virtual)

    def queries(
        self, x: Float[Array, "batch seq d"], angles: Angles
    ) -> Float[Array, "batch seq n_heads head_dim"]:
        """Return rotated queries."""
        if self.qkv_proj is not None:
            return self.queries_keys_values(x, angles)[0]
        rows = x.reshape(-1, x.shape[-1])
        return self._queries(self.q_proj(rows).reshape(*x.shape[:2], -1, self.head_dim), angles)

    def _queries(self, q: Array, angles: Angles) -> Array:
        return rotate(q if self.q_norm is None else self.q_norm(q), angles)

    def _keys_values(
        self, k: Array, v: Array, angles: Angles, virtual: Array | None
    ) -> tuple[Array, Array]:
        k = rotate(k if self.k_norm is None else self.k_norm(k), angles)
        if self.prefix is not None:
            k = put_virtual(virtual, self.prefix.k[...], k)
            v = put_virtual(virtual, self.prefix.v[...], v)
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def attend(
        self,
        q: Float[Array, "batch seq n_heads head_dim"],
        k: Float[Array, "batch n_kv seq head_dim"],
        v: Float[Array, "batch n_kv seq head_dim"],
        valid: Array,
        segment_ids: Array | None = None,
        *,
        window: Array | None = None,
    ) -> Float[Array, "batch seq n_heads head_dim"]:
        """Attend from all tokens to each other.

        Raises:
            InputError: The kind of attention cannot keep the documents of a row apart.
        """
        if self.kind == "blocks":
            limits = {"window": window, "softcap": self.softcap}
            return blockwise_attention(self.scale, q, k, v, valid, segment_ids, **limits)
        if segment_ids is not None:
            raise InputError(
                'train.attention = "cudnn": expected one document a row, found segment_ids, which '
                'that attention cannot keep apart. Leave them out, or set it to "blocks".'
            )
        return cudnn_attention(self.scale, q, k, v, valid, window=window, windows=self.windows)

    def output(
        self, attended: Float[Array, "batch seq n_heads head_dim"]
    ) -> Float[Array, "batch seq d"]:
        """Return what attention adds to the residual stream."""
        batch, seq = attended.shape[:2]
        return self.o_proj(attended.reshape(batch * seq, -1)).reshape(batch, seq, -1)


class MLP(nnx.Module):
    """The gated MLP `down(act(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202), or without a gate.

    Its inner activations are the widest of a layer. Those of a sequence longer than `MLP_TOKENS`
    never exist whole: they are computed in chunks, and again in the backward, whatever the remat
    setting. So the kernels are read, and decoded if they are in 4 bits, once for each chunk.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, d_ff, bias = config.d_model, config.d_ff, config.mlp_bias
        self.act = (GATED if config.gated else UNGATED)[config.activation]

        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, use_bias=bias, dtype=dtype, rngs=rngs)

        fused = config.gated and config.fused
        self.gate_up_proj = linear(d, 2 * d_ff) if fused else None
        self.gate_proj = linear(d, d_ff) if config.gated and not fused else None
        self.up_proj = None if fused else linear(d, d_ff)
        self.down_proj = linear(d_ff, d)

    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        """Apply the MLP at each position."""

        def mlp(rows: Array) -> Array:
            if self.gate_up_proj is not None:
                inner = jnp.split(self.gate_up_proj(rows), 2, axis=-1)
            else:
                inner = [proj(rows) for proj in (self.gate_proj, self.up_proj) if proj is not None]
            return self.down_proj(self.act(*inner))

        rows = x.reshape(-1, x.shape[-1])
        y = mlp(rows) if x.shape[1] <= MLP_TOKENS else in_chunks(mlp, rows, MLP_TOKENS)
        return y.reshape(x.shape)


class Layer(nnx.Module):
    """One pre-norm transformer layer; with `post_norms`, normalized on the way out as well.

    The norm before the MLP is `post_attention_layernorm`; with `post_norms` that is the one after
    attention, and `pre_feedforward_layernorm` the one before the MLP, as in `transformers`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        attention: AttentionKind = "blocks",
        prefix: bool = False,
        rngs: nnx.Rngs,
    ):
        self.input_layernorm = make_norm(config, config.d_model)
        self.self_attn = Attention(config, dtype=dtype, kind=attention, prefix=prefix, rngs=rngs)
        self.post_attention_layernorm = make_norm(config, config.d_model)
        mlp = MixtureOfExperts if config.n_experts else MLP
        self.mlp = mlp(config, dtype=dtype, rngs=rngs)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = make_norm(config, config.d_model)
            self.post_feedforward_layernorm = make_norm(config, config.d_model)

    def keys_values(
        self, x: Float[Array, "batch seq d"], angles: Angles, virtual: Array | None = None
    ) -> tuple[Array, Array]:
        """Return what later tokens see of the tokens of `x`, as `Attention.keys_values`."""
        return self.self_attn.keys_values(self.input_layernorm(x), angles, virtual)

    def queries(self, x: Float[Array, "batch seq d"], angles: Angles) -> Array:
        """Return what the tokens of `x` look for, as `Attention.queries`."""
        return self.self_attn.queries(self.input_layernorm(x), angles)

    def queries_keys_values(
        self, x: Float[Array, "batch seq d"], angles: Angles, virtual: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Return all three at once, as `Attention.queries_keys_values`."""
        return self.self_attn.queries_keys_values(self.input_layernorm(x), angles, virtual)

    def attend(self, x: Float[Array, "batch seq d"], context: Context) -> Array:
        """Attend from the tokens of `x` to each other: `[batch, seq, n_heads, head_dim]`."""
        assert context.valid is not None
        q, k, v = self.queries_keys_values(x, context.angles, context.virtual)
        return self.self_attn.attend(
            q, k, v, context.valid, context.segment_ids, window=context.window
        )

    def attend_cached(
        self, x: Float[Array, "batch seq d"], context: Context, caches: Caches
    ) -> tuple[Array, Caches]:
        """Attend from the tokens of `x` to what the caches hold and to `x`, which is added."""
        assert context.mask is not None
        attention, layer = self.self_attn, caches.layer
        q, k, v = self.queries_keys_values(x, context.angles)
        # one array for all layers, which the loop carries and updates in place
        at = (layer, 0, 0, caches.slot, 0)
        all_k = lax.dynamic_update_slice(caches.k, k[None], at)
        all_v = lax.dynamic_update_slice(caches.v, v[None], at)
        k = lax.dynamic_index_in_dim(all_k, layer, keepdims=False)
        v = lax.dynamic_index_in_dim(all_v, layer, keepdims=False)
        grouped = partial(grouped_query_attention, softcap=attention.softcap)
        out = economical(grouped)(attention.scale, q, k, v, context.mask)
        return out, Caches(all_k, all_v, layer + 1, caches.slot)

    def finish(
        self,
        x: Float[Array, "batch seq d"],
        attended: Float[Array, "batch seq n_heads head_dim"],
    ) -> Float[Array, "batch seq d"]:
        """Return the residual stream after this layer, token by token."""
        attended = self.self_attn.output(attended)
        if not self.post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def make_norm(config: DecoderConfig, d: int) -> RMSNorm | LayerNorm:
    """A norm over `d` features, as the configuration has them."""
    if config.layer_norm:
        return LayerNorm(d, eps=config.norm_eps)
    return RMSNorm(d, eps=config.norm_eps, offset=1.0 if config.norm_offset else 0.0)
