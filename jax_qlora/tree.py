# SPDX-License-Identifier: Apache-2.0
"""Parameter trees: paths as "a/b/c", partition and combine, and plain-dataclass pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import tree_util as jtu

from .errors import InputError

T = TypeVar("T", bound=type)


def pytree(*, static: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Registers a dataclass as a pytree whose fields are children, except those named `static`.

    Unflattening goes around `__init__`: jax fills trees with tracers, booleans and shapes, which no
    constructor could validate. Validate in the functions that build the value.

    Args:
        static: Names of hashable fields kept in the tree's structure.
    """

    def register(cls: T) -> T:
        names = [f.name for f in dataclasses.fields(cls)]
        children = tuple(n for n in names if n not in static)

        def flatten_with_keys(x: Any):
            keyed = [(jtu.GetAttrKey(n), getattr(x, n)) for n in children]
            return keyed, tuple(getattr(x, n) for n in static)

        def flatten(x: Any):
            return [getattr(x, n) for n in children], tuple(getattr(x, n) for n in static)

        def unflatten(aux: tuple[Any, ...], values: Any) -> Any:
            x = object.__new__(cls)
            for name, value in (
                *zip(static, aux, strict=True),
                *zip(children, values, strict=True),
            ):
                object.__setattr__(x, name, value)
            return x

        jtu.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


class Absent:
    """Marks a leaf that `partition` moved to the other tree. It has no leaves of its own.

    A named sentinel, not `None`, which may already mean something in the tree.
    """

    def __repr__(self) -> str:
        return "ABSENT"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent)

    def __hash__(self) -> int:
        return hash(Absent)


ABSENT = Absent()
jtu.register_pytree_node(Absent, lambda _: ((), None), lambda _, __: ABSENT)


def _is_absent(x: Any) -> bool:
    return isinstance(x, Absent)


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as "layers/attn/kernel".

    >>> path_name((jtu.DictKey("layers"), jtu.SequenceKey(0), jtu.GetAttrKey("kernel")))
    'layers/0/kernel'
    """
    return jtu.keystr(path, simple=True, separator="/")


def _is_box(x: Any) -> bool:
    """Whether `x` is a node that only wraps one value, as Flax's variables do."""
    if x is None or isinstance(x, dict | list | tuple):
        return False
    keyed = jtu.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    if len(keyed) != 1 or len(keyed[0][0]) != 1:
        return False
    key = keyed[0][0][0]
    return isinstance(key, jtu.GetAttrKey) and key.name in ("value", "raw_value")


def flatten_with_path(
    tree: Any, *, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """`jax.tree_util.tree_flatten_with_path`, without the keys of boxes round single values.

    Flax holds a value in a Variable or a Partitioned: so a kernel has the same path in a State, a
    Module and a plain dictionary.
    """
    keyed, treedef = jtu.tree_flatten_with_path(tree, is_leaf=is_leaf)
    boxes = set()

    def stop(x: Any) -> bool:
        return (is_leaf is not None and is_leaf(x)) or _is_box(x)

    for path, node in jtu.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        if not (is_leaf is not None and is_leaf(node)) and _is_box(node):
            boxes.add(path)
    if boxes:
        keyed = [
            (tuple(k for i, k in enumerate(path) if path[:i] not in boxes), leaf)
            for path, leaf in keyed
        ]
    return keyed, treedef


def flatten_paths(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of `tree` by path name, in tree order.

    >>> flatten_paths({"a": {"b": 1, "c": 2}})
    {'a/b': 1, 'a/c': 2}

    Raises:
        InputError: two leaves have the same path name.
    """
    out: dict[str, Any] = {}
    for path, leaf in flatten_with_path(tree, is_leaf=is_leaf)[0]:
        name = path_name(path)
        if name in out:
            raise InputError(
                f"two leaves of the tree have the path '{name}': expected distinct paths. "
                "Rename one of the two (a key that contains '/' can collide with a nested one)."
            )
        out[name] = leaf
    return out


def map_with_path(
    f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`jax.tree.map` whose function also receives the leaf's path name, first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a/b=1'}}
    """
    keyed, treedef = flatten_with_path(tree, is_leaf=is_leaf)
    columns = [treedef.flatten_up_to(other) for other in rest]
    mapped = [
        f(path_name(path), leaf, *others)
        for (path, leaf), *others in zip(keyed, *columns, strict=True)
    ]
    return jtu.tree_unflatten(treedef, mapped)


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Splits `tree` in two of the same structure: where `mask` is true, and the rest.

    `combine(*partition(tree, mask)) == tree`. Leaves that went to the other side are `ABSENT`,
    which has no leaves, so `jax.grad` and optax see only what is there.

    Args:
        tree: Any pytree.
        mask: A tree of booleans that is a prefix of `tree`, or a function `(path, leaf) -> bool`.

    Returns:
        `(selected, rest)`.

    >>> partition({"w": 1, "lora": 2}, lambda path, x: path == "lora")
    ({'lora': 2, 'w': ABSENT}, {'lora': ABSENT, 'w': 1})
    """
    if callable(mask):
        mask = map_with_path(lambda path, x: bool(mask(path, x)), tree)
    # a prefix mask decides for whole subtrees
    full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: bool(m), sub), mask, tree)
    selected = jax.tree.map(lambda m, x: x if m else ABSENT, full, tree)
    rest = jax.tree.map(lambda m, x: ABSENT if m else x, full, tree)
    return selected, rest


def combine(*trees: Any) -> Any:
    """Joins trees made by `partition`: the one leaf that is present at each place.

    Raises:
        InputError: a leaf is present in two trees (names the path), or no tree is given.

    >>> combine({"a": 1, "b": ABSENT}, {"a": ABSENT, "b": 2})
    {'a': 1, 'b': 2}
    """
    if not trees:
        raise InputError("combine() got no tree: expected at least one. Pass the parts to join.")

    def pick(path: str, *leaves: Any) -> Any:
        present = [x for x in leaves if not _is_absent(x)]
        if len(present) > 1:
            raise InputError(
                f"'{path}' is present in {len(present)} of the trees to combine: expected one. "
                "Combine trees that `partition` made from one tree, with disjoint masks."
            )
        return present[0] if present else ABSENT

    return map_with_path(pick, *trees, is_leaf=_is_absent)


def nbytes(tree: Any) -> int:
    """Bytes held by the array leaves of `tree`; works on shapes (`jax.eval_shape`) too."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "shape") and hasattr(x, "dtype")
    )
