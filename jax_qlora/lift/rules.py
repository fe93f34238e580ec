# SPDX-License-Identifier: Apache-2.0
"""What primitives mean on a weight that is quantized, adapted, or both.

`dot_general`, convolutions and the row look-up compute with the weight as it is stored;
rearrangements change the view; control flow recurses. Anything else needs the dense weight, and
that is an error unless the caller allowed it: a silent dense weight is a memory bug.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._compat import JaxprEqn, aval_of, bind_eqn, unstack_p
from ..errors import InputError
from ..lora.array import LoraArray, lookup, lora_matmul
from ..lora.dora import row_factors
from ..lora.tokens import TokenArray, row_scores
from ..quant import QuantizedArray, quantized_matmul
from ..quant.matmul import accumulator
from ..typing import Array
from .control_flow import CONTROL_FLOW
from .convolution import convolution
from .interpreter import Special, evaluate
from .views import gathered_view, lead_slice, match_lookup, match_matmul, step_view, take_view
from .weight import Unavailable, Weight

Allow = Callable[[str], bool]


def make_handle(allow: Allow) -> Any:
    """The interpreter's `handle` for weights.

    Args:
        allow: Whether the weight at a path may be made dense where no rule applies.

    Returns:
        A function of an equation and its values.

    Raises:
        InputError: When the result is called: a weight was changed in a loop, or would have to be
            dense and may not.
    """

    def handle(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        if eqn.primitive in CONTROL_FLOW:
            return CONTROL_FLOW[eqn.primitive](
                eqn, values, functools.partial(evaluate, handle=handle)
            )
        for value in values:
            if isinstance(value, Unavailable):
                raise InputError(
                    f"'{value.path}' {value.why}: expected loops and branches to return a "
                    f"quantized or adapted weight unchanged, found '{eqn.primitive.name}' using "
                    "the changed one. Use the weight inside the loop, or leave this path out of "
                    "the targets."
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
            "expected a matmul, an einsum, a convolution or a row look-up over its whole "
            "contracted axes. Leave this path out of the targets, or let it be dense there: "
            f"lift(f, materialize=['{value.path}'])."
        )
    return value.dense()


def _rearrange(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    weight, *rest = values
    if not isinstance(weight, Weight):
        return None
    view = weight.view
    if (axis := lead_slice(eqn, view)) is not None:
        dim = next(d for d, axes in enumerate(view.dims) if axes == (axis,))
        start = (rest or eqn.params["start_indices"])[dim]
        if _is_lead(weight, dim):
            return [weight.take(axis, start)]
        rows = _lookup(weight, dim, jnp.asarray(start))
        return None if rows is None else [rows.reshape(aval_of(eqn.outvars[0]).shape)]
    view = step_view(eqn, view)
    return None if view is None else [weight.under(view)]


def _dot_general(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    if all(isinstance(v, Weight) for v in values):
        return None
    side = 0 if isinstance(values[0], Weight) else 1  # which operand is the weight
    weight, x = values[side], values[1 - side]
    contracts, batches = eqn.params["dimension_numbers"]
    view = weight.view
    leaf: Any = weight.leaf
    plan = match_matmul(leaf.layout, view, batches[side], contracts[side])
    if plan is None:
        return None
    aval = aval_of(eqn.outvars[0])

    # x -> [*lead, m, k]
    batch = list(batches[side])
    x_batch = [batches[1 - side][batch.index(d)] for d in plan.lead if d in batch]
    x_contract = [contracts[1 - side][list(contracts[side]).index(d)] for d in plan.contract]
    x_free = [d for d in range(x.ndim) if d not in x_batch and d not in x_contract]
    m, k = (math.prod(x.shape[d] for d in dims) for dims in (x_free, x_contract))
    own = [view.shape[d] if d in batch else 1 for d in plan.lead]  # 1: a lead axis x does not have
    lead = [view.leaf_shape[a] for a in view.lead(leaf.layout)]
    operand = jnp.transpose(x, x_batch + x_free + x_contract).reshape(*own, m, k)
    operand = jnp.broadcast_to(operand, (*(view.shape[d] for d in plan.lead), m, k))
    operand = operand.reshape(*lead, m, k)
    if view.dtype.itemsize > operand.dtype.itemsize:
        operand = operand.astype(view.dtype)

    def restore(y: Array) -> Array:
        """[*lead, m, n] -> the shape dot_general gives: batch, left free, right free."""
        w_dims = [*plan.lead, *plan.free]
        y = y.reshape(
            [view.shape[d] for d in plan.lead]
            + [x.shape[d] for d in x_free]
            + [view.shape[d] for d in plan.free]
        )
        n_lead, n_free = len(plan.lead), len(x_free)
        place = {d: i + n_free * (i >= n_lead) for i, d in enumerate(w_dims)}
        xs = list(range(n_lead, n_lead + n_free))
        ws = [place[d] for d in sorted(w_dims) if d not in batch]
        order = ws + xs if side == 0 else xs + ws
        return jnp.transpose(y, [place[d] for d in batch] + order)

    if isinstance(leaf, TokenArray) and (lead or plan.transpose or len(plan.free) != 1):
        return None
    base: Any = leaf.base if isinstance(leaf, LoraArray | TokenArray) else leaf
    pair, key = (leaf.pair, leaf.dropout_key) if isinstance(leaf, LoraArray) else (None, None)
    factors = None if pair is None or pair.magnitude is None else row_factors(base, pair)
    if factors is not None and plan.transpose:  # rows are contracted: their factors go to x
        operand = _scaled(operand, factors[..., None, :])
    multiply: dict[str, Any] = dict(transpose=plan.transpose, dtype=aval.dtype)
    if isinstance(base, QuantizedArray):
        y = restore(quantized_matmul(operand, base, **multiply))
    elif factors is not None and plan.transpose:
        rows = leaf.layout.to_rows(base).reshape(*lead, k, -1).astype(operand.dtype)
        y = jnp.matmul(operand, rows, preferred_element_type=accumulator(operand.dtype))
        y = restore(y.astype(aval.dtype))
    else:  # a dense base: the very equation the model wrote
        dense = [x, x]
        dense[side], dense[1 - side] = view.apply(base), x
        y = bind_eqn(eqn, dense)[0]
    if isinstance(leaf, TokenArray):
        scores = row_scores(leaf.tokens, operand, aval.dtype)
        scores = scores.reshape(*(x.shape[d] for d in x_free), -1)
        places = jnp.asarray(leaf.tokens.indices, jnp.int32)
        if side == 0:  # the vocabulary comes first
            y = y.at[places].set(jnp.moveaxis(scores, -1, 0))
        else:
            y = y.at[..., places].set(scores)
    if pair is not None:
        y = y + restore(lora_matmul(operand, pair, dropout_key=key, **multiply))
    if factors is not None and not plan.transpose:
        factors = jnp.broadcast_to(factors[..., None, :], (*lead, m, leaf.layout.rows))
        y = _scaled(y, restore(factors))
    return [y]


def _scaled(x: Array, factors: Array) -> Array:
    """Multiplied in float32."""
    return (x.astype(jnp.float32) * factors).astype(x.dtype)


def _is_lead(weight: Weight, dim: int) -> bool:
    """Whether a dimension of the value is one of the weight's layer or expert axes."""
    view = weight.view
    return len(view.dims[dim]) == 1 and view.dims[dim][0] in view.lead(weight.leaf.layout)


