# SPDX-License-Identifier: Apache-2.0
"""The special values that travel through a lifted function."""

import dataclasses
from typing import Any

import jax

from ..lora.array import materialize
from ..typing import Array
from .interpreter import Special
from .views import View, drop_axis


@dataclasses.dataclass(frozen=True, eq=False)
class Weight(Special):
    """A weight that stands for a dense array, and the view of it taken so far.

    Attributes:
        leaf: QuantizedArray or LoraArray.
        view: How the value relates to the leaf.
        path: The leaf's path, for messages.
    """

    leaf: Any
    view: View
    path: str

    def dense(self) -> Array:
        """The value itself: decodes and sums the whole weight."""
        return self.view.apply(materialize(self.leaf))

    def under(self, view: View) -> "Weight":
        """The same weight under a later view, its lead axes cut as the view cuts them."""
        lead, leaf = self.view.lead(self.leaf.layout), self.leaf
        if len(view.lead(leaf.layout)) != len(lead):
            sizes = [view.leaf_shape[a] for a in view.lead(leaf.layout)]
            leaf = jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[len(lead) :]), leaf)
        return Weight(leaf, view, self.path)

    def take(self, axis: int, index: Any) -> "Weight":
        """One index of a lead axis; every child of the leaf has the lead axes in front."""
        position = axis + len(self.view.leaf_shape)
        leaf = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, position, keepdims=False), self.leaf
        )
        return Weight(leaf, drop_axis(self.view, axis), self.path)

    def gather(self, axis: int, indices: Array) -> Any:
        """The leaf with the axes of `indices` for a lead axis; an index out of range is clipped."""
        position = axis + len(self.view.leaf_shape)
        cut = (slice(None),) * position
        return jax.tree.map(lambda x: x.at[(*cut, indices)].get(mode="clip"), self.leaf)


@dataclasses.dataclass(frozen=True, eq=False)
class Unavailable(Special):
    """A changed weight that leaves a loop or branch: an error only if somebody reads it."""

    path: str
    why: str
