# SPDX-License-Identifier: Apache-2.0
"""Views: how a value inside a traced function relates to the weight it came from.

Between a parameter and the matmul that uses it, models transpose, reshape and cast. A view records
those steps symbolically, as a permutation and grouping of the weight's axes, so that no step has
to be carried out on the weight. Axes are numbered from the end: slicing a layer or an expert off
the front (`lax.scan`) leaves the numbers of the others as they are.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from .._compat import JaxprEqn, aval_of
from ..quant.layout import KernelLayout
from ..typing import Array


@dataclasses.dataclass(frozen=True)
class View:
    """A rearrangement of a weight.

    Attributes:
        leaf_shape: Shape of the weight, lead axes included. Where a reshape has cut an axis in
            parts, each part is an axis of its own here.
        dims: For each dimension of the value, the axes of the weight merged in it, row-major.
        dtype: dtype the value has been cast to.
        origin: For each axis here, the axis of the weight itself that it is a part of.
    """

    leaf_shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    dtype: Any
    origin: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.size(dim) for dim in self.dims)

    def size(self, axes: Sequence[int]) -> int:
        """Product of the sizes of some axes of the weight."""
        return math.prod(self.leaf_shape[a] for a in axes)

    def wide(self, dims: Sequence[int]) -> tuple[int, ...]:
        """The axes in some dimensions, in order, without those of size one."""
        return tuple(a for d in dims for a in self.dims[d] if self.leaf_shape[a] != 1)

    def parts(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes here, wider than one, that are parts of some axes of the weight itself."""
        ndim = len(self.leaf_shape)
        found = (a for a in range(-ndim, 0) if self.origin[a] in axes and self.leaf_shape[a] != 1)
        return tuple(found)

    def lead(self, layout: KernelLayout) -> tuple[int, ...]:
        """The layer and expert axes in front of a kernel."""
        ndim, kernel = len(self.leaf_shape), len(layout.shape)
        return tuple(a for a in range(-ndim, 0) if self.origin[a] < -kernel)

    def apply(self, dense: Array) -> Array:
        """The value itself, from the dense weight."""
        ndim = len(self.leaf_shape)
        order = [a + ndim for dim in self.dims for a in dim]
        order += [a for a in range(ndim) if a not in order]  # squeezed axes of size one
        value = jnp.transpose(dense.reshape(self.leaf_shape), order)
        return value.reshape(self.shape).astype(self.dtype)


def identity_view(shape: Sequence[int], dtype: Any) -> View:
    """The view of a weight as it is."""
    axes = tuple(range(-len(shape), 0))
    return View(tuple(shape), tuple((a,) for a in axes), jnp.dtype(dtype), axes)


def step_view(eqn: JaxprEqn, view: View) -> View | None:
    """The view after one equation, or None if the equation is no rearrangement or cast."""
    step = _STEPS.get(eqn.primitive)
    return step(eqn, view) if step else None


def _same(eqn: JaxprEqn, view: View) -> View:
    return view


def _convert(eqn: JaxprEqn, view: View) -> View | None:
    dtype = eqn.params["new_dtype"]
    floating = jnp.issubdtype(dtype, jnp.floating)
    return dataclasses.replace(view, dtype=jnp.dtype(dtype)) if floating else None


def _transpose(eqn: JaxprEqn, view: View) -> View:
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in eqn.params["permutation"]))


def _squeeze(eqn: JaxprEqn, view: View) -> View:
    gone = {d % len(view.dims) for d in eqn.params["dimensions"]}
    kept = tuple(dim for i, dim in enumerate(view.dims) if i not in gone)
    return dataclasses.replace(view, dims=kept)


