# SPDX-License-Identifier: Apache-2.0
"""LoraArray, a kernel with its update as one value, and the arithmetic of the update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..quant import QuantizedArray, dequantize
from ..quant.array import lookup_rows
from ..quant.layout import KernelLayout
from ..quant.matmul import dot
from ..tree import pytree
from ..typing import Array, Float
from .dora import row_factors
from .factors import Rows, from_inner, gradient_of_b, to_inner
from .over_base import OverBase
from .pair import LoraPair
from .tokens import TokenArray, replace_rows


@pytree()
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LoraArray(OverBase):
    """A frozen kernel and its low-rank update, as one value: `base + scale * (b @ a)`.

    With DoRA the rows of that sum are rescaled to `pair.magnitude`; see `lora.dora`.

    `attach` makes it and `lift` computes with it; the dense sum exists only on `materialize`.

    Attributes:
        base: Array or QuantizedArray of the kernel's shape.
        pair: The update.
        dropout_key: One random key for each lead index, or None for no dropout (evaluation).
    """

    base: Any
    pair: LoraPair
    dropout_key: Any

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading layer and expert axes."""
        return self.pair.lead

    @property
    def layout(self) -> KernelLayout:
        """Which trailing axes of the kernel are contracted."""
        return self.pair.layout

    def __repr__(self) -> str:
        dense = hasattr(self.base, "shape") and not isinstance(self.base, QuantizedArray)
        base = f"{self.dtype} {self.shape}" if dense else repr(self.base)
        return f"LoraArray({base}, {self.pair!r})"


def is_special(x: Any) -> bool:
    """Whether `x` stands for a dense array without being one."""
    return isinstance(x, QuantizedArray | LoraArray | TokenArray)


def materialize(x: Any, dtype: Any = None) -> Array:
    """The dense array that `x` stands for; sums of base and update are taken in float32.

    Args:
        x: Array, QuantizedArray, LoraArray or TokenArray.
        dtype: dtype of the result, `x.dtype` by default.
    """
    dtype = dtype or x.dtype
    if isinstance(x, LoraArray):
        total = materialize(x.base, jnp.float32) + x.pair.delta()
        if x.pair.magnitude is not None:
            factors = row_factors(x.base, x.pair)
            total = x.layout.from_rows(x.layout.to_rows(total) * factors[..., None])
        return total.astype(dtype)
    if isinstance(x, TokenArray):
        rows = x.layout.to_rows(materialize(x.base, dtype))
        places = jnp.asarray(x.tokens.indices, jnp.int32)
        return x.layout.from_rows(rows.at[places].set(x.tokens.rows.astype(dtype)))
    if isinstance(x, QuantizedArray):
        return dequantize(x, dtype)
    return jnp.asarray(x).astype(dtype)


def lora_matmul(
    x: Float[Array, "*lead m k"],
    pair: LoraPair,
    *,
    dropout_key: Any = None,
    transpose: bool = False,
    dtype: Any = None,
) -> Float[Array, "*lead m n"]:
    """The update's share of a matmul, `scale * (dropout(x) a^T) b^T`; never forms `b @ a`.

    Args:
        x: Left operand; its dtype is the compute dtype, sums are in float32.
        pair: The update. Its gradients are float32.
        dropout_key: Keys of shape `lead`, or None for no dropout.
        transpose: Contract the kernel's rows instead of its cols.
        dtype: dtype of the result, `x.dtype` by default.
    """
    rows = Rows(pair.layout.rows, pair.parts)

    def one(x: Array, a: Array, b: Array, key: Any = None) -> Array:
        x = dropped(x, pair.dropout, key)
        return _update(transpose, pair.scale, jnp.dtype(dtype or x.dtype), rows, x, a, b)

    args = [x, pair.a, pair.b]
    if dropout_key is not None and pair.dropout > 0:
        args.append(dropout_key)
    f = one
    for _ in pair.lead:
        f = jax.vmap(f)
    return f(*args)


