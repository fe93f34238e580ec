# SPDX-License-Identifier: Apache-2.0
"""Walks a jaxpr: the shapes in it, and dense weights, which a lifted function must never make."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_qlora._compat import ClosedJaxpr, Jaxpr, aval_of, open_jaxpr

# the one place where a kernel is decoded: the matmul against it
EXEMPT = "_product"


def equations(jaxpr: Any, exempt: str = EXEMPT) -> Iterator[Any]:
    """All equations, those of inner jaxprs too, but not those of the function named `exempt`."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        if eqn.params.get("name") == exempt:
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from equations(inner, exempt)


def shapes_of(f: Any, *args: Any) -> set[tuple[int, ...]]:
    """Shapes of all values that `f` computes."""
    jaxpr = jax.make_jaxpr(f)(*args)
    return {aval_of(v).shape for e in equations(jaxpr) for v in e.outvars}


def weight_sizes(targets: Any) -> set[int]:
    """Numbers of elements of the target kernels: of one, and of a stack along any lead axes."""
    sizes = set()
    for target in targets.values():
        kernel = int(np.prod(target.layout.shape))
        sizes |= {kernel * int(np.prod(target.lead[i:])) for i in range(len(target.lead) + 1)}
    return sizes


def dense_weights(f: Any, *args: Any, sizes: Collection[int], exempt: str = EXEMPT) -> list[str]:
    """The equations of `f(*args)` that make a floating-point value of as many elements as a weight.

    Whatever its shape: transposed, reshaped, cast. The caller picks activations of other sizes.
    """
    found = []
    for eqn in equations(jax.make_jaxpr(f)(*args), exempt):
        for var in eqn.outvars:
            aval = aval_of(var)
            if jnp.issubdtype(getattr(aval, "dtype", np.int8), jnp.floating):
                if _size(aval.shape) in sizes and eqn.params.get("name") != exempt:
                    found.append(f"{eqn.primitive.name} -> {aval}")
    return found


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