def _reshape(eqn: JaxprEqn, view: View) -> View | None:
    """Regroups the axes, cutting them where needed; None if they cannot be cut that way."""
    axes = view.wide(range(len(view.dims)))
    queue = [(a, view.leaf_shape[a]) for a in axes]
    parts: dict[int, list[int]] = {a: [] for a in axes}  # sizes that each axis is cut into
    dims: list[list[tuple[int, int]]] = []  # for each new dimension: which parts of which axes
    for size in eqn.params["new_sizes"]:
        dim: list[tuple[int, int]] = []
        while size > 1 and queue:
            axis, rest = queue.pop(0)
            taken = math.gcd(size, rest)
            if taken not in (size, rest):
                return None
            dim.append((axis, len(parts[axis])))
            parts[axis].append(taken)
            size //= taken
            if taken < rest:
                queue.insert(0, (axis, rest // taken))
        if size != 1:
            return None
        dims.append(dim)
    every = range(-len(view.leaf_shape), 0)
    pieces = [(a, i) for a in every for i in range(len(parts[a]) if a in parts else 1)]
    number = {piece: n - len(pieces) for n, piece in enumerate(pieces)}
    return View(
        leaf_shape=tuple(parts[a][i] if a in parts else view.leaf_shape[a] for a, i in pieces),
        dims=tuple(tuple(number[piece] for piece in dim) for dim in dims),
        dtype=view.dtype,
        origin=tuple(view.origin[a] for a, _ in pieces),
    )


def _slice(eqn: JaxprEqn, view: View) -> View | None:
    """Only a slice that takes everything."""
    return view if tuple(aval_of(eqn.outvars[0]).shape) == view.shape else None


def _broadcast(eqn: JaxprEqn, view: View) -> View | None:
    """Only new dimensions of size one."""
    shape, mapping = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims: list[tuple[int, ...]] = [()] * len(shape)
    for i, d in enumerate(mapping):
        dims[d] = view.dims[i]
    new = dataclasses.replace(view, dims=tuple(dims))
    return new if new.shape == tuple(shape) else None


_STEPS = {
    lax.convert_element_type_p: _convert,
    lax.transpose_p: _transpose,
    lax.reshape_p: _reshape,
    lax.squeeze_p: _squeeze,
    lax.broadcast_in_dim_p: _broadcast,
    lax.slice_p: _slice,
    lax.dynamic_slice_p: _slice,
    lax.copy_p: _same,
    lax.sharding_constraint_p: _same,  # how a frozen weight is placed is up to who places it
}


def lead_slice(eqn: JaxprEqn, view: View) -> int | None:
    """The axis of the weight from which a slice takes one index, if that is all it does.

    Covers `lax.slice` and `lax.dynamic_slice`, i.e. `stacked[i]` in a Python loop over layers.
    """
    params, shape = eqn.params, view.shape
    if eqn.primitive is lax.slice_p:
        strides = params["strides"] or (1,) * len(shape)
        sizes = [
            hi - lo for lo, hi in zip(params["start_indices"], params["limit_indices"], strict=True)
        ]
        if any(s != 1 for s in strides):
            return None
    elif eqn.primitive is lax.dynamic_slice_p:
        sizes = list(params["slice_sizes"])
    else:
        return None
    cut = [d for d, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full]
    if len(cut) != 1 or sizes[cut[0]] != 1 or len(view.dims[cut[0]]) != 1:
        return None
    return view.dims[cut[0]][0]


def drop_axis(view: View, axis: int) -> View:
    """The view after one index is taken from `axis`; the dimension it filled has size one."""
    position = axis + len(view.leaf_shape)
    dims = tuple(tuple(a + (a < axis) for a in dim if a != axis) for dim in view.dims)
    shape, origin = (x[:position] + x[position + 1 :] for x in (view.leaf_shape, view.origin))
    return View(shape, dims, view.dtype, origin)


def scan_view(view: View) -> View | None:
    """The view inside a scan over the value's first dimension; None unless that is a lead axis."""
    if not view.dims or view.dims[0] != (-len(view.leaf_shape),):
        return None
    return take_view(view, 0)


def take_view(view: View, dim: int) -> View:
    """The view of one index along a dimension that is one axis of the weight."""
    inner = drop_axis(view, view.dims[dim][0])
    return dataclasses.replace(inner, dims=inner.dims[:dim] + inner.dims[dim + 1 :])


def free_dims(view: View, batch: Sequence[int], contract: Sequence[int]) -> list[int]:
    """Dimensions of a dot_general operand that are neither batch nor contracted."""
    return [d for d in range(len(view.dims)) if d not in batch and d not in contract]


class MatmulPlan(NamedTuple):
    """A `dot_general` against a weight, as `[*lead, m, k] x [*lead, k, n]`.

    Attributes:
        transpose: The weight's rows are contracted, not its cols.
        lead: Dimensions of the value that are lead axes, in the weight's own order. Those that the
            other operand does not have (no batch dimensions) are copied over.
        contract: Contracted dimensions of the value, in the weight's own order.
        free: Remaining dimensions of the value, in the weight's own order.
    """

    transpose: bool
    lead: tuple[int, ...]
    contract: tuple[int, ...]
    free: tuple[int, ...]


def match_matmul(
    layout: KernelLayout, view: View, batch: Sequence[int], contract: Sequence[int]
) -> MatmulPlan | None:
    """Reads a `dot_general` as a matmul against a kernel; None if it is none.

    The contracted dimensions must be exactly the kernel's cols (or rows: `transpose`), and the
    batch dimensions must be lead axes.
    """

    def ordered(dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(dims, key=lambda d: (view.wide([d]) or (0,))[0]))

    leads = view.parts([view.origin[a] for a in view.lead(layout)])
    spread = [d for d in range(len(view.dims)) if view.wide([d]) and view.wide([d])[0] in leads]
    free = [d for d in free_dims(view, batch, contract) if d not in spread]
    plan = ordered([*dict.fromkeys([*batch, *spread])]), ordered(contract), ordered(free)
    got = [view.wide(dims) for dims in plan]
    ins, outs = view.parts(layout.in_axes), view.parts(layout.out_axes)
    if got == [leads, ins, outs]:
        return MatmulPlan(False, *plan)
    if got == [leads, outs, ins]:
        return MatmulPlan(True, *plan)
    return None


class LookupPlan(NamedTuple):
    """A `gather` of whole slices along one dimension, `jnp.take(weight, indices, axis)`.

    Attributes:
        dim: The dimension of the value that is indexed.
        column: Where its index stands among the index vector's components.
        offset_dims: Where the slice's dimensions stand in the result.
        kept: Whether the indexed dimension stays, with size one.
    """

    dim: int
    column: int
    offset_dims: tuple[int, ...]
    kept: bool


def match_lookup(eqn: JaxprEqn, view: View) -> LookupPlan | None:
    """Reads a `gather` as a look-up along one dimension; None if it is none."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], view.shape
    collapsed, indexed = tuple(numbers.collapsed_slice_dims), tuple(numbers.start_index_map)
    cut = [d for d in indexed if sizes[d] == 1 and (d in collapsed or shape[d] != 1)]
    if numbers.operand_batching_dims or len(cut) != 1 or not set(collapsed) <= set(cut):
        return None
    dim = cut[0]
    if any(n != shape[d] for d, n in enumerate(sizes) if d != dim):
        return None
    # where a whole dimension is taken an index can only be 0, or be clipped to it
    if len(indexed) > 1 and eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        return None
    return LookupPlan(dim, indexed.index(dim), tuple(numbers.offset_dims), dim not in collapsed)


def gathered_view(view: View, plan: LookupPlan, batch: Sequence[int]) -> View:
    """The view after a look-up along one axis of the weight, which becomes the axes `batch`."""
    (axis,) = view.dims[plan.dim]
    position, grown = axis + len(view.leaf_shape), len(batch) - 1
    shape = (*view.leaf_shape[:position], *batch, *view.leaf_shape[position + 1 :])
    origin = (
        *view.origin[:position],
        *[view.origin[axis]] * len(batch),
        *view.origin[position + 1 :],
    )
    rest = [
        () if d == plan.dim else tuple(a - grown * (a < axis) for a in dim)
        for d, dim in enumerate(view.dims)
        if d != plan.dim or plan.kept
    ]
    new = [(axis - grown + i,) for i in range(len(batch))]
    dims = [
        rest.pop(0) if d in plan.offset_dims else new.pop(0) for d in range(len(rest) + len(new))
    ]
    return View(shape, tuple(dims), view.dtype, origin)
