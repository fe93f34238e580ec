# SPDX-License-Identifier: Apache-2.0
"""The decoder as Flax NNX modules: plain model code that knows nothing of adapters or 4 bits.

Attributes are named as Hugging Face names its modules, so a parameter's path is its name there. The
layers are one module whose parameters have a leading layer axis, scanned by `nnx.scan`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ..typing import Array, Bool, Float, Int
from .attention import as_valid, default_positions, grouped_query_attention
from .blockwise_attention import ATTENTION_OUTPUT, blockwise_attention
from .config import DecoderConfig
from .layers import LINEAR_OUTPUT, Embed, Linear, RMSNorm, economical, in_chunks, swiglu
from .matmul import matmul
from .rope import rope_angles, rotate

Remat = Literal["none", "dots", "full", "offload"]
"""What the backward recomputes of a layer: nothing that costs a matmul, all but the outputs of
linears, or everything; "offload" is "full" with the inputs of layers waiting in host memory."""

LAYER_INPUT = "layer_input"
"""Name of the residual stream at the start of a layer, for the policy that moves exactly that."""

MLP_TOKENS = 8192
"""A longer sequence goes through the MLP in chunks of at most as many tokens."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for decoding.

    Attributes:
        k: `[layers, batch, n_kv_heads, max_len, head_dim]`, rotated keys in the compute dtype.
        v: Values, likewise.
        valid: Bool `[batch, max_len]`: which slots hold a token that is not padding.
        length: int32 scalar, slots written so far, padding included.
    """

    k: Array
    v: Array
    valid: Array
    length: Array


class _Context(NamedTuple):
    """What all layers share: rotations, and who sees whom.

    Attributes:
        angles: Cosines and sines of the rotations.
        valid: Bool `[batch, seq]`: which tokens are not padding.
        segment_ids: int `[batch, seq]`: the document of each token, or None.
        mask: Bool `[batch, seq, slots]`, with caches, instead of those two: the slots that each
            token sees.
    """

    angles: tuple[Array, Array]
    valid: Array | None = None
    segment_ids: Array | None = None
    mask: Array | None = None


Angles = tuple[Array, Array]


class _Caches(NamedTuple):
    """The caches of all layers, on their way through the scan, and where to write in them."""

    k: Array
    v: Array
    layer: Array
    slot: Array


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, q_dim = config.d_model, config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim

        def linear(d_in: int, d_out: int, use_bias: bool) -> Linear:
            return Linear(d_in, d_out, use_bias=use_bias, dtype=dtype, rngs=rngs)

        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_proj = linear(d, q_dim, config.qkv_bias)
        self.k_proj = linear(d, kv_dim, config.qkv_bias)
        self.v_proj = linear(d, kv_dim, config.qkv_bias)
        self.o_proj = linear(q_dim, d, config.out_bias)

    def keys_values(
        self, x: Float[Array, "batch seq d"], angles: Angles
    ) -> tuple[Float[Array, "batch n_kv seq head_dim"], Float[Array, "batch n_kv seq head_dim"]]:
        """Return rotated keys, and values, heads before positions."""
        heads = (*x.shape[:2], -1, self.head_dim)
        rows = x.reshape(-1, x.shape[-1])
        k = rotate(self.k_proj(rows).reshape(heads), angles)
        v = self.v_proj(rows).reshape(heads)
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def queries(
        self, x: Float[Array, "batch seq d"], angles: Angles
    ) -> Float[Array, "batch seq n_heads head_dim"]:
        """Return rotated queries."""
        rows = x.reshape(-1, x.shape[-1])
        return rotate(self.q_proj(rows).reshape(*x.shape[:2], -1, self.head_dim), angles)

    def output(
        self, attended: Float[Array, "batch seq n_heads head_dim"]
    ) -> Float[Array, "batch seq d"]:
        """Return what attention adds to the residual stream."""
        batch, seq = attended.shape[:2]
        return self.o_proj(attended.reshape(batch * seq, -1)).reshape(batch, seq, -1)


class MLP(nnx.Module):
    """The gated MLP `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202).

    Its inner activations are the widest of a layer. Those of a sequence longer than `MLP_TOKENS`
    never exist whole: they are computed in chunks, and again in the backward, whatever the remat
    setting. So the kernels are read, and decoded if they are in 4 bits, once for each chunk.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, d_ff, bias = config.d_model, config.d_ff, config.mlp_bias
        self.gate_proj = Linear(d, d_ff, use_bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(d, d_ff, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(d_ff, d, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        """Apply the MLP at each position."""

        def mlp(rows: Array) -> Array:
            return self.down_proj(swiglu(self.gate_proj(rows), self.up_proj(rows)))

        rows = x.reshape(-1, x.shape[-1])
        y = mlp(rows) if x.shape[1] <= MLP_TOKENS else in_chunks(mlp, rows, MLP_TOKENS)
        return y.reshape(x.shape)


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def keys_values(self, x: Float[Array, "batch seq d"], angles: Angles) -> tuple[Array, Array]:
        """Return what later tokens see of the tokens of `x`, as `Attention.keys_values`."""
        return self.self_attn.keys_values(self.input_layernorm(x), angles)

    def queries(self, x: Float[Array, "batch seq d"], angles: Angles) -> Array:
        """Return what the tokens of `x` look for, as `Attention.queries`."""
        return self.self_attn.queries(self.input_layernorm(x), angles)

    def attend(self, x: Float[Array, "batch seq d"], context: _Context) -> Array:
        """Attend from the tokens of `x` to each other: `[batch, seq, n_heads, head_dim]`."""
        assert context.valid is not None
        normed = self.input_layernorm(x)
        q = self.self_attn.queries(normed, context.angles)
        k, v = self.self_attn.keys_values(normed, context.angles)
        scale = self.self_attn.scale
        return blockwise_attention(scale, q, k, v, context.valid, context.segment_ids)

    def attend_cached(
        self, x: Float[Array, "batch seq d"], context: _Context, caches: _Caches
    ) -> tuple[Array, _Caches]:
        """Attend from the tokens of `x` to what the caches hold and to `x`, which is added."""
        assert context.mask is not None
        normed, layer = self.input_layernorm(x), caches.layer
        q = self.self_attn.queries(normed, context.angles)
        k, v = self.self_attn.keys_values(normed, context.angles)
        # one array for all layers, which the loop carries and updates in place
        at = (layer, 0, 0, caches.slot, 0)
        all_k = lax.dynamic_update_slice(caches.k, k[None], at)
        all_v = lax.dynamic_update_slice(caches.v, v[None], at)
        k = lax.dynamic_index_in_dim(all_k, layer, keepdims=False)
        v = lax.dynamic_index_in_dim(all_v, layer, keepdims=False)
        scale = self.self_attn.scale
        out = economical(grouped_query_attention)(scale, q, k, v, context.mask)
        return out, _Caches(all_k, all_v, layer + 1, caches.slot)

    def finish(
        self,
        x: Float[Array, "batch seq d"],
        attended: Float[Array, "batch seq n_heads head_dim"],
    ) -> Float[Array, "batch seq d"]:
        """Return the residual stream after this layer, token by token."""
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """A Llama-style decoder.

    Args:
        config: The model's shape.
        dtype: Compute dtype: operands of the matmuls and the residual stream. Norms, rotations,
            softmax and logits are float32.
        remat: What the backward recomputes of each layer.
        rngs: Keys of the random initialization.
    """

    def __init__(
        self, config: DecoderConfig, *, dtype: DTypeLike, remat: Remat = "none", rngs: nnx.Rngs
    ):
        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, rngs=rngs)

        self.config: DecoderConfig = config
        self.remat: Remat = remat
        self.embed_tokens = Embed(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.layers = stack(rngs)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        tied = config.tied
        self.lm_head = (
            None if tied else Head(config.d_model, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def embed(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq d"]:
        """Return the residual stream before the first layer."""
        return self.embed_tokens(tokens)

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        valid: Bool[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d"]:
        """Return the final residual stream, what `head` takes."""
        context = _Context(rope_angles(self.config, positions), valid, segment_ids)

        def body(layer: Layer, x: Array, context: _Context) -> Array:
            x = checkpoint_name(x, LAYER_INPUT)
            return layer.finish(x, layer.attend(x, context))

        # inside a scan nothing can be shared between forward and backward anyway
        body = nnx.remat(body, prevent_cse=False, policy=_policy(self.remat))
        scan = nnx.scan(body, in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        return scan(self.layers, self.embed(tokens), context)

    def head(self, hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead vocab"]:
        """Return float32 logits of final hidden states, which the last norm goes over first."""
        rows = self.norm(hidden.reshape(-1, hidden.shape[-1]))
        logits = self.embed_tokens.attend(rows) if self.lm_head is None else self.lm_head(rows)
        return logits.reshape(*hidden.shape[:-1], -1)

    def decode(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        *,
        attention_mask: Array | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq d"], Cache]:
        """Return final hidden states of `tokens`, which follow those in `cache`, and the cache."""
        valid = as_valid(attention_mask, tokens)
        if positions is None:
            seen = jnp.sum(cache.valid, axis=-1, keepdims=True, dtype=jnp.int32)
            positions = seen + default_positions(valid)
        end = cache.length + tokens.shape[1]
        all_valid = lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
        mask = cache_mask(all_valid, cache.length, tokens.shape[1])
        context = _Context(rope_angles(self.config, positions), mask=mask)

        def body(layer: Layer, carry: tuple, context: _Context) -> tuple:
            x, caches = carry
            attended, caches = layer.attend_cached(x, context, caches)
            return layer.finish(x, attended), caches

        scan = nnx.scan(body, in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        caches = _Caches(cache.k, cache.v, jnp.int32(0), cache.length)
        x, caches = scan(self.layers, (self.embed(tokens), caches), context)
        # a full cache would overwrite its last slots: better no answer than a wrong one
        x = jnp.where(end <= cache.valid.shape[1], x, jnp.nan)
        return x, Cache(caches.k, caches.v, all_valid, end)


class Head(Linear):
    """The output head: a linear that leaves its logits in float32."""

    def __call__(self, x: Float[Array, "rows d_in"]) -> Float[Array, "rows d_out"]:
        """Score each row against every token."""
        return matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))


def cache_mask(
    valid: Bool[Array, "batch slots"], start: Int[Array, ""], seq: int
) -> Bool[Array, "batch seq slots"]:
    """Say which cache slots each of `seq` new tokens, written from slot `start` on, may see."""
    slots = jnp.arange(valid.shape[1])[None, None, :]
    queries = (start + jnp.arange(seq))[None, :, None]
    return valid[:, None, :] & (slots <= queries)


def _policy(remat: Remat):
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = {"full": (), "dots": (LINEAR_OUTPUT,), "none": (LINEAR_OUTPUT, ATTENTION_OUTPUT)}
    return policies.save_only_these_names(*kept[remat])
