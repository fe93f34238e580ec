# SPDX-License-Identifier: Apache-2.0
"""What differs between the layers of a model beside their parameters, as data for the scan."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..typing import Array
from .config import DecoderConfig
from .rope import Angles

ALL = np.iinfo(np.int32).max
"""The window of a layer that sees all tokens."""


class PerLayer(NamedTuple):
    """One entry a layer, or None where layers do not differ.

    Attributes:
        window: int32 `[layers]`: how many tokens back a token sees, itself included.
        local: Bool `[layers]`: whether the layer uses the rotations of local layers.
    """

    window: Array | None
    local: Array | None

    def angles(self, angles: Angles, local_angles: Angles | None) -> Angles:
        """In the scan, where there is one layer: the rotations that are its own."""
        if local_angles is None or self.local is None:
            return angles
        cos, sin = (jnp.where(self.local, a, b) for a, b in zip(local_angles, angles, strict=True))
        return cos, sin


def per_layer(config: DecoderConfig) -> PerLayer:
    """Return the data of all layers, from a configuration."""
    window = local = None
    if config.sliding_window is not None:
        window = jnp.asarray([ALL if w is None else w for w in config.windows], jnp.int32)
    if config.local_rope_theta is not None:
        local = jnp.asarray([w is not None for w in config.windows])
    return PerLayer(window, local)
