# SPDX-License-Identifier: Apache-2.0
"""Recursion into the primitives that carry functions: jit, remat, custom rules, scan, while, cond.

Each is rebuilt with the public transform that made it, on the same function evaluated by `run`,
with weights passed as pytrees. Outputs that are weights leave by the side: flax's lifted loops
return the parameters they were given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from .._compat import (
    JaxprEqn,
    cond_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    open_jaxpr,
    remat_p,
    scan_p,
    scan_parts,
    while_p,
)
from ..errors import InputError
from .interpreter import Special
from .views import View, scan_view
from .weight import Unavailable, Weight

Run = Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]]


class _Boxed:
    """Values as a pytree of plain arrays, and the way back to weights from traced ones."""

    def __init__(self, values: Sequence[Any]):
        self.weights = [v if isinstance(v, Special) else None for v in values]
        self.tree = [v.leaf if isinstance(v, Weight) else _or_none(v) for v in values]

    def open(self, tree: Sequence[Any]) -> list[Any]:
        out = []
        for weight, x in zip(self.weights, tree, strict=True):
            out.append(Weight(x, weight.view, weight.path) if isinstance(weight, Weight) else x)
            if isinstance(weight, Unavailable):
                out[-1] = weight
        return out


def _or_none(value: Any) -> Any:
    return None if isinstance(value, Special) else value


class _Outputs:
    """Splits a body's outputs into arrays, which the transform returns, and weights.

    A weight that comes out with the leaf it went in with is the outer weight under the inner view.
    """

    def __init__(self) -> None:
        self.outer: list[Any] = []

    def close(self, outs: Sequence[Any], inner: Sequence[Any], outer: Sequence[Any]) -> list[Any]:
        came_in = {
            id(v.leaf): o for v, o in zip(inner, outer, strict=True) if isinstance(v, Weight)
        }
        self.outer = []
        for out in outs:
            source = came_in.get(id(out.leaf)) if isinstance(out, Weight) else None
            if isinstance(out, Weight) and source is not None:
                self.outer.append(Weight(source.leaf, out.view, out.path))
            elif isinstance(out, Special):
                self.outer.append(Unavailable(out.path, "is changed inside a loop or branch"))
            else:
                self.outer.append(None)
        return [_or_none(out) for out in outs]

    def join(self, outs: Sequence[Any]) -> list[Any]:
        return [o if s is None else s for o, s in zip(outs, self.outer, strict=True)]


def _inline(key: str) -> Callable[..., list[Any]]:
    def rule(eqn: JaxprEqn, values: list[Any], run: Run) -> list[Any]:
        return run(*open_jaxpr(eqn.params[key]), values)

    return rule


def _remat(eqn: JaxprEqn, values: list[Any], run: Run) -> list[Any]:
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    boxed, outputs = _Boxed(values), _Outputs()

    def body(tree: list[Any]) -> list[Any]:
        inner = boxed.open(tree)
        return outputs.close(run(jaxpr, consts, inner), inner, values)

    outs = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(
        boxed.tree
    )
    return outputs.join(outs)


def _scan(eqn: JaxprEqn, values: list[Any], run: Run) -> list[Any]:
    jaxpr, jaxpr_consts = open_jaxpr(eqn.params["jaxpr"])
    parts = scan_parts(eqn)
    start = parts.num_consts + parts.num_carry
    consts, init, xs = values[: parts.num_consts], values[parts.num_consts : start], values[start:]
    # a weight in the carry that the body hands on unchanged is a constant
    boxed_init, boxed_xs, outputs = _Boxed(init), _Boxed(xs), _Outputs()
    views = {i: _scanned(w) for i, w in enumerate(boxed_xs.weights) if isinstance(w, Weight)}

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        state = [c if w is None else w for c, w in zip(carry, boxed_init.weights, strict=True)]
        inner_xs = [
            Weight(v.leaf, views[i], v.path) if isinstance(v, Weight) else v
            for i, v in enumerate(boxed_xs.open(x))
        ]
        inner = [*consts, *state, *inner_xs]
        raw = run(jaxpr, jaxpr_consts, inner)
        _check_carry(boxed_init.weights, raw)
        outs = outputs.close(raw, inner, values)
        return outs[: parts.num_carry], outs[parts.num_carry :]

    carry = [None if isinstance(v, Special) else v for v in init]
    params = eqn.params
    last, ys = lax.scan(
        body,
        carry,
        boxed_xs.tree,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    outs = outputs.join([*last, *ys])
    return [_outside_scan(out, i < parts.num_carry, xs) for i, out in enumerate(outs)]


def _check_carry(before: Sequence[Any], after: Sequence[Any]) -> None:
    """A loop may carry a weight along, not change it: the loop's state is arrays alone.

    Raises:
        InputError: the body hands on another weight, or an array, in the place of a weight.
    """
    for weight, out in zip(before, after, strict=False):
        same = isinstance(out, Weight) and isinstance(weight, Weight)
        if same and out.leaf is weight.leaf and out.view == weight.view:
            continue
        if weight is None and not isinstance(out, Special) or weight is out:
            continue
        path = (weight or out).path
        raise InputError(
            f"'{path}' is changed by a loop that carries it: expected a quantized or adapted "
            "weight to be carried unchanged. Update a dense copy, or leave this path out of the "
            "targets."
        )


def _scanned(weight: Weight) -> View:
    """The view of a scanned weight inside the loop.

    Raises:
        InputError: the scan runs over an axis that is contracted or moved.
    """
    first = -len(weight.view.leaf_shape)
    view = scan_view(weight.view) if first in weight.view.lead(weight.leaf.layout) else None
    if view is None:
        raise InputError(
            f"'{weight.path}' is scanned over an axis that is contracted or moved: expected a "
            "stacked axis in front. Put the layer axis first, or leave this path out of the "
            "targets."
        )
    return view


def _outside_scan(out: Any, is_carry: bool, xs: Sequence[Any]) -> Any:
    """A weight that a scan returns: constant in the carry, the scanned input itself stacked up."""
    if not isinstance(out, Weight):
        return out
    for x in xs:
        if isinstance(x, Weight) and x.leaf is out.leaf:
            if not is_carry and out.view == scan_view(x.view):
                return x
            return Unavailable(out.path, "is changed inside a scan")
    return out if is_carry else Unavailable(out.path, "is stacked by a scan")


def _while(eqn: JaxprEqn, values: list[Any], run: Run) -> list[Any]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = values[n_cond + n_body :]
    boxed, outputs = _Boxed(init), _Outputs()

    def state(carry: list[Any]) -> list[Any]:
        return [c if w is None else w for c, w in zip(carry, boxed.weights, strict=True)]

    def cond(carry: list[Any]) -> Any:
        return run(*open_jaxpr(eqn.params["cond_jaxpr"]), [*cond_consts, *state(carry)])[0]

    def body(carry: list[Any]) -> list[Any]:
        inner = [*body_consts, *state(carry)]
        outs = run(*open_jaxpr(eqn.params["body_jaxpr"]), inner)
        _check_carry(boxed.weights, outs)
        return outputs.close(outs, inner, inner)

    outs = lax.while_loop(cond, body, [None if isinstance(v, Special) else v for v in init])
    return outputs.join(outs)


def _cond(eqn: JaxprEqn, values: list[Any], run: Run) -> list[Any]:
    index, *operands = values
    boxed, joined = _Boxed(operands), _Outputs()
    found: list[list[Any]] = []

    def branch(jaxpr: Any) -> Callable[[list[Any]], list[Any]]:
        def body(tree: list[Any]) -> list[Any]:
            inner, outputs = boxed.open(tree), _Outputs()
            outs = outputs.close(run(*open_jaxpr(jaxpr), inner), inner, operands)
            found.append(outputs.outer)
            joined.outer = [_agree(*pair) for pair in zip(found[0], outputs.outer, strict=True)]
            found[0] = joined.outer
            return outs

        return body

    outs = lax.switch(index, [branch(b) for b in eqn.params["branches"]], boxed.tree)
    return joined.join(outs)


def _agree(one: Any, other: Any) -> Any:
    """An output of two branches: the same weight in both, or an array in both.

    Raises:
        InputError: it is a weight in one branch and an array in the other.
    """
    if one is None and other is None:
        return None
    if not (isinstance(one, Special) and isinstance(other, Special)):
        path = next(x.path for x in (one, other) if isinstance(x, Weight | Unavailable))
        raise InputError(
            f"'{path}' comes out of one branch of a conditional, and an array out of another: "
            "expected branches that use weights. Choose between results, or leave this path out "
            "of the targets."
        )
    if isinstance(one, Weight) and isinstance(other, Weight):
        if one.leaf is other.leaf and one.view == other.view:
            return one
    assert isinstance(one, Weight | Unavailable)
    return Unavailable(one.path, "is chosen or changed by a conditional")


CONTROL_FLOW = {
    jit_p: _inline("jaxpr"),
    custom_jvp_call_p: _inline("call_jaxpr"),
    custom_vjp_call_p: _inline("call_jaxpr"),
    remat_p: _remat,
    scan_p: _scan,
    while_p: _while,
    cond_p: _cond,
}
