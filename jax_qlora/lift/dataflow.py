# SPDX-License-Identifier: Apache-2.0
"""What becomes of parameters in a jaxpr: the analysis behind `find_targets`.

One pass of dataflow with two kinds of fact: a parameter under a view, and an activation with the
kernels whose results it holds. No names are guessed, so Dense, DenseGeneral, einsum kernels,
stacked layers and experts of any library are found alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._compat import (
    JaxprEqn,
    Literal,
    aval_of,
    cond_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    open_jaxpr,
    remat_p,
    scan_p,
    scan_parts,
    unstack_p,
    while_p,
)
from ..lora.targets import Convolution
from .views import (
    View,
    drop_axis,
    free_dims,
    gathered_view,
    lead_slice,
    match_lookup,
    scan_view,
    step_view,
    take_view,
)


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter, or a rearrangement of it.

    Attributes:
        path: Its path.
        view: The rearrangement.
        indexed: Axes of the parameter along which indices have been looked up: layers, experts.
    """

    path: str
    view: View
    indexed: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Activation:
    """A value computed from the inputs.

    Attributes:
        kernels: Those whose results reach the value without passing another kernel; a "?" after
            the path says that rows of it were looked up.
    """

    kernels: frozenset[str] = frozenset()


class OneHot:
    """Zeros and ones that compare integers: multiplying by them looks rows up."""


Fact = Param | Activation | OneHot | None  # None: integers, constants and what they make
_PLAIN, _ONE_HOT = Activation(), OneHot()


@dataclasses.dataclass
class Use:
    """How a parameter is used; `vocab` are the axes that an index or score runs over."""

    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    vocab: tuple[int, ...] = ()
    conv: Convolution | None = None


def fact_of_input(aval: Any) -> Fact:
    """Integer inputs (tokens, positions, labels) are no activations."""
    return None if jnp.issubdtype(aval.dtype, jnp.integer) else _PLAIN


