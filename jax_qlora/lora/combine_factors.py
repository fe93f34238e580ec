# SPDX-License-Identifier: Apache-2.0
"""Several updates of one module into one: the arithmetic of PEFT's `add_weighted_adapter`.

Three kinds of methods:

- "cat" puts the factors side by side. The update is exactly the weighted sum; ranks add up.
- "svd" and the methods that end in it combine the dense updates and cut the result back to a rank.
- The others combine the down projections with each other, and the up projections. That is cheap
  and rough: the product of two sums has cross terms that no adapter had.

What "combine" means is a sum, after pruning in DARE (random, rescaled) and magnitude pruning, or in
TIES the mean of those pruned values whose sign is the majority's.

References:
    PEFT 0.21, `LoraModel.add_weighted_adapter` and `utils/merge_utils.py`.
    Yadav et al., TIES-Merging (arXiv 2306.01708). Yu et al., DARE (arXiv 2311.03099).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from ..errors import InputError

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
"""How to combine; the names are PEFT's."""

MajoritySign = Literal["total", "frequency"]
"""In TIES, a value's sign is that of the sum over adapters, or that of most adapters."""


class Factors(NamedTuple):
    """One module's update, `scale * b @ a`, in one adapter.

    Attributes:
        a: float32 `[rank, cols]`.
        b: float32 `[rows, rank]`.
        scale: Factor of the update.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to combine; see `combine_adapters`."""

    method: Method | str
    rank: int | None = None
    density: float | None = None
    majority_sign: MajoritySign | str = "total"
    key: Any = None


def checked(settings: Settings, weights: Sequence[float], adapters: int) -> Settings:
    """Checks what does not depend on the adapters' values.

    Args:
        settings: How to combine.
        weights: Weights of the adapters.
        adapters: Number of adapters.

    Returns:
        The settings to use: one adapter alone is only weighted, whatever the method.

    Raises:
        InputError: as `combine_adapters`.
    """
    method = settings.method
    if method not in get_args(Method):
        raise InputError(f"method {method!r}: expected one of {', '.join(get_args(Method))}.")
    if adapters == 0 or adapters != len(weights):
        raise InputError(
            f"{adapters} adapters and {len(weights)} weights: expected at least one adapter and as "
            "many weights as adapters. Give each adapter its weight."
        )
    if not all(math.isfinite(w) for w in weights):
        raise InputError(f"weights {list(weights)}: expected finite numbers.")
    if settings.majority_sign not in get_args(MajoritySign):
        raise InputError(
            f"majority_sign {settings.majority_sign!r}: expected one of "
            f"{', '.join(get_args(MajoritySign))}."
        )
    prunes = method.startswith(("ties", "dare", "magnitude"))
    if prunes and (settings.density is None or not 0 < settings.density <= 1):
        raise InputError(
            f"method '{method}' with density {settings.density}: expected the share of values to "
            "keep, above 0 and at most 1. 0.2 to 0.7 are common."
        )
    if not prunes and settings.density is not None:
        raise InputError(
            f"method '{method}' with density {settings.density}: expected none, it keeps every "
            "value. Choose a method that prunes, such as 'ties', or leave the density out."
        )
    if settings.rank is not None and (not method.endswith("svd") or settings.rank < 1):
        raise InputError(
            f"method '{method}' with rank {settings.rank}: expected a whole number of at least 1 "
            "and a method with 'svd', which alone can choose a rank."
        )
    if method.startswith("dare") and settings.key is None:
        raise InputError(f"method '{method}' needs a random key: pass key=jax.random.key(0).")
    return Settings(method="linear") if adapters == 1 else settings


