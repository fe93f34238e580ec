# SPDX-License-Identifier: Apache-2.0
"""Which axes of a kernel are contracted: the bridge between a library's layout and rows x cols."""

import dataclasses
import math

import jax.numpy as jnp

from ..errors import InputError
from ..typing import Array, Shaped


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """How the trailing axes of a kernel fold into the matrix `[rows, cols]`.

    Rows run over the output axes and cols over the contracted axes, each in their order in the
    kernel: torch's `[out_features, in_features]`, whatever the library's own layout. Axes before
    the trailing ones are `lead` axes (layers, experts) and stay in front.

    Attributes:
        shape: Sizes of the trailing axes, e.g. `(in, out)`.
        in_axes: The contracted ones, ascending and counted from the end, e.g. `(-2,)`.
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]

    @property
    def out_axes(self) -> tuple[int, ...]:
        """The output axes, ascending and counted from the end."""
        return tuple(a for a in range(-len(self.shape), 0) if a not in self.in_axes)

    @property
    def rows(self) -> int:
        """Product of the output dimensions."""
        return math.prod(self.shape[a] for a in self.out_axes)

    @property
    def cols(self) -> int:
        """Product of the contracted dimensions."""
        return math.prod(self.shape[a] for a in self.in_axes)

    def to_rows(self, kernel: Shaped[Array, "..."]) -> Shaped[Array, "*lead rows cols"]:
        """Folds a kernel `[*lead, *shape]` into `[*lead, rows, cols]`."""
        lead = kernel.ndim - len(self.shape)
        order = [*range(lead), *(a + kernel.ndim for a in self.out_axes + self.in_axes)]
        return jnp.transpose(kernel, order).reshape(*kernel.shape[:lead], self.rows, self.cols)

    def from_rows(self, rows: Shaped[Array, "*lead rows cols"]) -> Shaped[Array, "..."]:
        """Inverse of `to_rows`."""
        lead = rows.ndim - 2
        axes = self.out_axes + self.in_axes
        unfolded = rows.reshape(*rows.shape[:-2], *(self.shape[a] for a in axes))
        inverse = [axes.index(a - len(self.shape)) + lead for a in range(len(self.shape))]
        return jnp.transpose(unfolded, [*range(lead), *inverse])


def make_layout(
    shape: tuple[int, ...],
    in_axis: int | tuple[int, ...] = -2,
    out_axis: int | tuple[int, ...] | None = None,
) -> KernelLayout:
    """Builds the layout of a kernel of the given full shape.

    Args:
        shape: The kernel's shape, lead axes included.
        in_axis: Contracted axis or axes.
        out_axis: Output axis or axes. By default the one next to the contracted axis in a pair
            (`-2` with `-1`), or all axes that follow the first contracted one.

    Raises:
        InputError: an axis is out of range or named twice, or a lead axis is not in front.
    """
    ndim = len(shape)

    def normalize(axes: int | tuple[int, ...]) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        bad = [a for a in axes if not -ndim <= a < ndim]
        if bad or ndim < 2:
            raise InputError(
                f"axis {bad or axes} of a kernel of shape {shape}: expected a kernel of two or "
                f"more "
                f"axes and axes in [-{ndim}, {ndim}). Pass in_axis and out_axis of this kernel."
            )
        return tuple(sorted(a % ndim - ndim for a in axes))

    ins = normalize(in_axis)
    if out_axis is None:
        first = min(min(ins), -2)
        outs = tuple(a for a in range(first, 0) if a not in ins)
    else:
        outs = normalize(out_axis)
    used = ins + outs
    if not outs or len(set(used)) != len(used) or set(used) != set(range(-len(used), 0)):
        raise InputError(
            f"in_axis={in_axis}, out_axis={out_axis} of a kernel of shape {shape}: expected "
            f"distinct "
            "axes that are the last ones of the kernel, stacked layer and expert axes in front. "
            "Transpose the kernel, or name all its output axes in out_axis."
        )
    return KernelLayout(shape=tuple(shape[-len(used) :]), in_axes=ins)
