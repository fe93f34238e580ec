# SPDX-License-Identifier: Apache-2.0
"""The 16 levels of each 4-bit format, and the 8-bit maps of their constants and of Adam's moments.

NF4: QLoRA, Appendix E (arXiv 2305.14314). FP4 (E2M1 with bitsandbytes' code order) and the dynamic
maps: bitsandbytes, `functional.py`. INT4: symmetric absmax, levels i/7.
"""

from typing import NamedTuple

import numpy as np

FORMATS = ("nf4", "fp4", "int4")

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# value of code 0b0eem without its sign bit; the magnitudes of E2M1 scaled to a largest of 1
_FP4_POSITIVE = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)


class Codebook(NamedTuple):
    """A 4-bit format.

    Attributes:
        levels: float32 [16], the value of each code, in [-1, 1].
        order: uint8 [16], codes in ascending order of their level.
        boundaries: float32 [15], midpoints between ascending levels; a tie takes the lower one.
    """

    levels: np.ndarray
    order: np.ndarray
    boundaries: np.ndarray


def _codebook(levels: np.ndarray) -> Codebook:
    order = np.argsort(levels, kind="stable").astype(np.uint8)
    ascending = levels[order]
    boundaries = ((ascending[:-1] + ascending[1:]) / np.float32(2)).astype(np.float32)
    return Codebook(levels, order, boundaries)


def _linspace(start: np.float32, stop: np.float32, num: int) -> np.ndarray:
    """float32 linspace as torch rounds it: from both ends to the middle, one fused step."""
    step = np.float64(np.float32((stop - start) / np.float32(num - 1)))
    i = np.arange(num)  # float64 products stand in for the fused multiply-add
    up, down = np.float64(start) + step * i, np.float64(stop) - step * (num - 1 - i)
    return np.where(i < num // 2, up, down).astype(np.float32)


def _dynamic_map(*, signed: bool) -> np.ndarray:
    """An 8-bit dynamic map: 7 decades of magnitude, linear fractions within each.

    Without a sign there are twice as many fractions in each decade. bitsandbytes
    `create_dynamic_map(signed, max_exponent_bits=7, total_bits=8)`.
    """
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        fractions = 2**i if signed else 2 ** (i + 1)
        edges = _linspace(np.float32(0.1), np.float32(1), fractions + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = np.float32(10 ** (-6 + i)) * means
        values += [decade, -decade] if signed else [decade]
    return np.sort(np.concatenate(values)).astype(np.float32)


CODEBOOKS = {
    "nf4": _codebook(np.array(_NF4, np.float32)),
    "fp4": _codebook(np.array([*_FP4_POSITIVE, *(0.0 - v for v in _FP4_POSITIVE)], np.float32)),
    "int4": _codebook((np.arange(16, dtype=np.float32) - 8) / np.float32(7)),
}
DYNAMIC_MAP = _dynamic_map(signed=True)
UNSIGNED_DYNAMIC_MAP = _dynamic_map(signed=False)
DYNAMIC_BOUNDARIES = ((DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)).astype(np.float32)
