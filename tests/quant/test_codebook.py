# SPDX-License-Identifier: Apache-2.0
"""The tables: equal to bitsandbytes', and derived again from what defines them."""

from statistics import NormalDist

import numpy as np
import pytest

from jax_qlora.quant.codebook import (
    CODEBOOKS,
    DYNAMIC_BOUNDARIES,
    DYNAMIC_MAP,
    UNSIGNED_DYNAMIC_MAP,
)
from tests.helpers import golden


@pytest.fixture(scope="module")
def tables():
    return golden("tables.npz")


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_levels_and_boundaries_are_the_reference_tables(tables, format):
    book = CODEBOOKS[format]
    np.testing.assert_array_equal(book.levels, tables[format])
    np.testing.assert_array_equal(book.boundaries, tables[f"{format}_boundaries"])


def test_fp4_codes_in_ascending_order(tables):
    np.testing.assert_array_equal(CODEBOOKS["fp4"].order, tables["fp4_order"])


def test_dynamic_maps_are_the_reference_tables(tables):
    np.testing.assert_array_equal(DYNAMIC_MAP, tables["dynamic8_signed"])
    np.testing.assert_array_equal(UNSIGNED_DYNAMIC_MAP, tables["dynamic8_unsigned"])
    assert DYNAMIC_MAP.dtype == UNSIGNED_DYNAMIC_MAP.dtype == np.float32
    assert (np.diff(DYNAMIC_BOUNDARIES) > 0).all()


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, equation 4 and Appendix E: 8 quantiles of each sign, zero exact, largest 1."""
    offset = 0.9677083  # 1 - (1/30 + 1/32) / 2: the outermost quantiles, moved inwards
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(CODEBOOKS["nf4"].levels, levels / levels.max(), atol=2e-7)


def test_fp4_levels_are_sign_exponent_mantissa():
    """bitsandbytes' FP4: sign, 2 bits of exponent, 1 of mantissa, largest magnitude 12 made 1."""
    magnitude = {0: 0.0, 1: 0.0625, 6: 2, 7: 3, 4: 4, 5: 6, 2: 8, 3: 12}
    levels = CODEBOOKS["fp4"].levels
    for code, value in magnitude.items():
        np.testing.assert_allclose(levels[code], value / 12, rtol=1e-6)
        np.testing.assert_allclose(levels[code | 0b1000], -value / 12, rtol=1e-6)


def test_int4_levels_are_evenly_spaced_about_zero():
    levels = CODEBOOKS["int4"].levels
    np.testing.assert_allclose(np.diff(levels), 1 / 7, rtol=1e-6)
    assert levels[8] == 0 and levels[15] == 1


@pytest.mark.parametrize("format", CODEBOOKS)
def test_zero_is_a_level(format):
    assert 0.0 in CODEBOOKS[format].levels
