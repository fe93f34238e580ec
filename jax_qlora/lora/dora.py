# SPDX-License-Identifier: Apache-2.0
"""DoRA: the update turns each output row of a kernel, a trained magnitude gives its length.

`W' = m * (W + s b a) / ||W + s b a||`, one magnitude and one norm for each output row (Liu et al.,
arXiv 2402.09353, equation 5). The norm has no gradient (section 4.3), as in PEFT.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..quant import QuantizedArray
from ..quant.array import block_constants, fetched
from ..quant.blockwise import dequantize_blockwise
from ..typing import Array, Float
from .pair import LoraPair

_TILE_ELEMENTS = 1 << 20  # of a kernel, decoded and summed with the update at once


def row_norms(base: Any, pair: LoraPair) -> Float[Array, "*lead rows"]:
    """The norm of each output row of a kernel with its update, in float32; it has no gradient.

    Goes tile by tile of rows, so neither a decoded kernel nor the dense update exists as a whole.

    Args:
        base: Array or QuantizedArray, the kernel without its update.
        pair: The update.
    """
    cols, tile = pair.layout.cols, max(1, _TILE_ELEMENTS // pair.layout.cols)

    def decode(codes: Array, absmax: Array) -> Array:
        settings = dict(format=base.format, block_size=base.block_size)
        return dequantize_blockwise(codes, absmax, **settings)[..., :cols]

    def one(item: tuple[Any, Array, Array]) -> Array:
        kernel, a, b = item
        if isinstance(kernel, QuantizedArray):
            kernel = fetched(kernel)
            rows = (kernel.codes, block_constants(kernel))
        else:
            rows = (pair.layout.to_rows(kernel),)

        def norm(row: tuple[Array, ...]) -> Array:
            *parts, b = row
            w = decode(*parts) if len(parts) == 2 else parts[0].astype(jnp.float32)
            update = jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
            return jnp.sqrt(jnp.sum(jnp.square(w + pair.scale * update)))

        return lax.map(norm, (*rows, b), batch_size=min(tile, pair.layout.rows))

    each: Any = one
    for _ in pair.lead:  # one layer or expert at a time
        each = functools.partial(lax.map, each)
    a, b = (x.astype(jnp.float32) for x in (pair.a, pair.b))
    return each(lax.stop_gradient((base, a, b)))


def row_factors(base: Any, pair: LoraPair) -> Float[Array, "*lead rows"]:
    """What each output row of a kernel with its update is multiplied by: magnitude over norm.

    A row of zeros stays zero.

    Args:
        base: Array or QuantizedArray, the kernel without its update.
        pair: The update, with a magnitude.
    """
    assert pair.magnitude is not None
    norms = row_norms(base, pair)
    return pair.magnitude / jnp.where(norms > 0, norms, 1.0)
