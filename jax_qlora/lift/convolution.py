# SPDX-License-Identifier: Apache-2.0
"""Convolutions with a weight that is quantized, adapted, or both.

A kernel in 4 bits is decoded in use, forward and backward, as in a matmul. The update goes as two
thin convolutions: `a` has the window of the kernel and `rank` output channels, `b` a window of one.
`b @ a` is never formed.

A kernel in groups folds to `[out, window * in / groups]` like any other, so all groups share `a`,
and the update is a kernel in groups that can be merged.

References:
    LoRA, section 4.1, for a matrix; `_ConvNd` in `tuners/lora/layer.py` of peft 0.21, whose update
    is the same without groups and dilation. In groups it sees all input channels and cannot be
    merged; the dilation it does not apply.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._compat import JaxprEqn, aval_of, bind_eqn
from ..lora.array import LoraArray, dropped
from ..lora.dora import row_factors
from ..lora.pair import LoraPair
from ..quant import QuantizedArray, dequantize
from ..quant.layout import KernelLayout
from ..quant.matmul import accumulator
from ..typing import Array
from .views import View
from .weight import Weight


class Window(NamedTuple):
    """All of a convolution but its operands, named as in `lax.conv_general_dilated`."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    precision: Any

    def __call__(self, x: Array, kernel: Array, dtype: Any = None) -> Array:
        """The convolution, with a result in `dtype`, by default that of `x`."""
        return lax.conv_general_dilated(
            x, kernel, **self._asdict(), preferred_element_type=dtype or x.dtype
        )


def convolution(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    """The rule of `conv_general_dilated`; None where the weight is not the kernel as it is held."""
    x, weight = values
    if not isinstance(weight, Weight) or isinstance(x, Weight):
        return None
    leaf: Any = weight.leaf
    params, view, layout = eqn.params, weight.view, leaf.layout
    window = Window(*(params[name] for name in Window._fields))
    out, *rest = window.dimension_numbers.rhs_spec
    as_held = (
        params["batch_group_count"] == 1
        and not view.lead(layout)
        and view.wide([out]) == view.parts(layout.out_axes)
        and tuple(sorted(view.wide(rest))) == view.parts(layout.in_axes)
    )
    base: Any = leaf.base if isinstance(leaf, LoraArray) else leaf
    if not as_held or not isinstance(leaf, LoraArray | QuantizedArray):
        return None
    dtype = aval_of(eqn.outvars[0]).dtype
    if isinstance(base, QuantizedArray):
        y: Any = _frozen(window, view, tuple(x.shape), dtype, x, base)
    else:  # a dense base: the very equation the model wrote
        y = bind_eqn(eqn, [x, view.apply(base)])[0]
    if isinstance(leaf, LoraArray):
        pair = leaf.pair
        y = y + _update(window, view, dtype, dropped(x, pair.dropout, leaf.dropout_key), pair)
        if pair.magnitude is not None:
            shape = [1] * y.ndim
            shape[window.dimension_numbers.out_spec[1]] = layout.rows
            y = (y.astype(jnp.float32) * row_factors(base, pair).reshape(shape)).astype(dtype)
    return [y]


# --- the frozen kernel -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _frozen(
    window: Window, view: View, shape: tuple[int, ...], dtype: Any, x: Array, q: QuantizedArray
) -> Array:
    return _product(window, view, None, dtype, x, q)


def _frozen_fwd(window: Window, view: View, shape: tuple[int, ...], dtype: Any, x: Array, q: Any):
    # a zero-size slice carries the dtype of x, whose values the backward does not need
    return _product(window, view, None, dtype, x, q), (q, x[:0])


def _frozen_bwd(
    window: Window, view: View, shape: tuple[int, ...], dtype: Any, residuals: Any, g: Array
):
    q, like = residuals
    return _product(window, view, shape, like.dtype, g.astype(like.dtype), q), None


_frozen.defvjp(_frozen_fwd, _frozen_bwd)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # equal convolutions are traced once
def _product(
    window: Window, view: View, shape: tuple[int, ...] | None, dtype: Any, x: Array, q: Any
) -> Array:
    """The convolution of `x`, or of a cotangent with the transpose, to an input of `shape`."""
    x, q = lax.optimization_barrier((x, q))  # decoded when x is there, as in a matmul
    kernel = view.apply(dequantize(q, x.dtype)).astype(x.dtype)
    if shape is None:
        return window(x, kernel, dtype)
    return _transposed(lambda y: window(y, kernel), jax.ShapeDtypeStruct(shape, dtype), x)


def _transposed(linear: Any, like: Any, g: Array) -> Array:
    (found,) = jax.linear_transpose(linear, like)(g)
    return found


# --- the update ------------------------------------------------------------------------------


def _update(window: Window, view: View, dtype: Any, x: Array, pair: LoraPair) -> Array:
    """The update's share, `scale * conv(conv(x, a), b)`."""
    numbers, groups = window.dimension_numbers, window.feature_group_count
    out, channels, *space = numbers.rhs_spec
    a = _kernel_of(pair.a * jnp.asarray(pair.scale, pair.a.dtype), pair.layout, view, out)
    h = _thin(window, x.dtype, x, jnp.concatenate([a] * groups, axis=out))
    shape = [1] * (2 + len(space))
    shape[out], shape[channels] = pair.b.shape
    b = (pair.b if out < channels else pair.b.T).reshape(shape)
    ones = (1,) * len(space)
    point = Window(
        window_strides=ones,
        padding=((0, 0),) * len(space),
        lhs_dilation=ones,
        rhs_dilation=ones,
        dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec),
        feature_group_count=groups,
        precision=window.precision,
    )
    return _thin(point, dtype, h, b)


def _kernel_of(rows: Array, layout: KernelLayout, view: View, out: int) -> Array:
    """Rows `[n, cols]` as a kernel of n output channels, its dimensions those of the value."""

    def single(axis: int, size: int) -> int:
        return 1 if axis in layout.out_axes else size

    kernel = range(-len(layout.shape), 0)
    one = KernelLayout(tuple(map(single, kernel, layout.shape)), layout.in_axes)
    thin = dataclasses.replace(
        view, leaf_shape=tuple(map(single, view.origin, view.leaf_shape)), dtype=rows.dtype
    )
    each = jax.vmap(lambda row: thin.apply(one.from_rows(row[None])), out_axes=out)(rows)
    return jnp.squeeze(each, out + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _thin(window: Window, dtype: Any, x: Array, kernel: Array) -> Array:
    """A convolution in the dtype of `x` with a float32 kernel that trains."""
    return window(x, kernel.astype(x.dtype), dtype)


def _thin_fwd(window: Window, dtype: Any, x: Array, kernel: Array):
    return window(x, kernel.astype(x.dtype), dtype), (x, kernel)


def _thin_bwd(window: Window, dtype: Any, residuals: Any, g: Array):
    # the cotangent meets the kernel in the compute dtype; the kernel's gradient, which is small, is
    # taken and kept in float32
    x, kernel = residuals
    g, wide = g.astype(x.dtype), accumulator(x.dtype)
    dx = _transposed(lambda y: window(y, kernel.astype(y.dtype)), x, g)
    like = jax.ShapeDtypeStruct(kernel.shape, wide)
    dk = _transposed(lambda k: window(x.astype(wide), k), like, g.astype(wide))
    return dx, dk.astype(kernel.dtype)


_thin.defvjp(_thin_fwd, _thin_bwd)
