# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: the frequencies of a configuration, and the rotation itself, in float32."""

import math

import jax.numpy as jnp
import numpy as np

from ..typing import Array, Float, Int
from .config import DecoderConfig, RopeScaling

Angles = tuple[Array, ...]
"""Cosines and sines, float32 `[batch, seq, head_dim / 2]`; empty where nothing is rotated."""


def rope_frequencies(config: DecoderConfig, *, local: bool = False) -> Float[np.ndarray, " half"]:
    """Return the angular frequency of each pair of a head's features.

    Args:
        config: The model; its `head_dim`, `rope_theta` and `rope_scaling` are used.
        local: For layers that see only a window, if those have a `local_rope_theta`.

    Returns:
        Radians per position, highest first, `head_dim / 2` of them, float32.

    References:
        Su et al., RoFormer (arXiv 2104.09864), section 3.2.2.
    """
    own = config.local_rope_theta if local else None
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / (own or config.rope_theta) ** exponents).astype(np.float32)
    if config.rope_scaling is None or own is not None:
        return frequencies
    return scale_frequencies(frequencies, config.rope_scaling)


def scale_frequencies(
    frequencies: Float[np.ndarray, " half"], scaling: RopeScaling
) -> Float[np.ndarray, " half"]:
    """Stretch rotary frequencies for a longer context.

    Args:
        frequencies: Radians per position.
        scaling: The rule.

    Returns:
        The stretched frequencies, float32.

    References:
        `_compute_llama3_parameters` and `_compute_linear_scaling_rope_parameters` in
        `transformers/modeling_rope_utils.py`.
    """
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_length / wavelengths - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)  # 0: a long wavelength, stretched in full
    return ((1 - blend) * stretched + blend * frequencies).astype(np.float32)


def rope_angles(
    config: DecoderConfig, positions: Int[Array, "batch seq"], *, local: bool = False
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Return the cosines and sines that `rotate` takes, float32.

    Args:
        config: The model.
        positions: The position of each token in its document, from 0.
        local: As in `rope_frequencies`.
    """
    frequencies = rope_frequencies(config, local=local)[None, None]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def all_angles(
    config: DecoderConfig, positions: Int[Array, "batch seq"]
) -> tuple[Angles, Angles | None]:
    """Return `rope_angles` of global layers, and those of local ones if they are others."""
    if config.learned_positions:
        return (), None
    angles = rope_angles(config, positions)
    if config.local_rope_theta is None:
        return angles, None
    return angles, rope_angles(config, positions, local=True)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    angles: Angles,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + head_dim/2) of every head, as Hugging Face checkpoints expect.

    Args:
        x: Queries or keys.
        angles: Cosines and sines from `rope_angles`; empty: `x` stays as it is.

    Returns:
        The rotated `x`, in its own dtype; the arithmetic is float32.
    """
    if not angles:
        return x
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
