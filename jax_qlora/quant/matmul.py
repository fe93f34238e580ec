# SPDX-License-Identifier: Apache-2.0
"""Matmul against a frozen 4-bit kernel.

The kernel is dequantized in use: forward and backward each decode the packed codes again, so the
only residual of a matmul is what is stored anyway, and no gradient of the kernel exists (QLoRA,
equations 5 and 6). On a CPU the decoding goes tile by tile of rows, so that a tile stays in cache;
on an accelerator the kernel is decoded whole, in the operand's dtype, for its library matmul.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..typing import Array, Float
from .array import QuantizedArray, block_constants, dequantize_rows
from .blockwise import dequantize_planes

# decoded elements at once on a CPU, measured at 1024^2 to 4096^2 with 1 to 1024 rows of x: a kernel
# up to the first in one piece, a larger one in tiles of the second (8 MiB in float32)
_PIECE_ELEMENTS = 3 << 20
_TILE_ELEMENTS = 2 << 20


def accumulator(dtype: Any) -> Any:
    """The dtype that sums of products of `dtype` are taken in: float32, or wider if it is."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize > 4 else jnp.dtype(jnp.float32)


def dot(x: Array, y: Array, x_axis: int, y_axis: int, dtype: Any) -> Array:
    """Contracts one axis of each of two matrices, accumulating in float32 at least."""
    acc = accumulator(x.dtype)
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, preferred_element_type=acc).astype(dtype)


def quantized_matmul(
    x: Float[Array, "*lead m k"],
    q: QuantizedArray,
    *,
    transpose: bool = False,
    dtype: Any = None,
) -> Float[Array, "*lead m n"]:
    """`x @ W`, or `x @ W.T`, for a frozen quantized kernel; differentiable in `x` alone.

    Args:
        x: Left operand; its dtype is the compute dtype that the kernel is decoded to. `k` is the
            kernel's cols (rows if `transpose`), and lead axes are the kernel's own.
        q: Kernel of `rows x cols` per lead index.
        transpose: Contract the kernel's rows instead of its cols.
        dtype: dtype of the result, `x.dtype` by default. Sums are in float32.

    Returns:
        The product, `n` being the kernel's rows (cols if `transpose`).
    """
    matmul = functools.partial(_matmul, transpose, jnp.dtype(dtype or x.dtype))
    for _ in q.lead:
        matmul = jax.vmap(matmul)
    return matmul(x, q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(transpose: bool, dtype: Any, x: Array, q: QuantizedArray) -> Array:
    return _product(x, q, transpose, dtype)


def _matmul_fwd(transpose: bool, dtype: Any, x: Array, q: QuantizedArray):
    # a zero-size slice carries the dtype of x, whose values the backward does not need
    return _product(x, q, transpose, dtype), (q, x[:0])


def _matmul_bwd(transpose: bool, dtype: Any, residuals: Any, g: Array):
    q, like = residuals
    return _product(g.astype(like.dtype), q, not transpose, like.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.jit, static_argnums=(2, 3))  # kernels of equal shape are traced once
def _product(x: Array, q: QuantizedArray, transpose: bool, dtype: Any) -> Array:
    return lax.platform_dependent(
        x,
        q,
        cpu=functools.partial(_tiled, transpose=transpose, dtype=dtype),
        default=functools.partial(_whole, transpose=transpose, dtype=dtype),
    )


def _whole(x: Array, q: QuantizedArray, *, transpose: bool, dtype: Any) -> Array:
    w = dequantize_rows(q, x.dtype)
    return dot(x, w, 1, 0 if transpose else 1, dtype)


def _tiled(x: Array, q: QuantizedArray, *, transpose: bool, dtype: Any) -> Array:
    """One tile of rows at a time: decode, multiply, discard.

    Even and odd columns of the kernel are decoded and multiplied apart (`dequantize_planes`).
    """
    rows, cols, width = q.layout.rows, q.layout.cols, q.codes.shape[1]
    elements = 2 * width * rows
    tile = rows if elements <= _PIECE_ELEMENTS else max(1, _TILE_ELEMENTS // (2 * width))
    whole = rows // tile * tile
    absmax = block_constants(q)
    decode = functools.partial(
        dequantize_planes, format=q.format, block_size=q.block_size, dtype=x.dtype
    )
    acc = accumulator(x.dtype)

    def cut(a: Array) -> Array:
        return a[:whole].reshape(-1, tile, a.shape[1])

    tiles = (cut(q.codes), cut(absmax))
    rest = (q.codes[whole:], absmax[whole:])
    if not transpose:
        x = jnp.pad(x, ((0, 0), (0, 2 * width - cols)))
        even, odd = x[:, 0::2], x[:, 1::2]

        def multiply(codes: Array, absmax: Array) -> Array:
            w_even, w_odd = decode(codes, absmax)
            return (dot(even, w_even, 1, 1, acc) + dot(odd, w_odd, 1, 1, acc)).astype(dtype)

        if whole == tile:
            y = multiply(q.codes[:tile], absmax[:tile])
        else:
            _, y = lax.scan(lambda _, t: (None, multiply(*t)), None, tiles)
            y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], whole)
        return jnp.concatenate([y, multiply(*rest)], axis=1) if whole < rows else y

    def add(total: tuple[Array, Array], start: Array | int, codes: Array, absmax: Array) -> Any:
        w_even, w_odd = decode(codes, absmax)
        # sliced here: cutting x.T up beforehand makes the products a tenth slower
        part = lax.dynamic_slice_in_dim(x, start, codes.shape[0], axis=1)
        even, odd = total
        return even + dot(part, w_even, 1, 0, acc), odd + dot(part, w_odd, 1, 0, acc)

    zero = jnp.zeros((x.shape[0], width), acc)
    starts = jnp.arange(0, whole, tile, dtype=jnp.int32)
    total, _ = lax.scan(lambda t, c: (add(t, *c), None), (zero, zero), (starts, *tiles))
    if whole < rows:
        total = add(total, whole, *rest)
    return jnp.stack(total, axis=-1).reshape(x.shape[0], 2 * width)[:, :cols].astype(dtype)
