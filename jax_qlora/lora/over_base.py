# SPDX-License-Identifier: Apache-2.0
"""What a value over a frozen weight has of it, and what it says when it is taken for an array."""

from typing import Any

from ..errors import InputError
from ..typing import Array


class OverBase:
    """A value that stands for a frozen weight, `base`, and something that trains over it."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the weight, not of what trains (which is float32)."""
        return self.base.dtype

    def __jax_array__(self) -> Array:
        raise InputError(
            f"{self!r} was used as an array: expected a function run by jax_qlora.lift, found jax "
            "applied to the adapted kernel itself. Call lift(f)(params, ...) instead of "
            "f(params, ...), or make it dense with jax_qlora.merge."
        )