class Dataflow:
    """Runs facts through a jaxpr and collects how each parameter is used."""

    def __init__(self) -> None:
        self.uses: dict[str, Use] = {}
        self.consumed: set[str] = set()  # kernels whose results another kernel multiplies
        self.routers: set[str] = set()  # kernels whose results choose, by top_k

    def run(self, jaxpr: Any, facts: Sequence[Fact]) -> list[Fact]:
        """The facts of a jaxpr's outputs, from those of its inputs; records uses on the way."""
        env: dict[Any, Fact] = dict(zip(jaxpr.invars, facts, strict=True))
        env.update((var, fact_of_input(aval_of(var))) for var in jaxpr.constvars)
        for eqn in jaxpr.eqns:
            ins = [None if isinstance(a, Literal) else env.get(a) for a in eqn.invars]
            env.update(zip(eqn.outvars, self._step(eqn, ins), strict=True))
        return [None if isinstance(a, Literal) else env.get(a) for a in jaxpr.outvars]

    def _step(self, eqn: JaxprEqn, ins: list[Fact]) -> list[Fact]:
        if eqn.primitive in _CALLS:
            return self.run(open_jaxpr(eqn.params[_CALLS[eqn.primitive]])[0], ins)
        if eqn.primitive is scan_p:
            return self._scan(eqn, ins)
        if eqn.primitive is while_p:
            n_cond, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            consts, init = ins[n_cond : n_cond + n], ins[n_cond + n :]
            body = open_jaxpr(eqn.params["body_jaxpr"])[0]
            return self._loop(body, consts, init, [])[0]
        if eqn.primitive is cond_p:
            branches = [self.run(open_jaxpr(b)[0], ins[1:]) for b in eqn.params["branches"]]
            return [_either(facts) for facts in zip(*branches, strict=True)]
        if eqn.primitive is lax.optimization_barrier_p:
            return ins
        if eqn.primitive is lax.top_k_p and isinstance(ins[0], Activation):
            self.routers |= ins[0].kernels
        if isinstance(ins[0] if ins else None, Param):
            out = _rearranged(eqn, ins[0])
            if out is not None:
                return [out] * len(eqn.outvars)
        if sum(isinstance(f, Param) for f in ins) == 1 and eqn.primitive in _RECORDS:
            out = _RECORDS[eqn.primitive](self, eqn, ins)
            if out is not None:
                return [out]
        if eqn.primitive is lax.eq_p and all(f is None for f in ins):
            return [_ONE_HOT]
        if eqn.primitive in _SHAPES and ins[0] is _ONE_HOT:
            return [_ONE_HOT]
        return [_join(ins)] * len(eqn.outvars)

    def _scan(self, eqn: JaxprEqn, ins: list[Fact]) -> list[Fact]:
        parts = scan_parts(eqn)
        start = parts.num_consts + parts.num_carry
        consts, init, xs = ins[: parts.num_consts], ins[parts.num_consts : start], ins[start:]
        sliced = [_sliced(x) for x in xs]
        carry, ys = self._loop(open_jaxpr(eqn.params["jaxpr"])[0], consts, init, sliced)
        whole = {s: x for s, x in zip(sliced, xs, strict=True) if isinstance(s, Param)}
        return carry + [whole.get(y, _PLAIN) if isinstance(y, Param) else y for y in ys]

    def _loop(
        self, body: Any, consts: list[Fact], carry: list[Fact], xs: list[Fact]
    ) -> tuple[list[Fact], list[Fact]]:
        """Runs a body until the facts of its carry stand still; gives those and the rest."""
        while True:
            outs = self.run(body, [*consts, *carry, *xs])
            joined = [_either(pair) for pair in zip(carry, outs, strict=False)]
            if joined == carry:
                return carry, outs[len(carry) :]
            carry = joined

    def _use(
        self,
        param: Param,
        kind: str,
        contract: Sequence[int],
        free: Sequence[int],
        batch: Sequence[int] = (),
        vocab: Sequence[int] = (),
        conv: Convolution | None = None,
    ) -> None:
        """Records a use, by the dimensions of the value that play each part in it.

        A look-up says more of a tied embedding than the matmul of its head.
        """

        def axes(dims: Sequence[int]) -> tuple[int, ...]:
            found = (param.view.origin[a] for d in dims for a in param.view.dims[d])
            return tuple(a for a in dict.fromkeys(found) if a not in param.indexed)

        parts = axes(contract), axes(free), axes(batch)
        if len({a for part in parts for a in part}) < sum(map(len, parts)):
            return  # an axis is cut, and its parts are used differently
        known = self.uses.get(param.path)
        if known is None or (kind == "embedding" and known.kind == "linear"):
            self.uses[param.path] = Use(kind, parts[0], parts[1], axes(vocab), conv)

    def _matmul(self, eqn: JaxprEqn, ins: list[Fact]) -> Fact:
        side = 0 if isinstance(ins[0], Param) else 1
        param, other = ins[side], ins[1 - side]
        assert isinstance(param, Param)
        contracts, batches = eqn.params["dimension_numbers"]
        contract, batch = contracts[side], batches[side]
        free = free_dims(param.view, batch, contract)
        if other is _ONE_HOT:
            self._use(param, "embedding", contract, free, batch, vocab=contract)
            return Activation(frozenset({param.path + "?"}))
        self._use(param, "linear", contract, free, batch)
        if isinstance(other, Activation):
            self.consumed |= other.kernels
        return Activation(frozenset({param.path}))

    def _gather(self, eqn: JaxprEqn, ins: list[Fact]) -> Fact:
        param = ins[0]
        plan = match_lookup(eqn, param.view) if isinstance(param, Param) else None
        if plan is None or not isinstance(param, Param):
            return None
        dims = param.view.dims
        rest = [d for d in range(len(dims)) if d != plan.dim]
        batch = aval_of(eqn.invars[1]).shape[:-1]
        if len(rest) > 1 and len(dims[plan.dim]) == 1:  # each index takes a layer or an expert
            indexed = param.indexed | {param.view.origin[dims[plan.dim][0]]}
            return Param(param.path, gathered_view(param.view, plan, batch), indexed)
        self._use(param, "embedding", rest, [plan.dim], vocab=[plan.dim])
        return Activation(frozenset({param.path + "?"}))

    def _conv(self, eqn: JaxprEqn, ins: list[Fact]) -> Fact:
        other, param = ins
        params = eqn.params
        if not isinstance(param, Param) or params["batch_group_count"] != 1:
            return None
        out, *rest = params["dimension_numbers"].rhs_spec
        conv = Convolution(
            dims=tuple(tuple(param.view.origin[a] for a in param.view.dims[d]) for d in rest),
            groups=params["feature_group_count"],
            dilated=any(n != 1 for n in (*params["lhs_dilation"], *params["rhs_dilation"])),
        )
        self._use(param, "conv", sorted(rest), [out], conv=conv)
        if isinstance(other, Activation):
            self.consumed |= other.kernels
        return Activation(frozenset({param.path}))

    def heads(self, outs: Sequence[Fact], shapes: Mapping[str, Sequence[int]]) -> set[str]:
        """Kernels whose results are an output's last, and score every row of an embedding."""
        vocabs = {shapes[path][a] for path, use in self.uses.items() for a in use.vocab}
        heads = set()
        for out in outs:
            kernels = out.kernels if isinstance(out, Activation) else frozenset()
            if any(path.endswith("?") for path in kernels):
                continue  # the sum of an embedding and of layers: hidden states, not scores
            for path in kernels - self.consumed:
                use = self.uses.get(path)
                if use and vocabs & {shapes[path][a] for a in use.vocab or use.out_axes}:
                    heads.add(path)
        return heads


_CALLS = {
    jit_p: "jaxpr",
    remat_p: "jaxpr",
    custom_jvp_call_p: "call_jaxpr",
    custom_vjp_call_p: "call_jaxpr",
}
_RECORDS: dict[Any, Any] = {
    lax.dot_general_p: Dataflow._matmul,
    lax.gather_p: Dataflow._gather,
    lax.conv_general_dilated_p: Dataflow._conv,
}
_SHAPES = (
    lax.convert_element_type_p,
    lax.reshape_p,
    lax.transpose_p,
    lax.broadcast_in_dim_p,
    lax.squeeze_p,
)


def _rearranged(eqn: JaxprEqn, param: Any) -> Param | None:
    if eqn.primitive is lax.stop_gradient_p:
        return param
    if eqn.primitive is unstack_p and len(param.view.dims[eqn.params["axis"]]) == 1:
        return dataclasses.replace(param, view=take_view(param.view, eqn.params["axis"]))
    axis = lead_slice(eqn, param.view)
    view = step_view(eqn, param.view) if axis is None else drop_axis(param.view, axis)
    return None if view is None else dataclasses.replace(param, view=view)


def _sliced(fact: Fact) -> Fact:
    if not isinstance(fact, Param):
        return fact
    view = scan_view(fact.view)
    return _PLAIN if view is None else dataclasses.replace(fact, view=view)


def _join(facts: Sequence[Fact]) -> Fact:
    """The fact of a value computed from several: it holds the results of all their kernels."""
    found = [f for f in facts if isinstance(f, Activation | Param)]
    kernels = [f.kernels for f in found if isinstance(f, Activation)]
    return Activation(frozenset().union(*kernels)) if found else None


def _either(facts: Sequence[Fact]) -> Fact:
    """The fact of a value that is one of several."""
    return facts[0] if all(f == facts[0] for f in facts) else _join(facts)
