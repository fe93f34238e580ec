# SPDX-License-Identifier: Apache-2.0
"""The decoder as a Flax NNX module.

The layers are one module whose parameters have a leading layer axis, scanned by `nnx.scan`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ..typing import Array, Bool, Float, Int
from .attention import as_valid, default_positions
from .blockwise_attention import ATTENTION_OUTPUT
from .config import DecoderConfig
from .cudnn_attention import KERNEL, AttentionKind
from .layer import Caches, Context, Layer, make_norm
from .layers import LINEAR_OUTPUT, Embed, Linear
from .matmul import matmul
from .per_layer import PerLayer, per_layer
from .rope import all_angles
from .virtual import put_virtual

Remat = Literal["none", "dots", "full", "offload"]
"""What the backward recomputes of a layer: nothing that costs a matmul, all but the outputs of
linears, or everything; "offload" is "full" with the inputs of layers waiting in host memory."""

LAYER_INPUT = "layer_input"
"""Name of the residual stream at the start of a layer, for the policy that moves exactly that."""


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


class Decoder(nnx.Module):
    """A stack of layers between an embedding and an output head.

    Args:
        config: The model's shape.
        dtype: Compute dtype: operands of the matmuls and the residual stream. Norms, rotations,
            softmax and logits are float32.
        remat: What the backward recomputes of each layer.
        attention: How layers attend, but for decoding from a cache.
        prompt: Whether it has embeddings of virtual tokens.
        prefix: Whether its layers have keys and values of virtual tokens.
        rngs: Keys of the random initialization.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
        attention: AttentionKind = "blocks",
        prompt: bool = False,
        prefix: bool = False,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, attention=attention, prefix=prefix, rngs=rngs)

        self.config: DecoderConfig = config
        self.remat: Remat = remat
        scale = config.d_model**0.5 if config.embed_scale else 1.0
        self.embed_tokens = Embed(
            config.vocab_size, config.d_model, dtype=dtype, rngs=rngs, scale=scale
        )
        self.prompt = nnx.Param(jnp.zeros((1, config.d_model))) if prompt else None
        self.embed_positions = (
            Embed(config.max_length, config.d_model, dtype=dtype, rngs=rngs)
            if config.learned_positions
            else None
        )
        self.layers = stack(rngs)
        self.norm = make_norm(config, config.d_model)
        tied = config.tied
        self.lm_head = (
            None if tied else Head(config.d_model, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def embed(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        virtual: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d"]:
        """Return the residual stream before the first layer.

        Args:
            tokens: Token ids.
            positions: Their positions; where those are learned, one beyond the context gives NaN.
            virtual: The number of the virtual token at each place, -1 at a token's; None: there are
                none.
        """
        x = self.embed_tokens(tokens)
        x = x if self.prompt is None else put_virtual(virtual, self.prompt[...], x)
        return x if self.embed_positions is None else x + self.embed_positions(positions)

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        valid: Bool[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        virtual: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d"]:
        """Return the final residual stream, what `head` takes."""
        context = Context(*all_angles(self.config, positions), valid, segment_ids, virtual)

        def body(layer: Layer, x: Array, data: PerLayer, context: Context) -> Array:
            x = checkpoint_name(x, LAYER_INPUT)
            return layer.finish(x, layer.attend(x, context.of_layer(data)))

        # inside a scan nothing can be shared between forward and backward anyway
        body = nnx.remat(body, prevent_cse=False, policy=_policy(self.remat))
        scan = nnx.scan(body, in_axes=(0, nnx.Carry, 0, None), out_axes=nnx.Carry)
        x = self.embed(tokens, positions, virtual)
        return scan(self.layers, x, per_layer(self.config), context)

    def head(self, hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead vocab"]:
        """Return float32 logits of final hidden states, which the last norm goes over first."""
        rows = self.norm(hidden.reshape(-1, hidden.shape[-1]))
        logits = self.embed_tokens.attend(rows) if self.lm_head is None else self.lm_head(rows)
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits.reshape(*hidden.shape[:-1], -1)

    def decode(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        *,
        attention_mask: Array | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        virtual: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq d"], Cache]:
        """Return final hidden states of `tokens`, which follow those in `cache`, and the cache."""
        valid = as_valid(attention_mask, tokens)
        if positions is None:
            seen = jnp.sum(cache.valid, axis=-1, keepdims=True, dtype=jnp.int32)
            positions = seen + default_positions(valid)
        end = cache.length + tokens.shape[1]
        all_valid = lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
        mask = cache_mask(all_valid, cache.length, tokens.shape[1])
        back = None
        if self.config.sliding_window is not None:
            back = cache_distance(all_valid, cache.length, tokens.shape[1])
        context = Context(*all_angles(self.config, positions), mask=mask, back=back)

        def body(layer: Layer, carry: tuple, data: PerLayer, context: Context) -> tuple:
            x, caches = carry
            attended, caches = layer.attend_cached(x, context.of_layer(data), caches)
            return layer.finish(x, attended), caches

        scan = nnx.scan(body, in_axes=(0, nnx.Carry, 0, None), out_axes=nnx.Carry)
        caches = Caches(cache.k, cache.v, jnp.int32(0), cache.length)
        start = (self.embed(tokens, positions, virtual), caches)
        x, caches = scan(self.layers, start, per_layer(self.config), context)
        # a full cache would overwrite its last slots: better no answer than a wrong one
        x = jnp.where(end <= cache.valid.shape[1], x, jnp.nan)
        return x, Cache(caches.k, caches.v, all_valid, end)

    def begin(self, cache: Cache, count: int) -> Cache:
        """Return an empty cache with the model's `count` virtual tokens in it."""
        batch, slots = cache.valid.shape
        number = jnp.arange(count, dtype=jnp.int32)
        if self.prompt is not None:
            virtual = jnp.broadcast_to(number[None], (batch, count))
            return self.decode(jnp.zeros_like(virtual), cache, virtual=virtual)[1]
        prefix = self.layers.self_attn.prefix
        assert prefix is not None

        def put(whole: Array, part: Array) -> Array:
            part = jnp.swapaxes(part, 1, 2)[:, None].astype(whole.dtype)
            part = jnp.broadcast_to(part, (part.shape[0], batch, *part.shape[2:]))
            return lax.dynamic_update_slice(whole, part, (0, 0, 0, 0, 0))

        valid = cache.valid | (jnp.arange(slots) < count)[None]
        k, v = put(cache.k, prefix.k[...]), put(cache.v, prefix.v[...])
        return Cache(k, v, valid, cache.length + jnp.int32(count))


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


def cache_distance(
    valid: Bool[Array, "batch slots"], start: Int[Array, ""], seq: int
) -> Int[Array, "batch seq slots"]:
    """Count how many tokens before each of `seq` new ones, from slot `start` on, a slot's one is.

    Padding between a prompt and its continuation does not count.
    """
    count = jnp.cumsum(valid, axis=-1, dtype=jnp.int32)
    queries = lax.dynamic_slice_in_dim(count, start, seq, axis=1)
    return queries[:, :, None] - count[:, None, :]


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
    named = policies.save_only_these_names(*kept[remat])
    return policies.save_from_both_policies(named, _is_kernel) if remat == "none" else named


def _is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether its results are those of cuDNN's attention, whose insides bear no names."""
    return primitive.name == KERNEL
