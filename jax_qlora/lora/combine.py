# SPDX-License-Identifier: Apache-2.0
"""One adapter out of several over the same base, as PEFT's `add_weighted_adapter` makes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from .adapter import Adapter
from .combine_factors import (
    Factors,
    MajoritySign,
    Method,
    Settings,
    checked,
    combine_factors,
    used_rank,
)
from .pair import LoraPair


def combine_adapters(
    adapters: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    *,
    method: Method | str,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign | str = "total",
    key: Any = None,
) -> Adapter:
    """Combines adapters of one base into one, equal to PEFT's `add_weighted_adapter`.

    Runs on the host. A module that some adapters leave alone is combined from the others. One
    adapter alone is only weighted, whatever the method.

    Args:
        adapters: Adapters of the same model; their targets may differ.
        weights: One number each, which may be negative.
        method: "cat" is exact, its rank is the sum of ranks. "svd" is the nearest update of a given
            rank. "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on factors, as
            "linear" does; with "_svd" after the name, on dense updates.
        rank: Of the result, for the methods with "svd"; the largest of the adapters' by default.
        density: Share of values to keep in (0, 1], for the methods that prune.
        majority_sign: For TIES.
        key: Random key, for DARE.

    Returns:
        An adapter with scale 1 and the first one's dropout. Padding of lower ranks is dropped.
        (PEFT 0.21 keeps `use_rslora` of the first adapter, and so scales a sum once more.)

    Raises:
        InputError: no adapter or no update, as many weights as adapters missing, a setting out of
            range, one that the method needs missing, updates of differently shaped kernels, DoRA
            adapters, or different ranks in a method that works on factors.

    >>> import jax
    >>> import jax_qlora as jq
    >>> apply = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((8, 4)), "down": jnp.ones((4, 8))}
    >>> targets = jq.find_targets(apply, params, jnp.ones((1, 8)))
    >>> one, two = (jq.init_adapter(jax.random.key(i), targets, rank=2) for i in range(2))
    >>> combine_adapters([one, two], [0.7, 0.3], method="cat")["up"]
    LoraPair(rank 4 of (8, 4), scale 1)
    """
    settings = Settings(
        method=method, rank=rank, density=density, majority_sign=majority_sign, key=key
    )
    settings = checked(settings, weights, len(adapters))
    for adapter in adapters:
        _check_adapter(adapter)
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    dropout = next(iter(adapters[0].values())).dropout
    combined = {}
    for path in paths:
        having = [
            (adapter[path], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if path in adapter
        ]
        combined[path] = _combine_pairs(path, having, settings, dropout)
    return combined


def _combine_pairs(
    path: str,
    having: Sequence[tuple[LoraPair, float]],
    settings: Settings,
    dropout: float,
) -> LoraPair:
    """Combines one kernel's updates, each layer and expert by itself; those of parts as wholes."""
    having = [(pair.whole(), weight) for pair, weight in having]
    first = having[0][0]
    for pair, _ in having:
        if (pair.layout, pair.lead) != (first.layout, first.lead):
            raise InputError(
                f"the updates of '{path}' are for kernels {(*first.lead, *first.layout.shape)} and "
                f"{(*pair.lead, *pair.layout.shape)}, contracted along {first.layout.in_axes} and "
                f"{pair.layout.in_axes}: expected adapters of one model."
            )
    arrays = [(np.asarray(p.a, np.float32), np.asarray(p.b, np.float32)) for p, _ in having]
    results = {}
    for index in np.ndindex(first.lead):
        parts = []
        for (a, b), (pair, weight) in zip(arrays, having, strict=True):
            rank = used_rank(a[index], b[index])
            if rank > 0:  # else this layer has no update
                factors = Factors(a[index][:rank], b[index][:, :rank], pair.scale)
                parts.append((factors, weight))
        if parts:
            name = "/".join([path, *map(str, index)])
            results[index] = combine_factors(name, parts, settings)
    rank = max((a.shape[0] for a, _ in results.values()), default=1)
    all_a = np.zeros((*first.lead, rank, first.layout.cols), np.float32)
    all_b = np.zeros((*first.lead, first.layout.rows, rank), np.float32)
    for index, (a, b) in results.items():
        all_a[(*index, slice(a.shape[0]))] = a
        all_b[(*index, slice(None), slice(b.shape[1]))] = b
    return LoraPair(
        a=jnp.asarray(all_a), b=jnp.asarray(all_b), layout=first.layout, scale=1.0, dropout=dropout
    )


def _check_adapter(adapter: Any) -> None:
    if not isinstance(adapter, Mapping) or not adapter:
        raise InputError(
            f"an adapter to combine is {type(adapter).__name__} {adapter!r:.60}: expected a "
            "mapping from paths to LoraPair with at least one update, as init_adapter returns."
        )
    for path, pair in adapter.items():
        if not isinstance(pair, LoraPair):
            raise InputError(
                f"'{path}' of an adapter to combine is {type(pair).__name__}: expected a LoraPair."
            )
        if pair.magnitude is not None:
            raise InputError(
                f"'{path}' is adapted with DoRA, whose magnitudes have no weighted combination: "
                "expected plain LoRA adapters. Merge it into its base instead."
            )