def dropped(x: Array, dropout: float, key: Any) -> Array:
    """The input of an update in training: some values zero, the others scaled up.

    Args:
        x: The input.
        dropout: Probability of zeroing a value.
        key: Random key, or None for no dropout.
    """
    if key is None or dropout == 0:
        return x
    keep = 1.0 - dropout
    mask = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _update(
    transpose: bool, scale: float, dtype: Any, rows: Rows, x: Array, a: Array, b: Array
) -> Array:
    return _update_fwd(transpose, scale, dtype, rows, x, a, b)[0]


def _update_fwd(
    transpose: bool, scale: float, dtype: Any, rows: Rows, x: Array, a: Array, b: Array
):
    if transpose:
        h = to_inner(x, _scaled(b, scale, x.dtype), rows)
        return dot(h, a.astype(x.dtype), 1, 0, dtype), (x, h, a, b)
    h = dot(x, _scaled(a, scale, x.dtype), 1, 1, x.dtype)
    return from_inner(h, b.astype(x.dtype), rows, dtype), (x, h, a, b)


def _update_bwd(transpose: bool, scale: float, dtype: Any, rows: Rows, residuals: Any, g: Array):
    # operands stay in the compute dtype (a float32 cotangent times a bfloat16 weight would widen
    # the whole matmul); the gradients of the factors are summed and kept in float32
    x, h, a, b = residuals
    g = g.astype(x.dtype)
    if transpose:
        gh = dot(g, _scaled(a, scale, x.dtype), 1, 1, x.dtype)
        dx = from_inner(gh, b.astype(x.dtype), rows, x.dtype)
        return dx, dot(h, g, 0, 0, a.dtype), gradient_of_b(gh, x, rows).astype(b.dtype)
    gh = to_inner(g, _scaled(b, scale, x.dtype), rows)
    dx = dot(gh, a.astype(x.dtype), 1, 0, x.dtype)
    return dx, dot(gh, x, 0, 0, a.dtype), gradient_of_b(h, g, rows).astype(b.dtype)


_update.defvjp(_update_fwd, _update_bwd)


def _scaled(factor: Array, scale: float, dtype: Any) -> Array:
    """A factor times the scale, for a matmul: one pass with the cast, and none over activations."""
    return (factor * jnp.asarray(scale, factor.dtype)).astype(dtype)


def lookup(leaf: Any, indices: Array, dtype: Any) -> Array:
    """Rows of a kernel, `leaf.rows[indices]`, decoding only those rows.

    Args:
        leaf: QuantizedArray, LoraArray or TokenArray without lead axes, whose rows are the
            vocabulary.
        indices: Row numbers, any shape, in range.
        dtype: dtype of the result.

    Returns:
        `[*indices.shape, cols]`.
    """
    if isinstance(leaf, QuantizedArray):
        return lookup_rows(leaf, indices, dtype)
    if isinstance(leaf, TokenArray):
        found = frozen_rows(leaf.base, leaf.layout, indices, dtype)
        return replace_rows(leaf.tokens, found, indices)
    base, pair = leaf.base, leaf.pair.whole()
    magnitude = pair.magnitude
    exact = dtype if magnitude is None else jnp.float32
    rows = frozen_rows(base, leaf.layout, indices, exact)
    update = jnp.matmul(pair.b[indices], pair.a) * pair.scale
    if magnitude is None:
        return rows + update.astype(dtype)
    total = rows + update
    norms = jax.lax.stop_gradient(jnp.linalg.norm(total, axis=-1))
    factors = magnitude[indices] / jnp.where(norms > 0, norms, 1.0)
    return (total * factors[..., None]).astype(dtype)


def frozen_rows(base: Any, layout: KernelLayout, indices: Array, dtype: Any) -> Array:
    """Rows of an array or QuantizedArray, decoding only those."""
    if isinstance(base, QuantizedArray):
        return lookup_rows(base, indices, dtype)
    return layout.to_rows(base)[indices].astype(dtype)
