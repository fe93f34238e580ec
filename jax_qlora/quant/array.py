# SPDX-License-Identifier: Apache-2.0
"""QuantizedArray: a kernel held as packed 4-bit codes and block constants, as a pytree."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..tree import pytree
from ..typing import Array, Float, Shaped, UInt8
from .blockwise import (
    GROUP_SIZE,
    dequantize_absmax,
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)
from .codebook import FORMATS
from .layout import KernelLayout, make_layout

BLOCK_SIZES = (32, 64, 128, 256)


@pytree(static=("layout", "format", "block_size", "group_size", "dtype_name", "streamed"))
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class QuantizedArray:
    """A kernel `[*lead, *layout.shape]` in 4 bits.

    The following holds, and `quantize_array`, `quantize_rows` and `from_parts` see to it:

    - `codes.shape == (*lead, rows, packed)`, the first element of a pair in the high nibble, rows
      padded with zeros to whole blocks;
    - without double quantization `absmax` is float32 `(*lead, rows, blocks)`, the other two None;
    - with it `absmax` is uint8 of that shape, `absmax_scale` float32 `(*lead, groups)` over the
      flattened blocks of a kernel, `absmax_offset` float32 `lead`.

    Every child has the lead axes first, so `lax.scan`, `jax.vmap`, `jax.tree.map(lambda x: x[i])`
    and sharding slice layers and experts, and each slice is complete in itself.

    Attributes:
        layout: Which trailing axes of the kernel are contracted.
        format: "nf4", "fp4" or "int4".
        block_size: Elements that share one `absmax`, along a row.
        group_size: Blocks that share one `absmax_scale`.
        dtype_name: dtype of the array that this one stands for.
        streamed: Whether it is kept in host memory, and fetched where it is used.
    """

    codes: UInt8[Array, "*lead rows packed"]
    absmax: Array
    absmax_scale: Array | None
    absmax_offset: Array | None
    layout: KernelLayout
    format: str
    block_size: int
    group_size: int
    dtype_name: str
    streamed: bool = False

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading layer and expert axes."""
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this one stands for."""
        return (*self.lead, *self.layout.shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the array that this one stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array that this one stands for."""
        return jnp.dtype(self.dtype_name)

    @property
    def double_quant(self) -> bool:
        """Whether the block constants are themselves quantized to 8 bits."""
        return self.absmax_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes held, constants and padding included."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Bits held for each parameter, constants and padding included."""
        return 8 * self.nbytes / max(self.size, 1)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "dtype"):  # a tree of something else, e.g. of shardings
            return f"QuantizedArray({self.format}, codes={self.codes!r})"
        padded = self.codes.shape[-1] * 2 - self.layout.cols
        parts = [
            f"{self.shape} {self.dtype_name}",
            f"{self.format} block {self.block_size}" + " + double quant" * self.double_quant,
            f"{self.bits_per_param:.3f} bits/param",
        ]
        if self.streamed:
            parts.append("streamed from the host")
        if padded:
            parts.append(f"rows padded by {padded}")
        return f"QuantizedArray({', '.join(parts)})"

    def __jax_array__(self) -> Array:
        raise InputError(
            f"{self!r} was used as an array: expected a function run by jax_qlora.lift, found jax "
            "applied to the packed kernel itself. Call lift(f)(params, ...) instead of "
            "f(params, ...), or make it dense with jax_qlora.dequantize."
        )

    @staticmethod
    def from_parts(
        *,
        codes: Array,
        absmax: Array,
        absmax_scale: Array | None = None,
        absmax_offset: Array | None = None,
        kernel_shape: tuple[int, ...],
        in_axes: tuple[int, ...] = (-2,),
        format: str = "nf4",
        block_size: int = 64,
        group_size: int = GROUP_SIZE,
        dtype: Any = jnp.float32,
        streamed: bool = False,
    ) -> "QuantizedArray":
        """Wraps codes and constants that exist already, e.g. a bitsandbytes checkpoint's.

        Here `block_size` may be any even number: a foreign tensor whose blocks straddle rows is the
        same values at `block_size = gcd(cols, foreign block size)`, its constants repeated.

        Args:
            codes: uint8 `[*lead, rows, packed]`.
            absmax: float32, or uint8 with double quantization, `[*lead, rows, blocks]`.
            absmax_scale: float32 `[*lead, groups]` with double quantization.
            absmax_offset: float32 `lead` with double quantization.
            kernel_shape: Trailing axes of the kernel, e.g. `(in, out)`.
            in_axes: The contracted ones, counted from the end.
            format: "nf4", "fp4" or "int4".
            block_size: Elements of a row that share a constant.
            group_size: Blocks that share a second-level constant.
            dtype: dtype of the array that this one stands for.
            streamed: Whether the parts are in host memory, to be fetched in use; see `stream`.

        Raises:
            InputError: the parts contradict each other (names the part, expected and found).
        """
        layout = make_layout(
            (*codes.shape[:-2], *kernel_shape), in_axes, _rest(kernel_shape, in_axes)
        )
        _check_format(format)
        blocks = -(-layout.cols // block_size)
        lead = tuple(codes.shape[:-2])
        groups = -(-layout.rows * blocks // group_size)
        want: dict[str, Any] = {
            "codes": (codes, jnp.uint8, (*lead, layout.rows, blocks * block_size // 2))
        }
        if absmax_scale is None:
            want["absmax"] = (absmax, jnp.float32, (*lead, layout.rows, blocks))
        else:
            want["absmax"] = (absmax, jnp.uint8, (*lead, layout.rows, blocks))
            want["absmax_scale"] = (absmax_scale, jnp.float32, (*lead, groups))
            want["absmax_offset"] = (absmax_offset, jnp.float32, lead)
        for name, (part, part_dtype, shape) in want.items():
            found = (getattr(part, "dtype", None), tuple(getattr(part, "shape", ())))
            if found != (jnp.dtype(part_dtype), shape) or block_size % 2:
                raise InputError(
                    f"{name} of a {format} kernel {kernel_shape} with block size {block_size}: "
                    f"expected {jnp.dtype(part_dtype)} {shape}, found {found[0]} {found[1]}. "
                    "Check the block size and the shape that the quantization state declares."
                )
        return QuantizedArray(
            codes=codes,
            absmax=absmax,
            absmax_scale=absmax_scale,
            absmax_offset=absmax_offset,
            layout=layout,
            format=format,
            block_size=block_size,
            group_size=group_size,
            dtype_name=jnp.dtype(dtype).name,
            streamed=streamed,
        )


def _rest(shape: tuple[int, ...], in_axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(-len(shape), 0) if a not in in_axes)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise InputError(
            f"quantization format {format!r}: expected one of {', '.join(FORMATS)}. "
            "8-bit and activation quantization are not part of this library."
        )


def quantize_array(
    w: Shaped[Array | np.ndarray, "..."],
    *,
    in_axis: int | tuple[int, ...] = -2,
    out_axis: int | tuple[int, ...] | None = None,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizedArray:
    """Quantizes a kernel to 4 bits, blocks along its contracted axes.

    Args:
        w: Kernel `[*lead, in, out]`, or any layout that the two axis arguments describe. Leading
            (layer, expert) axes are quantized one by one.
        in_axis: Contracted axis or axes.
        out_axis: Output axis or axes; see `make_layout` for the default.
        format: "nf4" (normal float), "fp4" (E2M1) or "int4" (symmetric absmax).
        block_size: Elements that share a constant: 32, 64, 128 or 256. A row whose length is not a
            multiple of it is padded; the repr says by how much.
        double_quant: Also quantize the constants to 8 bits (QLoRA section 3): 4.127 bits a
        parameter
            at block size 64 instead of 4.5.

    Returns:
        The quantized kernel, of the same logical shape and dtype.

    Raises:
        InputError: unknown format or block size, axes that do not fit, or a dtype that is no float.

    >>> q = quantize_array(jnp.ones((256, 128), jnp.bfloat16))
    >>> q
    QuantizedArray((256, 128) bfloat16, nf4 block 64 + double quant, 4.128 bits/param)
    """
    layout = make_layout(tuple(w.shape), in_axis, out_axis)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(
            f"a kernel of dtype {w.dtype}: expected float32, bfloat16 or float16. "
            "Quantize the floating-point weights, not indices or already packed codes."
        )
    _check_format(format)
    if block_size not in BLOCK_SIZES:
        raise InputError(
            f"block size {block_size}: expected one of {', '.join(map(str, BLOCK_SIZES))}. "
            "64 is the QLoRA paper's."
        )
    return _quantize(w, layout, format, block_size, double_quant)


def quantize_rows(
    rows: Shaped[Array | np.ndarray, "*lead rows cols"],
    *,
    dtype: Any = None,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizedArray:
    """Quantizes torch's layout `[*lead, out, in]` as the kernel `[*lead, in, out]` it stands for.

    Args:
        rows: Weights, any float dtype, in torch's layout.
        dtype: Logical dtype of the result; `rows.dtype` by default.
        format: As in `quantize_array`.
        block_size: As in `quantize_array`.
        double_quant: As in `quantize_array`.

    Raises:
        InputError: as `quantize_array`.
    """
    q = quantize_array(
        rows,
        in_axis=-1,
        out_axis=-2,
        format=format,
        block_size=block_size,
        double_quant=double_quant,
    )
    out, cols = q.layout.shape
    layout = KernelLayout(shape=(cols, out), in_axes=(-2,))
    return dataclasses.replace(q, layout=layout, dtype_name=jnp.dtype(dtype or rows.dtype).name)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
    w: Array, layout: KernelLayout, format: str, block_size: int, double_quant: bool
) -> QuantizedArray:
    codes, absmax = quantize_blockwise(layout.to_rows(w), format=format, block_size=block_size)
    scale = offset = None
    if double_quant:
        lead = absmax.shape[:-2]
        flat = absmax.reshape(math.prod(lead), -1)
        absmax8, scale, offset = jax.vmap(quantize_absmax)(flat)
        absmax = absmax8.reshape(absmax.shape)
        scale, offset = scale.reshape(*lead, -1), offset.reshape(lead)
    return QuantizedArray(
        codes=codes,
        absmax=absmax,
        absmax_scale=scale,
        absmax_offset=offset,
        layout=layout,
        format=format,
        block_size=block_size,
        group_size=GROUP_SIZE,
        dtype_name=w.dtype.name,
    )


def fetched(q: QuantizedArray) -> QuantizedArray:
    """A streamed kernel, or the slice of one that a loop has taken, brought to the device."""
    if not q.streamed:
        return q
    parts = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), q)
    return dataclasses.replace(parts, streamed=False)


def block_constants(q: QuantizedArray) -> Float[Array, "*lead rows blocks"]:
    """The float32 constant of each block, double quantization undone."""
    if q.absmax_scale is None or q.absmax_offset is None:
        return q.absmax
    restore = functools.partial(dequantize_absmax, group_size=q.group_size)
    if not q.lead:
        absmax = restore(q.absmax.reshape(-1), q.absmax_scale, q.absmax_offset)
        return absmax.reshape(q.absmax.shape)
    lead, flat = q.lead, q.absmax.reshape(math.prod(q.lead), -1)
    scale = q.absmax_scale.reshape(flat.shape[0], -1)
    offset = jnp.reshape(q.absmax_offset, flat.shape[0])
    absmax = jax.vmap(restore)(flat, scale, offset)
    return absmax.reshape(*lead, *q.absmax.shape[-2:])


def dequantize_rows(q: QuantizedArray, dtype: Any = jnp.float32) -> Float[Array, "*lead rows cols"]:
    """The kernel in torch's layout: `level[code] * constant` in float32, then cast."""
    q = fetched(q)
    values = dequantize_blockwise(
        q.codes, block_constants(q), format=q.format, block_size=q.block_size, dtype=dtype
    )
    return values[..., : q.layout.cols]


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(q: QuantizedArray, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """The dense array that `q` stands for, of the same shape and axes.

    Args:
        q: A quantized kernel.
        dtype: dtype of the result; the product is taken in float32 and cast.
    """
    return q.layout.from_rows(dequantize_rows(q, dtype))


def lookup_rows(q: QuantizedArray, indices: Array, dtype: Any = jnp.float32) -> Array:
    """Rows of a kernel without lead axes, decoding only those rows.

    Args:
        q: A kernel `rows x cols`, e.g. an embedding table whose rows are the vocabulary.
        indices: Row numbers, any shape, in range.
        dtype: dtype of the result.

    Returns:
        `[*indices.shape, cols]`.
    """
    q = fetched(q)
    values = dequantize_blockwise(
        q.codes[indices],
        block_constants(q)[indices],
        format=q.format,
        block_size=q.block_size,
        dtype=dtype,
    )
    return values[..., : q.layout.cols]
