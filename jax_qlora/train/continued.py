# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from an adapter: of an earlier run, of PEFT's, or a GGUF file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..config import Config
from ..errors import InputError
from ..interop.peft import load_adapter
from ..interop.peft_config import read_config
from ..lora import Adapter, LoraPair, split_virtual
from ..models import DecoderConfig, Model, abstract_model


def check_adapter(config: Config) -> None:
    """Check that there is an adapter to go on from.

    Args:
        config: Settings; without `lora.adapter` nothing is looked at.

    Raises:
        InputError: There is none, or its configuration cannot be read.
    """
    where = config.lora.adapter
    if where is None:
        return
    path = Path(where)
    if not path.exists():
        raise InputError(
            f"lora.adapter: nothing at '{where}'. Expected an adapter's directory, such as a run's "
            "adapter/, or a .gguf file."
        )
    if path.suffix != ".gguf":
        read_config(path)


def check_form(config: Config, decoder: DecoderConfig, fresh: Adapter) -> None:
    """Check that the adapter to go on from has the form of what trains, before weights are read.

    Not with DoRA, where layers without an update start at lengths that the weights have.

    Args:
        config: Settings; without `lora.adapter` nothing is looked at.
        decoder: The model's shape.
        fresh: What trains, as shapes.

    Raises:
        InputError: As `continue_from`.
    """
    if config.lora.adapter is not None and not config.lora.dora:
        continue_from(config.lora.adapter, split_virtual(fresh)[0], abstract_model(decoder))


def continue_from(where: str, fresh: Adapter, model: Model) -> Adapter:
    """Return the values of an adapter in the form that the settings give.

    Args:
        where: The adapter, as `load_adapter` takes it.
        fresh: What the settings would start, or its shapes.
        model: The decoder with its frozen base, or shapes of it.

    Returns:
        The adapter's values; scale and dropout are those of `fresh`.

    Raises:
        InputError: The adapter cannot be read, or it has another form: each difference is named.
    """
    found = load_adapter(where, model)
    differences = [
        f"'{path}' has {_words(found.get(path))} there and {_words(fresh.get(path))} here"
        for path in sorted(fresh.keys() | found.keys())
        if not _alike(found.get(path), fresh.get(path))
    ]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(
            f"lora.adapter: '{where}' has not the form that the settings describe: "
            f"{'; '.join(differences[:3])}{more}. Set lora.targets, lora.rank, lora.alpha, "
            "lora.rslora, lora.dora and what trains beside as they are in the adapter; its "
            "adapter_config.json says."
        )
    return {
        path: replace(leaf, scale=fresh[path].scale, dropout=fresh[path].dropout)
        if isinstance(leaf, LoraPair)
        else leaf
        for path, leaf in found.items()
    }


def _alike(found: Any, fresh: Any) -> bool:
    """Whether both are of one kind and shape; the dropout of an adapter is not written."""
    shapes = [[(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(y)] for y in (found, fresh)]
    if isinstance(found, LoraPair) and isinstance(fresh, LoraPair):
        same = math.isclose(found.scale, fresh.scale, rel_tol=1e-6)
        same = same and (found.layout, found.parts) == (fresh.layout, fresh.parts)
        same = same and (found.magnitude is None) == (fresh.magnitude is None)
    else:
        same = jax.tree.structure(found) == jax.tree.structure(fresh)
    return same and shapes[0] == shapes[1]


def _words(leaf: Any) -> str:
    if leaf is None:
        return "nothing that trains"
    if isinstance(leaf, LoraPair):
        dora = " with DoRA" if leaf.magnitude is not None else ""
        return f"an update of rank {leaf.rank} and scale {leaf.scale:g}{dora}"
    return "values of " + ", ".join(str(list(x.shape)) for x in jax.tree.leaves(leaf))
