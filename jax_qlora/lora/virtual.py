# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens as an entry of an adapter: arrays that the base does not have."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..tree import pytree
from ..typing import Array, Float, PyTree


@pytree()
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class VirtualTokens:
    """What a model takes for tokens that no text has; `attach` adds it to the base, at its path.

    Attributes:
        values: float32. Of a prompt their embeddings, `[tokens, d_model]`; of a prefix their keys
            or their values, `[layers, tokens, n_kv_heads, head_dim]`.
    """

    values: Float[Array, "*shape"]

    def __repr__(self) -> str:
        return f"VirtualTokens{tuple(self.values.shape)}"


def split_virtual(adapter: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, VirtualTokens]]:
    """An adapter in two: what changes weights, and the virtual tokens.

    Args:
        adapter: Any adapter.
    """
    virtual = {path: x for path, x in adapter.items() if isinstance(x, VirtualTokens)}
    return {path: x for path, x in adapter.items() if path not in virtual}, virtual


def add_leaves(tree: PyTree, virtual: Mapping[str, VirtualTokens]) -> PyTree:
    """The tree with the values of virtual tokens at their paths; nothing is copied.

    Args:
        tree: A nested dict.
        virtual: By path, whose last part but one may be new as well.

    Raises:
        InputError: the tree has a leaf there, or is none that such tokens are for.
    """
    for path, entry in virtual.items():
        tree = _with_leaf(tree, path.split("/"), entry.values, path)
    return tree


def refuse_virtual(adapter: Mapping[str, Any], what: str) -> None:
    """Checks that an adapter has no virtual tokens.

    Args:
        adapter: The adapter.
        what: What cannot be done with them.

    Raises:
        InputError: it has.
    """
    if found := split_virtual(adapter)[1]:
        raise InputError(
            f"{what}: expected updates of weights alone, found the virtual tokens "
            f"{', '.join(map(repr, found))}, which are no part of any weight. Leave them out: "
            "jax_qlora.lora.split_virtual(adapter)[0]."
        )


def _with_leaf(tree: Any, keys: list[str], values: Array, path: str) -> dict[str, Any]:
    key, *rest = keys
    if not isinstance(tree, dict) or len(rest) > 1 and key not in tree:
        raise InputError(
            f"the virtual tokens '{path}' have no place in the parameters: expected the nested "
            f"dict of a decoder. They are for another model."
        )
    if not rest and key in tree:
        raise InputError(
            f"'{path}' has virtual tokens attached already: expected a frozen base. Attach to the "
            "base."
        )
    return {**tree, key: _with_leaf(tree.get(key, {}), rest, values, path) if rest else values}
