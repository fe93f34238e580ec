# SPDX-License-Identifier: Apache-2.0
"""Linear, the norms and Embed as Flax NNX modules that keep parameters and compute dtypes apart."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ..typing import Array, Float, Int
from .matmul import matmul

LINEAR_OUTPUT = "linear_output"
"""Name of every linear's output, for the rematerialization policy that saves exactly those."""


def economical(f: Callable[..., Array]) -> Callable[..., Array]:
    """Keeps only the inputs of `f` for the backward, which computes the rest again.

    For what costs little beside the matmuls: as a fused kernel would, whatever the remat setting.
    Leading arguments that are Python numbers stay so.
    """

    def wrapped(*args: Any) -> Array:
        static = tuple(a for a in args if isinstance(a, float | int))
        arrays = args[len(static) :]
        # inside a scan nothing can be shared between forward and backward anyway
        return jax.checkpoint(functools.partial(f, *static), prevent_cse=False)(*arrays)

    return functools.wraps(f)(wrapped)


def in_chunks(
    f: Callable[[Array], Array], rows: Float[Array, "rows d"], chunk: int
) -> Float[Array, "rows _"]:
    """Applies `f` to at most `chunk` rows at a time, so what it computes in between is never whole.

    The backward computes each chunk again.
    """
    count = rows.shape[0]
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)
    rows = jnp.pad(rows, ((0, chunks * chunk - count), (0, 0)))
    # inside a scan nothing can be shared between forward and backward anyway
    once = jax.checkpoint(f, prevent_cse=False)
    y = jax.lax.map(once, rows.reshape(chunks, chunk, -1))
    return y.reshape(chunks * chunk, -1)[:count]


class Linear(nnx.Module):
    """`x @ kernel + bias`, computed in one dtype whatever the dtype of the parameters.

    Attributes:
        kernel: `[d_in, d_out]`.
        bias: `[d_out]`, or None.
        dtype: dtype of the operands and of the result; sums are in float32.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out)) * d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((d_out,))) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*lead d_in"]) -> Float[Array, "*lead d_out"]:
        """Apply the linear to the last axis of `x`."""
        # two dimensions: XLA's matmuls of higher rank are slower, above all in the backward
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = matmul(rows, self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None]
        y = y.astype(self.dtype).reshape(*x.shape[:-1], y.shape[-1])
        return checkpoint_name(y, LINEAR_OUTPUT)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis, in float32, times a learned scale.

    Attributes:
        scale: `[d]`.
        eps: Added to the mean square.
        offset: What is added to `scale`: 1.0 where it is learned as a deviation from 1 (Gemma).

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """

    def __init__(self, d: int, *, eps: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full((d,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        """Normalize `x`; the result has the dtype of `x`."""
        return _rms_norm(self.eps, self.offset, x, self.scale[...])


@economical
def _rms_norm(eps: float, offset: float, x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32) + offset, range(x.ndim - 1))
    return (normed * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean zero and variance one over the last axis, in float32, times a scale, plus a bias.

    Attributes:
        scale: `[d]`.
        bias: `[d]`.
        eps: Added to the variance.

    References:
        Ba et al., Layer Normalization (arXiv 1607.06450).
    """

    def __init__(self, d: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((d,)))
        self.bias = nnx.Param(jnp.zeros((d,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        """Normalize `x`; the result has the dtype of `x`."""
        return _layer_norm(self.eps, x, self.scale[...], self.bias[...])


@economical
def _layer_norm(eps: float, x: Array, scale: Array, bias: Array) -> Array:
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(variance + eps)
    scale, bias = (jnp.expand_dims(p.astype(jnp.float32), range(x.ndim - 1)) for p in (scale, bias))
    return (normed * scale + bias).astype(x.dtype)


@economical
def swiglu(gate: Float[Array, "rows d_ff"], up: Float[Array, "rows d_ff"]) -> Array:
    """`silu(gate) * up` (Shazeer, arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


@economical
def geglu(gate: Float[Array, "rows d_ff"], up: Float[Array, "rows d_ff"]) -> Array:
    """`gelu(gate) * up`, GELU in its tanh form (Shazeer, arXiv 2002.05202)."""
    return jax.nn.gelu(gate, approximate=True) * up


GATED = {"silu": swiglu, "gelu_tanh": geglu}
"""The gated units by the name of their activation."""

UNGATED = {
    "silu": economical(jax.nn.silu),
    "gelu_tanh": economical(functools.partial(jax.nn.gelu, approximate=True)),
}
"""The activations of MLPs without a gate."""


class Embed(nnx.Module):
    """A row of the table for each token; also the output head of a model that ties the two.

    Attributes:
        embedding: `[vocab, d]`.
        dtype: dtype of the result, and of the operands of `attend`.
        scale: What a row that is looked up is multiplied by, rounded to `dtype`, as
            `transformers` does it.
    """

    def __init__(self, vocab: int, d: int, *, dtype: DTypeLike, rngs: nnx.Rngs, scale: float = 1.0):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab, d)) * 0.02)
        self.dtype = dtype
        self.scale = scale

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq d"]:
        """Look tokens up; one outside the vocabulary gives NaN, not some other token's row."""
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill").astype(self.dtype)
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, self.dtype)

    def attend(self, x: Float[Array, "rows d"]) -> Float[Array, "rows vocab"]:
        """Score each row against every token: logits in float32."""
        table = self.embedding[...].astype(self.dtype)
        return matmul(x.astype(self.dtype), table, y_axis=-1)
