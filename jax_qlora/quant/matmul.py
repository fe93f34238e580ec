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

from .._compat import SLOW_VECTOR_MATRIX
from ..typing import Array, Float
from .array import QuantizedArray, block_constants, fetched
from .blockwise import dequantize_pairs, dequantize_planes

# decoded elements at once on a CPU, measured at 1024^2 to 4096^2 with 1 to 1024 rows of x: a kernel
# up to the first in one piece, a larger one in tiles of the second (two of 2 MiB in float32)
_PIECE_ELEMENTS = 3 << 20
_TILE_ELEMENTS = 1 << 20
_FEW_ROWS = 8  # of x: a product with so few is bound by memory, and runs on one core


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
    q = fetched(q)
    return lax.platform_dependent(
        x,
        q,
        cpu=functools.partial(_tiled, transpose=transpose, dtype=dtype),
        default=functools.partial(_whole, transpose=transpose, dtype=dtype),
    )


def _whole(x: Array, q: QuantizedArray, *, transpose: bool, dtype: Any) -> Array:
    # decoded when x is there, not before: one kernel at a time is dense, not a layer's worth
    x, q = lax.optimization_barrier((x, q))
    w = dequantize_pairs(
        q.codes, block_constants(q), format=q.format, block_size=q.block_size, dtype=x.dtype
    )
    return dot(x, w[:, : q.layout.cols], 1, 0 if transpose else 1, dtype)


def _tiled(x: Array, q: QuantizedArray, *, transpose: bool, dtype: Any) -> Array:
    """One tile of rows at a time: decode, multiply, discard.

    The columns are in the order of `dequantize_planes`, even before odd. In tiles, and for a few
    rows of x, the halves are products of their own, which run side by side; a small kernel is one
    matmul, which is less to compile.
    """
    rows, cols, width = q.layout.rows, q.layout.cols, q.codes.shape[1]
    tile = rows if 2 * width * rows <= _PIECE_ELEMENTS else max(1, _TILE_ELEMENTS // (2 * width))
    whole = rows // tile * tile
    absmax = lax.optimization_barrier(block_constants(q))  # once, not again in each plane
    acc = accumulator(x.dtype)
    apart = tile < rows or x.shape[0] <= _FEW_ROWS
    halves = ((0,), (1,)) if apart else ((0, 1),)
    if transpose and x.shape[0] == 1 and SLOW_VECTOR_MATRIX:
        return _tiled(jnp.pad(x, ((0, 1), (0, 0))), q, transpose=True, dtype=dtype)[:1]

    def decode(codes: Array, absmax: Array, planes: tuple[int, ...]) -> Array:
        values = dequantize_planes(
            codes, absmax, planes, format=q.format, block_size=q.block_size, dtype=x.dtype
        )
        return values.reshape(codes.shape[0], -1)

    def cut(a: Array) -> Array:
        return lax.slice_in_dim(a, 0, whole).reshape(-1, tile, a.shape[1])

    def rest(a: Array) -> Array:
        return lax.slice_in_dim(a, whole, rows)

    if not transpose:
        if cols < 2 * width:
            x = jnp.pad(x, ((0, 0), (0, 2 * width - cols)))
        pairs = lax.transpose(x.reshape(-1, width, 2), (0, 2, 1))
        parts = [
            lax.slice_in_dim(pairs, planes[0], planes[-1] + 1, axis=1).reshape(x.shape[0], -1)
            for planes in halves
        ]

        def multiply(codes: Array, absmax: Array) -> Array:
            products = [
                dot(part, decode(codes, absmax, planes), 1, 1, acc)
                for part, planes in zip(parts, halves, strict=True)
            ]
            return functools.reduce(lax.add, products).astype(dtype)

        if tile == rows:
            return multiply(q.codes, absmax)
        _, y = lax.scan(lambda _, t: (None, multiply(*t)), None, (cut(q.codes), cut(absmax)))
        y = lax.transpose(y, (1, 0, 2)).reshape(x.shape[0], whole)
        if whole == rows:
            return y
        return lax.concatenate([y, multiply(rest(q.codes), rest(absmax))], 1)

    def products(x: Array, codes: Array, absmax: Array) -> list[Array]:
        return [dot(x, decode(codes, absmax, planes), 1, 0, acc) for planes in halves]

    def add(totals: list[Array], start: Array | int, codes: Array, absmax: Array) -> list[Array]:
        # sliced here: cutting x.T up beforehand makes the products a tenth slower
        part = lax.dynamic_slice_in_dim(x, start, codes.shape[0], axis=1)
        return list(map(lax.add, totals, products(part, codes, absmax)))

    if tile == rows:
        totals = products(x, q.codes, absmax)
    else:
        totals = [jnp.zeros((x.shape[0], len(planes) * width), acc) for planes in halves]
        tiles = (jnp.arange(0, whole, tile, dtype=jnp.int32), cut(q.codes), cut(absmax))
        totals, _ = lax.scan(lambda t, c: (add(t, *c), None), totals, tiles)
        if whole < rows:
            totals = add(totals, whole, rest(q.codes), rest(absmax))
    pairs = totals[0] if len(totals) == 1 else lax.concatenate(totals, 1)
    y = lax.transpose(pairs.reshape(-1, 2, width), (0, 2, 1)).reshape(x.shape[0], 2 * width)
    return lax.slice_in_dim(y, 0, cols, axis=1).astype(dtype)