def _gather(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    weight, indices = values
    if not isinstance(weight, Weight) or isinstance(indices, Special):
        return None
    view = weight.view
    plan = match_lookup(eqn, view)
    if plan is None:
        return None
    index = indices[..., plan.column].astype(jnp.int32)
    if _is_lead(weight, plan.dim):  # each index takes the kernel of a layer or an expert, packed
        leaf = weight.gather(view.dims[plan.dim][0], index)
        return [Weight(leaf, gathered_view(view, plan, index.shape), weight.path)]
    y = _lookup(weight, plan.dim, index)
    if y is None:
        return None
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = jnp.asarray(jnp.nan if fill is None else fill, view.dtype)
        inside = (index >= 0) & (index < view.shape[plan.dim])
        y = jnp.where(inside[..., None], y, fill)
    sizes = [1 if d == plan.dim else n for d, n in enumerate(view.shape)]
    if not plan.kept:
        del sizes[plan.dim]
    y = y.reshape(*index.shape, *sizes)
    return [jnp.moveaxis(y, range(index.ndim, y.ndim), plan.offset_dims)]


def _lookup(weight: Weight, dim: int, index: Array) -> Array | None:
    """Rows of the weight, `[*index.shape, cols]`; None if `dim` is not exactly its rows."""
    view, layout = weight.view, weight.leaf.layout
    rest = [d for d in range(len(view.dims)) if d != dim]
    if view.wide([dim]) != view.parts(layout.out_axes):
        return None
    if view.wide(rest) != view.parts(layout.in_axes):
        return None
    return lookup(weight.leaf, jnp.clip(index, 0, layout.rows - 1), view.dtype)


def _unstack(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    """`for layer in stacked`: the weight of each layer."""
    (weight,), dim = values, eqn.params["axis"]
    if not _is_lead(weight, dim):
        return None
    view = take_view(weight.view, dim)
    taken = [weight.take(weight.view.dims[dim][0], i) for i in range(len(eqn.outvars))]
    return [Weight(w.leaf, view, w.path) for w in taken]


def _stop_gradient(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    (weight,) = values
    leaf = weight.leaf
    if isinstance(leaf, LoraArray):  # a quantized kernel has no gradient to stop
        leaf = dataclasses.replace(leaf, pair=jax.tree.map(lax.stop_gradient, leaf.pair))
    if isinstance(leaf, TokenArray):
        leaf = dataclasses.replace(leaf, tokens=jax.tree.map(lax.stop_gradient, leaf.tokens))
    return [Weight(leaf, weight.view, weight.path)]


def _barrier(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """Orders the arrays among the operands; weights pass."""
    arrays = iter(lax.optimization_barrier([v for v in values if not isinstance(v, Special)]))
    return [v if isinstance(v, Special) else next(arrays) for v in values]


_RULES = {
    lax.dot_general_p: _dot_general,
    lax.conv_general_dilated_p: convolution,
    lax.gather_p: _gather,
    lax.stop_gradient_p: _stop_gradient,
    lax.optimization_barrier_p: _barrier,
    unstack_p: _unstack,
}
