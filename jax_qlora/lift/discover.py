# SPDX-License-Identifier: Apache-2.0
"""find_targets: which parameters a function multiplies by, read from its jaxpr.

One pass of dataflow over the jaxpr with two kinds of fact: a parameter under a view, and an
activation with the kernel it was last multiplied by. No names are guessed, so Dense, DenseGeneral,
einsum kernels, stacked layers and experts of any library are found alike.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from .._compat import (
    JaxprEqn,
    Literal,
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
from ..lora.array import is_special
from ..lora.targets import Match, Target, Targets, select_targets
from ..quant.layout import KernelLayout
from ..tree import flatten_paths
from ..typing import PyTree
from .views import (
    View,
    drop_axis,
    free_dims,
    identity_view,
    lead_slice,
    match_lookup,
    scan_view,
    step_view,
)


@dataclasses.dataclass(frozen=True)
class _Param:
    """A parameter, or a rearrangement of it."""

    path: str
    view: View


@dataclasses.dataclass(frozen=True)
class _Activation:
    """A value computed from the inputs; `kernel` if it depends on one matmul's result alone."""

    kernel: str | None


_Fact = _Param | _Activation | None  # None: constants, integers, and values of parameters alone
_MIXED = _Activation(None)


@dataclasses.dataclass
class _Use:
    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]


def find_targets(
    apply: Callable[..., Any],
    params: PyTree,
    *args: Any,
    match: Match = "all-linear",
    **kwargs: Any,
) -> Targets:
    """Finds the kernels of a model and chooses those to quantize or adapt.

    The model is traced on shapes only. A parameter is a kernel if it is an operand of a matmul with
    an activation ("linear"), if rows of it are looked up ("embedding"), or if it is convolved with
    ("conv").

    Args:
        apply: The model, `apply(params, *args, **kwargs)`.
        params: Its parameters: arrays or shapes (`jax.eval_shape`), or a quantized base.
        *args: Example inputs, arrays or shapes.
        match: "all-linear" (all matmul kernels but the output head), a list of names or name
            suffixes, or a regular expression; see `select_targets`.
        **kwargs: Passed to `apply`.

    Returns:
        The chosen kernels with their contracted, output and stacked axes; prints as a table.

    Raises:
        InputError: a name or pattern matches nothing (nearest names are listed).

    >>> import jax.numpy as jnp
    >>> targets = find_targets(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 8))}, jnp.ones((2, 4)))
    >>> targets
    path  shape  dtype    use     target
    ----  -----  -------  ------  ------
    w     4x8    float32  linear  yes
    """
    leaves = flatten_paths(params, is_leaf=is_special)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves.values()]
    treedef = jax.tree.structure(params, is_leaf=is_special)
    static = [x for x in jax.tree.leaves((args, kwargs))]
    arrays = [i for i, x in enumerate(static) if hasattr(x, "shape") and hasattr(x, "dtype")]
    in_tree = jax.tree.structure((args, kwargs))

    def flat(param_leaves: list[Any], inputs: list[Any]) -> Any:
        filled = list(static)
        for i, x in zip(arrays, inputs, strict=True):
            filled[i] = x
        call_args, call_kwargs = jax.tree.unflatten(in_tree, filled)
        return apply(jax.tree.unflatten(treedef, param_leaves), *call_args, **call_kwargs)

    closed = jax.make_jaxpr(flat)(shapes, [static[i] for i in arrays])
    facts: list[_Fact] = [
        _Param(path, identity_view(x.shape, x.dtype))
        for path, x in zip(leaves, shapes, strict=True)
    ]
    inputs = closed.jaxpr.invars[len(facts) :]
    facts += [_of_input(var.aval) for var in inputs]
    flow = _Dataflow()
    outs = flow.run(closed.jaxpr, facts)
    heads = flow.heads(outs, leaves)
    found = [_target(path, leaves[path], use, path in heads) for path, use in flow.uses.items()]
    order = list(leaves)
    found = sorted((t for t in found if t is not None), key=lambda t: order.index(t.path))
    return select_targets(found, match)


def _of_input(aval: Any) -> _Fact:
    """Integer inputs (tokens, positions, labels) do not make a value an activation of their own."""
    return _MIXED if jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact) else None


def _target(path: str, leaf: Any, use: _Use, head: bool) -> Target | None:
    axes = use.in_axes + use.out_axes
    trailing = set(range(-len(axes), 0))
    if set(axes) != trailing or not use.in_axes or not use.out_axes:
        return None  # stacked axes are not in front: no layout of rows and cols
    shape = tuple(leaf.shape)
    layout = KernelLayout(shape=shape[-len(axes) :], in_axes=tuple(sorted(use.in_axes)))
    return Target(
        path=path, shape=shape, dtype=leaf.dtype.name, layout=layout, kind=use.kind, head=head
    )


