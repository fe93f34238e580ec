# SPDX-License-Identifier: Apache-2.0
"""Which leaves train, which decay, and which are the B of a LoRA pair."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..lora import LoraPair
from ..tree import map_with_path
from ..typing import PyTree

# Leaves that never decay: the last name of a path, in the decoder's and in PEFT's vocabulary.
_NO_DECAY = ("bias", "scale", "magnitude")


def train_only(
    optimizer: optax.GradientTransformation,
    mask: PyTree | Callable[[PyTree], PyTree],
) -> optax.GradientTransformation:
    """Return `optimizer` for the leaves where `mask` is true; all others stand still.

    For users who keep one joined tree. Frozen leaves get no optimizer state, whatever gradient
    they come with (also the `float0` of integer leaves), and an update of exact zero in their own
    type, so that `optax.apply_updates` leaves them as they are, bit for bit.

    Args:
        optimizer: what the selected leaves are trained with.
        mask: a tree of bools with the structure of the parameters, or a function that makes one,
            such as `lora_mask`.
    """

    def labels(params: PyTree) -> PyTree:
        chosen = mask(params) if callable(mask) else mask
        return jax.tree.map(lambda train: "train" if train else "freeze", chosen)

    return optax.partition({"train": optimizer, "freeze": _stand_still()}, labels)


def lora_mask(params: PyTree) -> PyTree:
    """Return True for the leaves of every `LoraPair`, False for all others.

    Args:
        params: any tree, for example `attach(base, adapter)`.
    """
    return _mark_pairs(params, lambda name: True)


def lora_b_mask(params: PyTree) -> PyTree:
    """Return True for the `b` matrix of every `LoraPair`, False for all others.

    Args:
        params: any tree, for example an adapter.
    """
    return _mark_pairs(params, lambda name: name == "b")


def decay_mask(params: PyTree) -> PyTree:
    """Return True for the leaves that weight decay acts on: all but norms, biases, magnitudes.

    Args:
        params: any tree; a leaf is judged by the last name of its path.
    """
    return map_with_path(lambda path, _: path.rpartition("/")[2] not in _NO_DECAY, params)


def _mark_pairs(params: PyTree, chosen: Callable[[str], bool]) -> PyTree:
    def mark(node: Any) -> Any:
        if isinstance(node, LoraPair):
            return map_with_path(lambda name, _: chosen(name), node)
        return False

    return jax.tree.map(mark, params, is_leaf=lambda node: isinstance(node, LoraPair))


def _stand_still() -> optax.GradientTransformation:
    """Return updates of exact zero in the type of each parameter, whatever the gradient is."""

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
        return jax.tree.map(jnp.zeros_like, updates if params is None else params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