def combine_factors(
    name: str, parts: Sequence[tuple[Factors, float]], settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Combines the updates of one module.

    Args:
        name: The module's name, for messages and random masks.
        parts: The factors in each adapter that has an update of this module, and its weight.
        settings: How to combine, checked.

    Returns:
        `a` `[rank, cols]` and `b` `[rows, rank]` in float32, of scale 1.

    Raises:
        InputError: updates of differently shaped kernels; different ranks in a method that works on
            factors.
    """
    shapes = [(f.b.shape[0], f.a.shape[1]) for f, _ in parts]
    if len(set(shapes)) > 1:
        raise InputError(
            f"'{name}' is a kernel of {' and '.join(map(str, dict.fromkeys(shapes)))} (rows, cols) "
            "in different adapters: expected adapters of one model."
        )
    method = settings.method
    if method == "cat":
        a = np.concatenate([f.a * np.float32(w * f.scale) for f, w in parts], axis=0)
        return a, np.concatenate([f.b for f, _ in parts], axis=1)
    if method.endswith("svd"):
        rank = settings.rank or max(f.a.shape[0] for f, _ in parts)
        if method == "svd":
            return _svd_of_sum(parts, rank)
        deltas = [np.float32(f.scale) * (f.b @ f.a) for f, _ in parts]
        merge = _merger(method.removesuffix("_svd"), name, settings)
        return _svd(merge(deltas, [w for _, w in parts], 0), rank)
    ranks = [f.a.shape[0] for f, _ in parts]
    if len(set(ranks)) > 1:
        raise InputError(
            f"method '{method}' adds factors, and those of '{name}' have ranks "
            f"{', '.join(map(str, ranks))}: expected one rank. Use 'cat' or one of the 'svd' "
            "methods, which take any."
        )
    merge = _merger(method, name, settings)
    # the square root of the weight on either side; the sign on one
    roots = [math.sqrt(abs(w * f.scale)) for f, w in parts]
    signed = [math.copysign(r, w * f.scale) for r, (f, w) in zip(roots, parts, strict=True)]
    return merge([f.a for f, _ in parts], signed, 0), merge([f.b for f, _ in parts], roots, 1)


def drop_mask(key: Any, name: str, number: int, shape: tuple[int, ...], density: float) -> Any:
    """What DARE keeps of the values of one tensor: each independently, with probability `density`.

    Args:
        key: Random key of the combination.
        name: The module's name.
        number: The tensor's number in its module: twice that of the adapter, and one for `b`.
        shape: The tensor's shape.
        density: Probability.

    Returns:
        Bool array.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), number)
    return np.asarray(jax.random.bernoulli(key, density, shape))


Merge = Callable[[Sequence[np.ndarray], Sequence[float], int], np.ndarray]


def _merger(method: str, name: str, settings: Settings) -> Merge:
    """A function of tensors, one an adapter, their weights and 0 or 1 (for `b`)."""
    density = settings.density

    def prune(x: np.ndarray, number: int) -> np.ndarray:
        if density is None or density == 1:
            return x
        if method.startswith("dare"):
            mask = drop_mask(settings.key, name, number, x.shape, density)
            return np.where(mask, x, np.float32(0)) / np.float32(density)
        return np.where(_largest(x, int(density * x.size)), x, np.float32(0))

    def merge(tensors: Sequence[np.ndarray], weights: Sequence[float], factor: int) -> np.ndarray:
        if method != "linear":
            tensors = [prune(x, 2 * i + factor) for i, x in enumerate(tensors)]
        stack = np.stack(tensors)
        weighted = stack * np.asarray(weights, np.float32)[:, None, None]
        if not method.endswith("ties"):
            return weighted.sum(axis=0)
        sign = np.sign(stack)
        votes = stack if settings.majority_sign == "total" else sign
        elected = np.where(votes.sum(axis=0) >= 0, np.float32(1), np.float32(-1))
        agrees = sign == elected
        count = np.maximum(agrees.sum(axis=0), 1).astype(np.float32)
        return (weighted * agrees).sum(axis=0) / count

    return merge


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` values of largest magnitude are; of equal ones the first."""
    size = np.abs(x).reshape(-1)
    if count == 0:
        return np.zeros(x.shape, bool)
    least = np.partition(size, size.size - count)[size.size - count]
    mask = size > least
    equal = np.flatnonzero(size == least)
    mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(x.shape)


def _svd(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return _cut(u, s, vt, rank)


def _svd_of_sum(parts: Sequence[tuple[Factors, float]], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The decomposition of a weighted sum of updates, which is of low rank: no dense update."""
    b = np.concatenate([f.b * np.float64(w * f.scale) for f, w in parts], axis=1)
    a = np.concatenate([f.a for f, _ in parts], axis=0).astype(np.float64)
    (qb, rb), (qa, ra) = np.linalg.qr(b), np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return _cut(qb @ u, s, vt @ qa.T, rank)


def _cut(u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `rank` components; with fewer to be had, zeros fill up."""
    have = min(rank, s.size)
    a = np.zeros((rank, vt.shape[1]), np.float32)
    b = np.zeros((u.shape[0], rank), np.float32)
    a[:have], b[:, :have] = vt[:have], u[:, :have] * s[:have]
    return a, b


def used_rank(a: np.ndarray, b: np.ndarray) -> int:
    """The rank without trailing padding: components that are zero in both factors.

    Args:
        a: `[*lead, rank, cols]`.
        b: `[*lead, rows, rank]`.
    """
    axes = tuple(range(a.ndim - 2))
    used = np.any(a != 0, axis=(*axes, -1)) | np.any(b != 0, axis=(*axes, -2))
    return int(np.max(np.nonzero(used)[0], initial=-1)) + 1
