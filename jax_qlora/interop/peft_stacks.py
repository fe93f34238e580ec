# SPDX-License-Identifier: Apache-2.0
"""From the stacked updates of an adapter to those of single modules, and back."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..lora import Adapter, LoraPair, Targets, add_magnitudes
from ..lora.array import is_special
from ..lora.combine_factors import used_rank
from ..models import Model
from ..tree import flatten_paths
from .peft_config import PeftConfig
from .peft_layers import Slot, Update
from .peft_parameters import rescaled
from .peft_whole import check_weights


def unstack(adapter: Mapping[str, LoraPair], slots: Mapping[str, Slot]) -> dict[str, Update]:
    """The update of each module, without padding; of those that change nothing, none.

    Args:
        adapter: Path -> LoraPair.
        slots: The model's modules.

    Raises:
        InputError: an update of something else, or of another shape, or one that is not finite.
    """
    by_path: dict[str, list[tuple[str, Slot]]] = {}
    for module, slot in slots.items():
        by_path.setdefault(slot.path, []).append((module, slot))
    unknown = sorted(set(adapter) - set(by_path))
    if unknown:
        raise InputError(
            f"the adapter has updates of {some(unknown)}, which are no linear modules of the "
            f"model: expected some of {some(by_path)}. Save it with the model it was made for."
        )
    updates: dict[str, Update] = {}
    for path, pair in adapter.items():
        whole = [np.asarray(x, np.float32) for x in (pair.a, pair.b)]
        if pair.magnitude is not None:
            whole.append(np.asarray(pair.magnitude, np.float32))
        for module, slot in by_path[path]:
            if (pair.lead, pair.layout) != (slot.lead, slot.layout):
                raise InputError(
                    f"the adapter's update of '{path}' is for a kernel "
                    f"{(*pair.lead, *pair.layout.shape)}, the model's is "
                    f"{(*slot.lead, *slot.layout.shape)}. Save it with the model it was made for."
                )
            parts = [x if slot.index is None else x[slot.index] for x in whole]
            if not all(np.isfinite(x).all() for x in parts):
                raise InputError(
                    f"the adapter's update of '{module}' has values that are not finite: expected "
                    "finite ones, training diverged. Nothing was written; go back to a checkpoint "
                    "and lower the learning rate."
                )
            a, b, *magnitude = parts
            rank = used_rank(a, b)
            if rank == 0 and not magnitude:
                continue
            rank = max(rank, 1)
            updates[module] = Update(
                a=a[..., :rank, :],
                b=b[..., :rank],
                scale=pair.scale,
                magnitude=magnitude[0] if magnitude else None,
            )
    return updates


def stack(
    updates: Mapping[str, Update],
    slots: Mapping[str, Slot],
    config: PeftConfig,
    model: Model | Targets,
) -> Adapter:
    """The updates of each leaf together: padded to the largest rank, under one scale.

    Args:
        updates: By module; one that is missing is zero.
        slots: The model's modules.
        config: The adapter's configuration.
        model: The model, whose weights give the magnitudes of modules that DoRA leaves out.
    """
    leaves: dict[str, dict[str, Update]] = {}
    for module, update in updates.items():
        leaves.setdefault(slots[module].path, {})[module] = update
    adapter: Adapter = {}
    for path, own in leaves.items():
        slot = slots[next(iter(own))]
        scale = max((update.scale for update in own.values()), key=abs)
        rank = max(update.rank for update in own.values())
        a = np.zeros((*slot.lead, rank, slot.layout.cols), np.float32)
        b = np.zeros((*slot.lead, slot.layout.rows, rank), np.float32)
        for module, update in own.items():
            index = slots[module].index or ()
            a[(*index, ..., slice(update.rank), slice(None))] = update.a
            b[(*index, ..., slice(update.rank))] = rescaled(update, scale)
        adapter[path] = LoraPair(
            a=jnp.asarray(a),
            b=jnp.asarray(b),
            layout=slot.layout,
            scale=float(scale),
            dropout=config.dropout,
        )
    return _with_magnitudes(adapter, leaves, slots, model) if config.dora else adapter


def _with_magnitudes(
    adapter: Adapter,
    leaves: Mapping[str, Mapping[str, Update]],
    slots: Mapping[str, Slot],
    model: Model | Targets,
) -> Adapter:
    """The updates with DoRA's magnitudes; layers left out keep the length of their rows."""
    partly = {p: x for p, x in adapter.items() if len(leaves[p]) < math.prod(x.lead)}
    untouched: Adapter = {}
    if isinstance(model, Model) and partly:
        weights = flatten_paths(model.params, is_leaf=is_special)
        for path in partly:
            check_weights(weights[path], path)
        untouched = add_magnitudes(model.params, partly)
    found: Adapter = {}
    for path, pair in adapter.items():
        magnitude = np.zeros((*pair.lead, pair.layout.rows), np.float32)
        if path in untouched:
            magnitude[:] = np.asarray(untouched[path].magnitude)
        for module, update in leaves[path].items():
            index = slots[module].index
            magnitude[... if index is None else index] = update.magnitude
        found[path] = replace(pair, magnitude=jnp.asarray(magnitude))
    return found


def some(items: Iterable[str]) -> str:
    """The first of some names, and how many there are."""
    items = list(items)
    return ", ".join(items[:6]) + (f", ... ({len(items)} in all)" if len(items) > 6 else "")
