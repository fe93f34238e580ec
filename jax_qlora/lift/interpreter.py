# SPDX-License-Identifier: Apache-2.0
"""The textbook jaxpr interpreter: read, write, env, eqn. It knows no LoRA and no quantization.

Equations whose inputs are ordinary values are bound as they are, so the interpreter is itself
traceable by every jax transform. An equation that meets a `Special` value goes to `handle`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .._compat import JaxprEqn, Literal, bind_eqn

Handle = Callable[[JaxprEqn, list[Any]], list[Any]]


class Special:
    """A value that no primitive can take: a stand-in for a weight, with its path for messages."""

    path: str


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], *, handle: Handle
) -> list[Any]:
    """Evaluates an open jaxpr on values of which some are `Special`.

    Args:
        jaxpr: The jaxpr.
        consts: Values of its `constvars`.
        args: Values of its `invars`.
        handle: What to do with an equation that has a `Special` input: gives its outputs.

    Returns:
        The outputs, of which some may be `Special`.
    """
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        special = any(isinstance(v, Special) for v in values)
        outs = handle(eqn, values) if special else bind_eqn(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
