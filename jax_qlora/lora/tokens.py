# SPDX-License-Identifier: Apache-2.0
"""Trained rows of an embedding or head, for new tokens; all other rows stay frozen."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ..quant.layout import KernelLayout
from ..quant.matmul import dot
from ..tree import pytree
from ..typing import Array, Float
from .over_base import OverBase


@pytree(static=("indices", "layout"))
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class TokenRows:
    """Rows that replace those of a weight; PEFT's `trainable_token_indices`.

    Attributes:
        rows: `[tokens, cols]`, float32; they start as the weight's own.
        indices: Which rows of the weight they replace, each once.
        layout: Which axes of the weight are its rows: the vocabulary.
    """

    rows: Float[Array, "tokens cols"]
    indices: tuple[int, ...]
    layout: KernelLayout

    def __repr__(self) -> str:
        return f"TokenRows({len(self.indices)} rows of {self.layout.shape})"


@pytree()
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class TokenArray(OverBase):
    """A frozen weight of which some rows train, as one value; `attach` makes it.

    Attributes:
        base: Array or QuantizedArray.
        tokens: The rows that train.
    """

    base: Any
    tokens: TokenRows

    @property
    def layout(self) -> KernelLayout:
        """Which axes of the weight are its rows."""
        return self.tokens.layout

    def __repr__(self) -> str:
        return f"TokenArray({self.base!r}, {self.tokens!r})"


def replace_rows(tokens: TokenRows, found: Array, indices: Array) -> Array:
    """What a look-up finds, with the trained rows in place of the frozen ones.

    Args:
        tokens: The rows that train.
        found: `[*indices.shape, cols]`, from the frozen weight.
        indices: Row numbers that were looked up.
    """
    places = jnp.asarray(tokens.indices, indices.dtype)
    same = indices[..., None] == jnp.expand_dims(places, range(indices.ndim))
    rows = tokens.rows[jnp.argmax(same, axis=-1)].astype(found.dtype)
    return jnp.where(jnp.any(same, axis=-1)[..., None], rows, found)


def row_scores(tokens: TokenRows, x: Float[Array, "m cols"], dtype: Any) -> Array:
    """The products of `x` with the trained rows, `[m, tokens]`; sums are in float32.

    Args:
        tokens: The rows that train.
        x: Left operand; its dtype is the compute dtype.
        dtype: dtype of the result.
    """
    return dot(x, tokens.rows.astype(x.dtype), 1, 1, dtype)
