# SPDX-License-Identifier: Apache-2.0
"""The decoder's only matmul: operands in the compute dtype, sums in float32, both ways."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..typing import Array, Float


def matmul(
    x: Float[Array, "*batch m k"], y: Float[Array, "*batch _ _"], *, y_axis: int = -2
) -> Float[Array, "*batch m n"]:
    """Contract the last axis of `x` with one axis of `y`, accumulating in float32.

    With operands in half precision, plain autodiff would multiply the float32 cotangent by a
    half-precision operand, which XLA does by widening the operand: a float32 matmul. Here the
    cotangent is cast to the operands' dtype first, so that the backward is as fast as the forward.

    Args:
        x: Left operand.
        y: Right operand of the same dtype: `[*batch, k, n]`, or `[*batch, n, k]` with `y_axis=-1`.
        y_axis: The contracted axis of `y`, -2 or -1.

    Returns:
        The product in float32.
    """
    if x.dtype == jnp.float32:
        return _dot(x, y, -1, y_axis)
    return _half_dot(x, y, -1, y_axis)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """`[*batch, free axis of x, free axis of y]` in float32."""
    batch = tuple(range(x.ndim - 2))
    contract = ((x.ndim + x_axis,), (y.ndim + y_axis,))
    return lax.dot_general(x, y, (contract, (batch, batch)), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _half_dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return _dot(x, y, x_axis, y_axis)


def _half_dot_fwd(x: Array, y: Array, x_axis: int, y_axis: int) -> tuple[Array, tuple]:
    return _dot(x, y, x_axis, y_axis), (x, y)


def _half_dot_bwd(x_axis: int, y_axis: int, residuals: tuple, ct: Array) -> tuple[Array, Array]:
    x, y = residuals
    ct = ct.astype(x.dtype)
    x_free, y_free = -3 - x_axis, -3 - y_axis
    # x is [free, contracted] or its transpose, and so is its cotangent; the same for y
    dx = _dot(ct, y, -1, y_free) if x_axis == -1 else _dot(y, ct, y_free, -1)
    dy = _dot(ct, x, -2, x_free) if y_axis == -1 else _dot(x, ct, x_free, -2)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_half_dot.defvjp(_half_dot_fwd, _half_dot_bwd)
