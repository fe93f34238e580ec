# SPDX-License-Identifier: Apache-2.0
"""LoraPair, the trainable factors of one kernel."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..quant.layout import KernelLayout
from ..tree import pytree
from ..typing import Array, Float


def split_parts(b: Array, parts: Sequence[tuple[int, int]], *, axis: int) -> list[Array]:
    """Cut what holds the rows of parts, one after the other, into those of each.

    Args:
        b: Holds them along `axis`.
        parts: First row and end of each in the kernel.
        axis: Where the rows are.
    """
    ends = list(itertools.accumulate(stop - start for start, stop in parts))
    return jnp.split(b, ends[:-1], axis=axis)


@pytree(static=("layout", "scale", "dropout", "parts"))
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LoraPair:
    """The update `scale * (b @ a)` of a kernel folded to `[*lead, rows, cols]` (LoRA, equation 3).

    Of a fused kernel some parts alone may be updated, each with factors of its own: then `a` holds
    the parts' down projections one under the other, `b` the rows of those parts, and all other rows
    stay as they are.

    Attributes:
        a: Down projection `[*lead, rank, cols]`, float32; PEFT's `lora_A.weight`. With parts,
            `rank` rows for each.
        b: Up projection `[*lead, rows, rank]`, float32, starts at zero; PEFT's `lora_B.weight`.
            With parts, their rows alone.
        layout: Which trailing axes of the kernel are contracted.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        dropout: Probability of zeroing an input of the update in training.
        magnitude: With DoRA the length of each output row, `[*lead, rows]`, float32; PEFT's
            `lora_magnitude_vector`. None: the sum of base and update is not rescaled.
        parts: First row and end of each updated part, ascending; empty: the whole kernel.
    """

    a: Float[Array, "*lead ranks cols"]
    b: Float[Array, "*lead rows rank"]
    layout: KernelLayout
    scale: float
    dropout: float
    magnitude: Float[Array, "*lead rows"] | None = None
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def rank(self) -> int:
        """Rank of the update; with parts, of each part's."""
        return self.b.shape[-1]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading layer and expert axes."""
        return tuple(self.a.shape[:-2])

    def by_part(self) -> dict[tuple[int, int], tuple[Array, Array]]:
        """The factors `(a, b)` of each part, by its first row and end; of a whole kernel one."""
        parts = self.parts or ((0, self.layout.rows),)
        a, b = jnp.split(self.a, len(parts), axis=-2), split_parts(self.b, parts, axis=-2)
        return dict(zip(parts, zip(a, b, strict=True), strict=True))

    def whole(self) -> "LoraPair":
        """The same update without parts: the rank is that of all parts, `b` block-diagonal.

        Trained on, it would also change what is zero here by construction.
        """
        if not self.parts:
            return self
        shape = (*self.lead, self.layout.rows, len(self.parts) * self.rank)
        b = jnp.zeros(shape, self.b.dtype)
        for i, ((start, stop), (_, own)) in enumerate(self.by_part().items()):
            b = b.at[..., start:stop, i * self.rank : (i + 1) * self.rank].set(own)
        return dataclasses.replace(self, b=b, parts=())

    def delta_rows(self) -> Float[Array, "*lead rows cols"]:
        """The update `scale * (b @ a)` as a dense float32 array in torch's layout."""
        b, a = self.whole().b.astype(jnp.float32), self.a.astype(jnp.float32)
        return self.scale * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)

    def delta(self) -> Float[Array, "..."]:
        """The update as a dense float32 array in the kernel's own layout."""
        return self.layout.from_rows(self.delta_rows())

    def __repr__(self) -> str:
        if not hasattr(self.a, "shape"):  # a tree of something else, e.g. of masks
            return f"LoraPair(a={self.a!r}, b={self.b!r})"
        rows = "".join(f", rows {start}:{stop}" for start, stop in self.parts)
        dropout = f", dropout {self.dropout}" * (self.dropout > 0)
        dora = ", DoRA" * (self.magnitude is not None)
        shape = (*self.lead, *self.layout.shape)
        return f"LoraPair(rank {self.rank} of {shape}{rows}, scale {self.scale:g}{dropout}{dora})"
