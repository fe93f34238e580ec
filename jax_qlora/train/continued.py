# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from an adapter: of an earlier run, of PEFT's, or a GGUF file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ..config import Config
from ..errors import InputError
from ..interop.peft import load_adapter
from ..interop.peft_config import read_config
from ..lora import Adapter, LoraPair
from ..models import Model


def check_adapter(config: Config) -> None:
    """Check that there is an adapter to go on from, before weights are read.

    Args:
        config: Settings; without `lora.adapter` nothing is looked at.

    Raises:
        InputError: There is none, it is damaged, or other settings contradict it.
    """
    where = config.lora.adapter
    if where is None:
        return
    if config.method == "full" or config.lora.init != "default":
        init = f"lora.init = {config.lora.init!r}"
        other = 'method = "full"' if config.method == "full" else init
        raise InputError(
            f"lora.adapter: expected an update that starts from '{where}', found {other}, which "
            "starts otherwise. Leave one of them out."
        )
    path = Path(where)
    if not path.exists():
        raise InputError(
            f"lora.adapter: nothing at '{where}'. Expected an adapter's directory, such as a run's "
            "adapter/, or a .gguf file."
        )
    if path.suffix != ".gguf":
        read_config(path)


def continue_from(where: str, fresh: Adapter, model: Model) -> Adapter:
    """Return the values of an adapter in the form that the settings give.

    Args:
        where: The adapter, as `load_adapter` takes it.
        fresh: What the settings would start.
        model: The decoder with its frozen base.

    Returns:
        The adapter's values; dropout is that of `fresh`.

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
    if isinstance(found, LoraPair) and isinstance(fresh, LoraPair):
        if not math.isclose(found.scale, fresh.scale, rel_tol=1e-6):
            return False
        found, fresh = (replace(x, scale=1.0, dropout=0.0) for x in (found, fresh))
    forms = [
        (jax.tree.structure(leaf), [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)])
        for leaf in (found, fresh)
    ]
    return forms[0] == forms[1]


def _words(leaf: Any) -> str:
    if leaf is None:
        return "nothing that trains"
    if isinstance(leaf, LoraPair):
        dora = " with DoRA" if leaf.magnitude is not None else ""
        return f"an update of rank {leaf.rank} and scale {leaf.scale:g}{dora}"
    return "values of " + ", ".join(str(list(x.shape)) for x in jax.tree.leaves(leaf))
