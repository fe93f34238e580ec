# SPDX-License-Identifier: Apache-2.0
"""Blockwise absmax quantization to 4 bits and its packing: arrays in, arrays out, all XLA.

The last axis is cut into blocks of `block_size` elements; each block is divided by its largest
magnitude and rounded to the nearest of 16 levels. Bit-exact with bitsandbytes 0.50's CUDA kernels
(`kQuantizeBlockwise`, `kDequantizeBlockwise`): scaling multiplies by `float32(1/absmax)`, a tie
takes the lower level, an all-zero block has absmax 0 and the code of level 0.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..typing import Array, Float, Float32, UInt8
from .codebook import CODEBOOKS, DYNAMIC_BOUNDARIES, DYNAMIC_MAP

GROUP_SIZE = 256
_F32_MAX = float(np.finfo(np.float32).max)


def pad_to_multiple(x: Array, multiple: int) -> Array:
    """Pads the last axis of `x` with zeros to a multiple of `multiple`."""
    pad = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x


def _rank(scaled: Array, x: Array, boundaries: np.ndarray) -> Array:
    """How many of `boundaries` lie strictly below each scaled element: the nearest level's index.

    XLA flushes denormals to zero, so which side of the boundary 0 (between fp4's two zeros) a value
    lies on is read from the bits of the unscaled `x`.
    """
    positive = lax.bitcast_convert_type(x, jnp.int32) > 0
    below = [positive if b == 0 else scaled > jnp.float32(b) for b in boundaries]
    return functools.reduce(jnp.add, [b.astype(jnp.uint8) for b in below])


def reciprocal(absmax: Array) -> Array:
    """1 / absmax, and 0 where absmax is 0."""
    return jnp.where(absmax > 0, jnp.float32(1) / jnp.where(absmax > 0, absmax, 1), jnp.float32(0))


def pack_codes(codes: UInt8[Array, "*lead cols"]) -> UInt8[Array, "*lead packed"]:
    """Packs two 4-bit codes a byte, the first element in the high nibble.

    As a weighted sum, which a CPU does 3 times faster than shifting one half of the lanes.
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2).astype(jnp.int32)
    weights = lax.broadcast_in_dim(jnp.array([16, 1], jnp.int32), pairs.shape, (pairs.ndim - 1,))
    return jnp.sum(pairs * weights, axis=-1).astype(jnp.uint8)


def unpack_codes(packed: UInt8[Array, "*lead packed"]) -> UInt8[Array, "*lead cols"]:
    """Inverse of `pack_codes`."""
    pairs = jnp.stack([packed >> 4, packed & 0xF], axis=-1)
    return pairs.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def quantize_blockwise(
    x: Float[Array, "*lead cols"], *, format: str = "nf4", block_size: int = 64
) -> tuple[UInt8[Array, "*lead packed"], Float32[Array, "*lead blocks"]]:
    """Quantizes blocks along the last axis; a short last block is padded with zeros.

    Args:
        x: Values, any float dtype.
        format: "nf4", "fp4" or "int4".
        block_size: Elements that share a scale; even.

    Returns:
        Packed codes, and the largest magnitude of each block.
    """
    book = CODEBOOKS[format]
    x = pad_to_multiple(x.astype(jnp.float32), block_size)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = jnp.clip(blocks * reciprocal(absmax)[..., None], -1.0, 1.0)
    codes = _rank(scaled, blocks, book.boundaries)
    if not np.array_equal(book.order, np.arange(16)):  # fp4's levels are not in code order
        codes = jnp.asarray(book.order)[codes]
    return pack_codes(codes.reshape(x.shape)), absmax


def dequantize_blockwise(
    packed: UInt8[Array, "*lead packed"],
    absmax: Float32[Array, "*lead blocks"],
    *,
    format: str = "nf4",
    block_size: int = 64,
    dtype: Any = jnp.float32,
) -> Float[Array, "*lead cols"]:
    """`level[code] * absmax` in float32, then cast; the padding of a short last block is kept."""
    settings: dict[str, Any] = dict(format=format, block_size=block_size, dtype=dtype)

    def by_planes(packed: Array, absmax: Array) -> Array:
        rows = (math.prod(packed.shape[:-1]), -1)
        planes = dequantize_planes(packed.reshape(rows), absmax.reshape(rows), **settings)
        pairs = jnp.stack([planes[:, 0], planes[:, 1]], axis=-1)
        return pairs.reshape(*packed.shape[:-1], packed.shape[-1] * 2)

    by_pairs = functools.partial(dequantize_pairs, **settings)
    return lax.platform_dependent(packed, absmax, cpu=by_planes, default=by_pairs)


