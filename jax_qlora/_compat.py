# SPDX-License-Identifier: Apache-2.0
"""The only importer of unstable jax: everything that differs between jax 0.10 and 0.12.

`lift` reads jaxprs, and jaxprs are not a stable format. Each shim names the version that lets it
go.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    "compiles_transfers",
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

# XLA of jax 0.10 decodes 4-bit codes inside a vector-matrix product, ten times slower than
# before it; a second row of zeros makes it a matmul. Remove when 0.11 is the oldest supported.
SLOW_VECTOR_MATRIX = jax.__version_info__ < (0, 11)

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


def compiles_transfers(device: Any, host: Any) -> bool:
    """Whether compiled code can copy between the memories of two shardings and back.

    jax 0.10's CPU backend lists the memory kind "pinned_host" and cannot compile a copy to it;
    jax 0.12's can. Returns True without asking when 0.12 is the oldest supported.
    """

    def there_and_back(x: Any) -> Any:
        return jax.device_put(jax.device_put(x, device) + jnp.float32(1), host)

    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=host)
    try:
        jax.jit(there_and_back, out_shardings=host).lower(x).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
