# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_qlora.models import RopeScaling
from jax_qlora.models.presets import LLAMA_3_1_8B, TINY
from jax_qlora.models.rope import rope_angles, rope_frequencies, rotate


def test_scores_depend_on_distance_alone(key: jax.Array):
    q, k = jax.random.normal(key, (2, 1, 1, 1, TINY.head_dim))

    def score(i: int, j: int) -> jax.Array:
        at = [rope_angles(TINY, jnp.array([[p]])) for p in (i, j)]
        return jnp.sum(rotate(q, at[0]) * rotate(k, at[1]))

    np.testing.assert_allclose(score(5, 3), score(25, 23), rtol=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_rotation_is_float32_inside(key: jax.Array):
    x = jax.random.normal(key, (1, 4, 2, TINY.head_dim)).astype(jnp.bfloat16)
    angles = rope_angles(TINY, jnp.arange(1000, 1004)[None])
    wide = rotate(x.astype(jnp.float32), angles)
    np.testing.assert_array_equal(rotate(x, angles), wide.astype(jnp.bfloat16))


def test_llama3_scaling_by_the_rule_as_published():
    """Written as the Llama repository writes it: three cases of wavelength."""
    plain = rope_frequencies(dataclasses.replace(LLAMA_3_1_8B, rope_scaling=None))
    want = []
    for f in plain.astype(np.float64):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            want.append(f)
        elif wavelength > 8192 / 1:
            want.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(rope_frequencies(LLAMA_3_1_8B), want, rtol=1e-6)


def test_linear_scaling_divides_positions():
    scaled = dataclasses.replace(TINY, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    far, near = jnp.array([[32]]), jnp.array([[8]])
    np.testing.assert_allclose(rope_angles(scaled, far)[0], rope_angles(TINY, near)[0], rtol=1e-6)