def dequantize_pairs(
    packed: UInt8[Array, "*lead packed"],
    absmax: Float32[Array, "*lead blocks"],
    *,
    format: str = "nf4",
    block_size: int = 64,
    dtype: Any = jnp.float32,
) -> Float[Array, "*lead cols"]:
    """`dequantize_blockwise` for an accelerator: one look-up a byte, one fused kernel in all."""
    values = _look_up(jnp.asarray(pair_table(format)), packed)  # [..., packed, 2]: both of a byte
    blocks = values.reshape(*absmax.shape, block_size)
    out = (blocks * lax.expand_dims(absmax, (absmax.ndim,))).astype(dtype)
    return out.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def pair_table(format: str) -> Float32[np.ndarray, "256 2"]:
    """The two levels that each packed byte stands for."""
    levels = CODEBOOKS[format].levels
    byte = np.arange(256)
    return np.stack([levels[byte >> 4], levels[byte & 0xF]], axis=-1)


def dequantize_planes(
    packed: UInt8[Array, "rows packed"],
    absmax: Float32[Array, "rows blocks"],
    planes: tuple[int, ...] = (0, 1),
    *,
    format: str = "nf4",
    block_size: int = 64,
    dtype: Any = jnp.float32,
) -> Float[Array, "rows planes packed"]:
    """The even (0) and the odd (1) columns of `dequantize_blockwise`, for a matmul on a CPU.

    Kept apart they are looked up and scaled as fast as memory goes; interleaving the two nibbles
    of each byte, as `dequantize_blockwise` does, is scalar code and 3 times slower.
    """
    rows, blocks = absmax.shape
    shape = (rows, len(planes), packed.shape[1])
    table = pair_table(format).T[list(planes)].reshape(-1)
    index = lax.broadcast_in_dim(packed.astype(jnp.uint16), shape, (0, 2))
    if len(planes) > 1:
        # held until absmax is there: ahead of a loop over layers XLA would make a whole array of it
        place = jnp.arange(len(planes), dtype=jnp.uint16) * jnp.uint16(256)
        absmax, place = lax.optimization_barrier((absmax, place))
        index = index + lax.broadcast_in_dim(place, shape, (1,))
    scale = lax.broadcast_in_dim(absmax, (rows, blocks, block_size // 2), (0, 1))
    scale = lax.broadcast_in_dim(scale.reshape(packed.shape), shape, (0, 2))
    return (_look_up(jnp.asarray(table), index) * scale).astype(dtype)


def _look_up(table: Array, index: Array) -> Array:
    """`table[index]` for indices that are in bounds; less to trace than jax's indexing."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + table.ndim - 1)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    index = lax.expand_dims(index.astype(jnp.int32), (index.ndim,))
    return lax.gather(table, index, numbers, (1, *table.shape[1:]), mode="promise_in_bounds")


def quantize_absmax(
    absmax: Float32[Array, " blocks"], *, group_size: int = GROUP_SIZE
) -> tuple[UInt8[Array, " blocks"], Float32[Array, " groups"], Float32[Array, ""]]:
    """Double quantization (QLoRA section 3): 8-bit codes for the block constants of one tensor.

    The mean is subtracted, then groups of `group_size` are scaled by their largest magnitude and
    rounded to the signed dynamic map. Where block scales differ a lot, a restored absmax may come
    out slightly negative: that is the reference's behavior too.

    Returns:
        Codes, the scale of each group, and the mean that was subtracted.
    """
    offset = jnp.mean(absmax)
    residual = pad_to_multiple(absmax - offset, group_size)
    groups = residual.reshape(-1, group_size)
    scale = jnp.max(jnp.abs(groups), axis=-1)
    scaled = jnp.clip(groups * reciprocal(scale)[:, None], -1.0, 1.0)
    codes = jnp.searchsorted(jnp.asarray(DYNAMIC_BOUNDARIES), scaled, side="left")
    return codes.astype(jnp.uint8).reshape(-1)[: absmax.shape[0]], scale, offset


def dequantize_absmax(
    codes: UInt8[Array, " blocks"],
    scale: Float32[Array, " groups"],
    offset: Float32[Array, ""],
    *,
    group_size: int = GROUP_SIZE,
) -> Float32[Array, " blocks"]:
    """Inverse of `quantize_absmax` up to its rounding: `map[code] * scale + offset`."""
    spread = lax.broadcast_in_dim(scale, (*scale.shape, group_size), (0,)).reshape(-1)
    values = _look_up(jnp.asarray(DYNAMIC_MAP), codes)
    # the clip changes no finite value; it keeps the compiler from fusing multiply and add into one
    # rounding, so that the result is the reference's to the bit
    scaled = values * lax.slice_in_dim(spread, 0, codes.shape[0])
    return lax.clamp(jnp.float32(-_F32_MAX), scaled, jnp.float32(_F32_MAX)) + offset
