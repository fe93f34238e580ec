# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a tree get a gradient, for derivatives that are written by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..tree import pytree
from ..typing import Array, PyTree


@pytree(static=("flags",))
@dataclasses.dataclass(frozen=True)
class Trained:
    """Which leaves get a gradient, in order: static, but carried among the residuals."""

    flags: tuple[bool, ...]

    def split(self, tree: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
        """Return the leaves that get a gradient, and a function that puts such back in place."""
        leaves, treedef = jax.tree.flatten(tree)
        trained = [leaf for leaf, flag in zip(leaves, self.flags, strict=True) if flag]

        def put_back(trained: list[Array]) -> PyTree:
            given = iter(trained)
            pairs = zip(leaves, self.flags, strict=True)
            return jax.tree.unflatten(treedef, [next(given) if f else leaf for leaf, f in pairs])

        return trained, put_back

    def cotangents(self, grads: list[Array], like: PyTree) -> PyTree:
        """Return the tree's cotangent: `grads` in their places, None elsewhere."""
        given = iter(grads)
        filled = [next(given) if flag else None for flag in self.flags]
        return jax.tree.unflatten(jax.tree.structure(like), filled)


def find_trained(tree: PyTree) -> Trained:
    """Read off which leaves are differentiated.

    Args:
        tree: An argument of the forward function of a `custom_vjp` with `symbolic_zeros`.
    """
    return Trained(tuple(leaf.perturbed for leaf in jax.tree.leaves(tree)))


def values_of(tree: PyTree) -> Any:
    """Return the arrays of such an argument."""
    return jax.tree.map(lambda leaf: leaf.value, tree)


def instantiate(cotangent: Any) -> Array:
    """Return the cotangent given to the backward function of such a `custom_vjp` as an array."""
    if isinstance(cotangent, SymbolicZero):
        shape: Any = cotangent.aval
        return jnp.zeros(shape.shape, shape.dtype)
    return cotangent


def zeros_of(trained: list[Array]) -> list[Array]:
    """Return where to sum gradients: in float32 at least."""
    return [jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) for a in trained]


def add(total: list[Array], more: list[Array]) -> list[Array]:
    """Return the sums, in the dtypes of `total`."""
    return [a + b.astype(a.dtype) for a, b in zip(total, more, strict=True)]


def cast_like(grads: list[Array], trained: list[Array]) -> list[Array]:
    """Return sums of gradients in the dtypes of what they are gradients of."""
    return [g.astype(a.dtype) for g, a in zip(grads, trained, strict=True)]