class _Dataflow:
    """Runs facts through a jaxpr and collects how each parameter is used."""

    def __init__(self) -> None:
        self.uses: dict[str, _Use] = {}
        self.multiplied: set[str] = set()  # kernels with a matmul, also if looked up first

    def run(self, jaxpr: Any, facts: Sequence[_Fact]) -> list[_Fact]:
        env: dict[Any, _Fact] = dict(zip(jaxpr.invars, facts, strict=True))
        for eqn in jaxpr.eqns:
            ins = [None if isinstance(a, Literal) else env.get(a) for a in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, ins), strict=True))
        return [None if isinstance(a, Literal) else env.get(a) for a in jaxpr.outvars]

    def step(self, eqn: JaxprEqn, ins: list[_Fact]) -> list[_Fact]:
        n = len(eqn.outvars)
        if eqn.primitive in _CALLS:
            return self.run(open_jaxpr(eqn.params[_CALLS[eqn.primitive]])[0], ins)
        if eqn.primitive is scan_p:
            return self.scan(eqn, ins)
        if eqn.primitive is while_p:
            consts = eqn.params["cond_nconsts"]
            return self.run(open_jaxpr(eqn.params["body_jaxpr"])[0], ins[consts:])
        if eqn.primitive is cond_p:
            branches = [self.run(open_jaxpr(b)[0], ins[1:]) for b in eqn.params["branches"]]
            return [_join(facts) for facts in zip(*branches, strict=True)]
        params = [f for f in ins if isinstance(f, _Param)]
        if params and isinstance(ins[0], _Param) and (out := _rearranged(eqn, ins[0])):
            return [out]
        if len(params) == 1:
            record = _RECORDS.get(eqn.primitive)
            if record and (out := record(self, eqn, ins)) is not None:
                return [out]
        return [_join(ins)] * n

    def scan(self, eqn: JaxprEqn, ins: list[_Fact]) -> list[_Fact]:
        parts = scan_parts(eqn)
        start = parts.num_consts + parts.num_carry
        inner = [_sliced(f) if i >= start else f for i, f in enumerate(ins)]
        outs = self.run(open_jaxpr(eqn.params["jaxpr"])[0], inner)
        back = {
            s: f for s, f in zip(inner[start:], ins[start:], strict=True) if isinstance(s, _Param)
        }
        carry = [
            init if init == out else _join([init, out])
            for init, out in zip(ins[parts.num_consts : start], outs, strict=False)
        ]
        stacked = [back.get(f) if isinstance(f, _Param) else f for f in outs[parts.num_carry :]]
        return carry + stacked

    def matmul(self, eqn: JaxprEqn, ins: list[_Fact]) -> _Fact:
        side = 0 if isinstance(ins[0], _Param) else 1
        param = ins[side]
        assert isinstance(param, _Param)
        contracts, batches = eqn.params["dimension_numbers"]
        contract, batch = contracts[side], batches[side]
        free = free_dims(param.view, batch, contract)
        axes = [tuple(a for d in dims for a in param.view.dims[d]) for dims in (contract, free)]
        self.multiplied.add(param.path)
        self.uses.setdefault(param.path, _Use("linear", *axes))
        return _Activation(param.path)

    def gather(self, eqn: JaxprEqn, ins: list[_Fact]) -> _Fact:
        param = ins[0]
        plan = match_lookup(eqn, param.view) if isinstance(param, _Param) else None
        if plan is None or not isinstance(param, _Param):
            return None
        rest = [a for d, dim in enumerate(param.view.dims) if d != plan.dim for a in dim]
        self.uses[param.path] = _Use("embedding", tuple(rest), param.view.dims[plan.dim])
        return _MIXED

    def conv(self, eqn: JaxprEqn, ins: list[_Fact]) -> _Fact:
        param = ins[1]
        if not isinstance(param, _Param):
            return None
        out_dim, *rest = eqn.params["dimension_numbers"].rhs_spec
        ins_axes = tuple(a for d in sorted(rest) for a in param.view.dims[d])
        self.uses.setdefault(param.path, _Use("conv", ins_axes, param.view.dims[out_dim]))
        return _Activation(param.path)

    def heads(self, outs: Sequence[_Fact], leaves: dict[str, Any]) -> set[str]:
        """Kernels whose result is the output, and gives a score to every row of an embedding."""
        vocab = {
            leaves[path].shape[a]
            for path, use in self.uses.items()
            if use.kind == "embedding"
            for a in use.out_axes
        }
        heads = set()
        for out in outs:
            path = out.kernel if isinstance(out, _Activation) else None
            use = self.uses.get(path) if path else None
            if path and use and vocab & {leaves[path].shape[a] for a in use.out_axes}:
                heads.add(path)
        return heads


_CALLS = {
    jit_p: "jaxpr",
    remat_p: "jaxpr",
    custom_jvp_call_p: "call_jaxpr",
    custom_vjp_call_p: "call_jaxpr",
}
_RECORDS: dict[Any, Any] = {
    lax.dot_general_p: _Dataflow.matmul,
    lax.gather_p: _Dataflow.gather,
    lax.conv_general_dilated_p: _Dataflow.conv,
}


def _rearranged(eqn: JaxprEqn, param: _Param) -> _Param | None:
    axis = lead_slice(eqn, param.view)
    view = step_view(eqn, param.view) if axis is None else drop_axis(param.view, axis)
    return None if view is None else _Param(param.path, view)


def _sliced(fact: _Fact) -> _Fact:
    if not isinstance(fact, _Param):
        return fact
    view = scan_view(fact.view)
    return None if view is None else _Param(fact.path, view)


def _join(facts: Sequence[_Fact]) -> _Fact:
    """The fact of a value computed from several.

    One kernel's result stays that under element-wise operations with constants and parameters, and
    is mixed with any other activation.
    """
    activations = {f for f in facts if isinstance(f, _Activation)}
    if len(activations) > 1:
        return _MIXED
    return next(iter(activations), None)
