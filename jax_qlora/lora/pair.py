# SPDX-License-Identifier: Apache-2.0
"""LoraPair, the trainable factors of one kernel."""

import dataclasses

import jax
import jax.numpy as jnp

from ..quant.layout import KernelLayout
from ..tree import pytree
from ..typing import Array, Float


@pytree(static=("layout", "scale", "dropout"))
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LoraPair:
    """The update `scale * (b @ a)` of a kernel folded to `[*lead, rows, cols]` (LoRA, equation 3).

    Attributes:
        a: Down projection `[*lead, rank, cols]`, float32; PEFT's `lora_A.weight`.
        b: Up projection `[*lead, rows, rank]`, float32, starts at zero; PEFT's `lora_B.weight`.
        layout: Which trailing axes of the kernel are contracted.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        dropout: Probability of zeroing an input of the update in training.
        magnitude: With DoRA the length of each output row, `[*lead, rows]`, float32; PEFT's
            `lora_magnitude_vector`. None: the sum of base and update is not rescaled.
    """

    a: Float[Array, "*lead rank cols"]
    b: Float[Array, "*lead rows rank"]
    layout: KernelLayout
    scale: float
    dropout: float
    magnitude: Float[Array, "*lead rows"] | None = None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.a.shape[-2]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading layer and expert axes."""
        return tuple(self.a.shape[:-2])

    def delta_rows(self) -> Float[Array, "*lead rows cols"]:
        """The update `scale * (b @ a)` as a dense float32 array in torch's layout."""
        b, a = self.b.astype(jnp.float32), self.a.astype(jnp.float32)
        return self.scale * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)

    def delta(self) -> Float[Array, "..."]:
        """The update as a dense float32 array in the kernel's own layout."""
        return self.layout.from_rows(self.delta_rows())

    def __repr__(self) -> str:
        if not hasattr(self.a, "shape"):  # a tree of something else, e.g. of masks
            return f"LoraPair(a={self.a!r}, b={self.b!r})"
        dropout = f", dropout {self.dropout}" * (self.dropout > 0)
        dora = ", DoRA" * (self.magnitude is not None)
        shape = (*self.lead, *self.layout.shape)
        return f"LoraPair(rank {self.rank} of {shape}, scale {self.scale:g}{dropout}{dora})"
