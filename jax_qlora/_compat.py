# SPDX-License-Identifier: Apache-2.0
"""The only importer of unstable jax: everything that differs between jax 0.10 and 0.12.

`lift` reads jaxprs, and jaxprs are not a stable format. Each shim names the version that lets it
go.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import (
    cond_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    remat_p,
    scan_p,
    while_p,
)

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "aval_of",
    "bind_eqn",
    "cond_p",
    "custom_jvp_call_p",
    "custom_vjp_call_p",
    "jit_p",
    "open_jaxpr",
    "remat_p",
    "scan_p",
    "scan_parts",
    "unstack_p",
    "while_p",
]

# How `for layer in stacked` is traced since jax 0.11; before, as slices. Plain when 0.11 is oldest.
unstack_p: Any = getattr(lax, "unstack_p", None)


def aval_of(atom: Any) -> Any:
    """The abstract value (shape and dtype) of a variable or literal."""
    return atom.aval


def bind_eqn(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on `values` as `jax.core.eval_jaxpr` does; returns its outputs.

    jax 0.10: `get_bind_params` gives `(subfuns, params)`; jax 0.11 and later: `params` alone.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns: Sequence[Any] = ()
    if isinstance(params, tuple):  # jax 0.10; remove when 0.11 is the oldest supported
        subfuns, params = params
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """`(jaxpr, consts)` of a closed or an open jaxpr.

    jax 0.12 keeps an open `Jaxpr` in some equations where 0.10 keeps a `ClosedJaxpr`.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, list(getattr(jaxpr, "consts", ()))


class ScanParts(NamedTuple):
    """Where the constants, the carry and the scanned inputs stand among a scan's inputs."""

    num_consts: int
    num_carry: int


def scan_parts(eqn: JaxprEqn) -> ScanParts:
    """Counts the constants and the carry of a `scan` equation.

    jax 0.10 has `num_consts` and `num_carry`; from 0.11 on `ft_in` describes the input tree.
    """
    if "num_consts" in eqn.params:  # jax 0.10; remove when 0.11 is the oldest supported
        return ScanParts(eqn.params["num_consts"], eqn.params["num_carry"])
    consts, carry, _ = eqn.params["ft_in"].update(range(len(eqn.invars))).unpack()
    return ScanParts(len(list(consts)), len(list(carry)))
