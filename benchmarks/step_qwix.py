# SPDX-License-Identifier: Apache-2.0
"""The Qwix side of train_step.py: a Llama in Flax NNX, as Qwix's users write it; needs qwix."""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from worker import Runs, serve, side_arguments


class Layer(nnx.Module):
    """One pre-norm layer. Qwix looks for the module that calls under the name `self`."""

    def __init__(self, args: argparse.Namespace, rngs: nnx.Rngs):
        dtype, d, ff = jnp.dtype(args.dtype), args.hidden, args.intermediate
        self.head_dim = d // args.heads
        kv = args.kv_heads * self.head_dim

        def linear(d_in: int, d_out: int) -> nnx.Linear:
            kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)
            return nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs, **kinds)

        self.input_norm = nnx.RMSNorm(d, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(d, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj = linear(d, d), linear(d, kv), linear(d, kv)
        self.o_proj = linear(d, d)
        self.gate_proj, self.up_proj, self.down_proj = linear(d, ff), linear(d, ff), linear(ff, d)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Add attention and the MLP to the residual stream."""
        heads = (*x.shape[:2], -1, self.head_dim)
        normed = self.input_norm(x)
        q = rotate(self.q_proj(normed).reshape(heads), cos, sin)
        k = rotate(self.k_proj(normed).reshape(heads), cos, sin)
        v = self.v_proj(normed).reshape(heads)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.reshape(x.shape))
        normed = self.mlp_norm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Llama(nnx.Module):
    """Token ids to logits."""

    def __init__(self, args: argparse.Namespace, rngs: nnx.Rngs):
        dtype = jnp.dtype(args.dtype)
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.remat = args.remat == "full"
        self.embed = nnx.Embed(args.vocab, args.hidden, **kinds)
        self.layers = nnx.List([Layer(args, rngs) for _ in range(args.layers)])
        self.norm = nnx.RMSNorm(args.hidden, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(args.hidden, args.vocab, use_bias=False, **kinds)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Score every next token."""
        x = self.embed(tokens)
        half = self.layers[0].head_dim // 2
        rates = 1e4 ** (-jnp.arange(half) / half)
        angles = jnp.arange(tokens.shape[1])[:, None, None] * rates
        cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
        call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        for layer in self.layers:
            x = call(layer, x, cos, sin)
        return self.head(self.norm(x))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions, halves of a head paired."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def build(args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """The step, and what there is to say about the model."""
    tokens = jax.random.randint(jax.random.key(0), (args.batch, args.seq), 0, args.vocab)
    provider = qwix.LoraProvider(
        module_path=".*_proj",
        rank=args.rank,
        alpha=2 * args.rank,
        weight_qtype="nf4",
        tile_size=64,
    )
    base = Llama(args, nnx.Rngs(0))
    model = qwix.apply_lora_to_model(base, provider, tokens, rngs=nnx.Rngs(1))
    del base
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4, weight_decay=0.0), wrt=nnx.LoRAParam)

    @nnx.jit
    def update(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        def loss(model: Llama) -> jax.Array:
            logits = model(tokens)[:, :-1].astype(jnp.float32)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return nll.mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    trainable = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    runs: Runs = {"step": lambda: float(update(model, optimizer, tokens))}
    return runs, {"qwix": qwix.__version__, "jax": jax.__version__, "trainable": trainable}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    sys.exit(serve(build, side_arguments(parser)))
