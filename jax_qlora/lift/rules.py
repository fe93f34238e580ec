# SPDX-License-Identifier: Apache-2.0
"""What primitives mean on a weight that is quantized, adapted, or both.

`dot_general` and the row look-up compute with the weight as it is stored; rearrangements change the
view; control flow recurses. Anything else needs the dense weight, and that is an error unless the
caller allowed it: a silent dense weight is a memory bug.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._compat import JaxprEqn, aval_of, bind_eqn
from ..errors import InputError
from ..lora.array import LoraArray, lookup, lora_matmul
from ..quant import QuantizedArray, quantized_matmul
from ..typing import Array
from .control_flow import CONTROL_FLOW
from .interpreter import Special, evaluate
from .views import lead_slice, match_lookup, match_matmul, step_view
from .weight import Unavailable, Weight

Allow = Callable[[str], bool]


def make_handle(allow: Allow) -> Any:
    """The interpreter's `handle` for weights.

    Args:
        allow: Whether the weight at a path may be made dense where no rule applies.
    """

    def handle(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        for value in values:
            if isinstance(value, Unavailable):
                raise InputError(
                    f"'{value.path}' {value.why}: expected loops and branches to return a "
                    f"quantized or "
                    f"adapted weight unchanged, found '{eqn.primitive.name}' using the changed "
                    f"one. "
                    "Use the weight inside the loop, or leave this path out of the targets."
                )
        if eqn.primitive in CONTROL_FLOW:
            return CONTROL_FLOW[eqn.primitive](
                eqn, values, functools.partial(evaluate, handle=handle)
            )
        rule = _RULES.get(eqn.primitive)
        outs = rule(eqn, values) if rule else _rearrange(eqn, values)
        if outs is None:
            outs = bind_eqn(eqn, [make_dense(v, eqn.primitive.name, allow) for v in values])
        return outs

    return handle


def make_dense(value: Any, use: str, allow: Allow) -> Any:
    """The dense form of a weight where that is allowed; other values as they are.

    Raises:
        InputError: the weight may not be made dense.
    """
    if not isinstance(value, Special):
        return value
    if not isinstance(value, Weight) or not allow(value.path):
        raise InputError(
            f"'{value.path}' is quantized or adapted and reaches '{use}', which has no rule: "
            "expected a matmul, an einsum or a row look-up over its whole contracted axes. Leave "
            "this path out of the targets, or let it be dense there: "
            f"lift(f, materialize=['{value.path}'])."
        )
    return value.dense()


def _rearrange(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    weight, *rest = values
    if not isinstance(weight, Weight):
        return None
    if (axis := lead_slice(eqn, weight.view)) is not None:
        lead = len(weight.view.leaf_shape) - len(weight.leaf.layout.shape)
        if axis + len(weight.view.leaf_shape) >= lead:
            return None
        dim = next(d for d, axes in enumerate(weight.view.dims) if axes == (axis,))
        starts = rest or eqn.params["start_indices"]
        return [weight.take(axis, starts[dim])]
    view = step_view(eqn, weight.view)
    return None if view is None else [Weight(weight.leaf, view, weight.path)]


def _dot_general(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    if all(isinstance(v, Weight) for v in values):
        return None
    side = 0 if isinstance(values[0], Weight) else 1  # which operand is the weight
    weight, x = values[side], values[1 - side]
    contracts, batches = eqn.params["dimension_numbers"]
    leaf, view = weight.leaf, weight.view
    plan = match_matmul(leaf.layout, view, batches[side], contracts[side])
    if plan is None:
        return None
    aval = aval_of(eqn.outvars[0])

    # x -> [*lead, m, k]
    x_batch = [batches[1 - side][i] for i in plan.batch]
    x_contract = [contracts[1 - side][i] for i in plan.contract]
    x_free = [d for d in range(x.ndim) if d not in x_batch and d not in x_contract]
    lead = view.leaf_shape[: len(view.leaf_shape) - len(leaf.layout.shape)]
    m, k = (math.prod(x.shape[d] for d in dims) for dims in (x_free, x_contract))
    operand = jnp.transpose(x, x_batch + x_free + x_contract).reshape(*lead, m, k)
    if view.dtype.itemsize > operand.dtype.itemsize:
        operand = operand.astype(view.dtype)

    def restore(y: Array) -> Array:
        """[*lead, m, n] -> the shape dot_general gives: batch, left free, right free."""
        sizes = [x.shape[d] for d in x_batch + x_free] + [view.shape[d] for d in plan.free]
        y = y.reshape(sizes)
        nb, nx = len(x_batch), len(x_free)
        batch = [plan.batch.index(i) for i in range(nb)]
        xs = list(range(nb, nb + nx))
        ws = [nb + nx + plan.free.index(d) for d in sorted(plan.free)]
        return jnp.transpose(y, batch + (ws + xs if side == 0 else xs + ws))

    base = leaf.base if isinstance(leaf, LoraArray) else leaf
    multiply: dict[str, Any] = dict(transpose=plan.transpose, dtype=aval.dtype)
    if isinstance(base, QuantizedArray):
        y = restore(quantized_matmul(operand, base, **multiply))
    else:  # a dense base: the very equation the model wrote
        dense = [x, x]
        dense[side], dense[1 - side] = view.apply(base), x
        y = bind_eqn(eqn, dense)[0]
    if isinstance(leaf, LoraArray):
        y = y + restore(lora_matmul(operand, leaf.pair, dropout_key=leaf.dropout_key, **multiply))
    return [y]


def _gather(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    weight, indices = values
    if not isinstance(weight, Weight) or isinstance(indices, Special):
        return None
    plan, view, layout = match_lookup(eqn, weight.view), weight.view, weight.leaf.layout
    if plan is None:
        return None
    rest = [d for d in range(len(view.dims)) if d != plan.dim]
    if view.wide([plan.dim]) != _wide(view, layout.out_axes) or view.wide(rest) != _wide(
        view, layout.in_axes
    ):
        return None
    rows = indices[..., 0]
    safe = jnp.clip(rows, 0, layout.rows - 1)
    y = lookup(weight.leaf, safe, view.dtype)
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = jnp.asarray(jnp.nan if fill is None else fill, view.dtype)
        y = jnp.where((rows == safe)[..., None], y, fill)
    y = y.reshape(*rows.shape, *(view.shape[d] for d in rest))
    y = jnp.moveaxis(y, range(rows.ndim, y.ndim), plan.offset_dims)
    return [y]


def _wide(view: Any, axes: Any) -> tuple[int, ...]:
    return tuple(a for a in axes if view.leaf_shape[a] != 1)


_RULES = {lax.dot_general_p: _dot_general, lax.gather_p: _gather}
