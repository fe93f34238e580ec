# SPDX-License-Identifier: Apache-2.0
"""What PEFT saves twice: the update of a tied embedding, and the embedding under an update."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import InputError
from ..models import Model
from .hf import tensor_names
from .peft_config import PeftConfig
from .peft_layers import EMBEDDING_A, EMBEDDING_B, A, B
from .peft_whole import PREFIX

_HEAD = f"{PREFIX}lm_head"
_BASE = ".base_layer.weight"


def add_copies(tensors: dict[str, np.ndarray], model: Model) -> bool:
    """Adds the copies for the output head where the embedding is tied and has an update.

    Args:
        tensors: The file's tensors by key; changed in place.
        model: The model.

    Returns:
        Whether there are some: the configuration must then say that they are tied.
    """
    copies = _copies(model)
    tied = model.config.tied and all(own in tensors for own in copies)
    for own, copy in copies.items() if tied else ():
        tensors[copy] = np.ascontiguousarray(tensors[own].T)
    return tied


def without_copies(
    path: Path, config: PeftConfig, tensors: Mapping[str, np.ndarray], model: Model
) -> dict[str, np.ndarray]:
    """The tensors without those that PEFT saves twice, or beside an embedding's update.

    Raises:
        InputError: they are not what they should be copies of.
    """
    tensors, copies = dict(tensors), _copies(model)
    embedded = all(key in tensors for key in copies)
    for key, weight in _bases(model, embedded, head=_HEAD + A in tensors).items():
        if (found := tensors.pop(key, None)) is None:
            continue
        # a quantized weight, or one of shapes alone, has no values to be equal to
        dense = isinstance(weight, jax.Array | np.ndarray)
        found = found.T if key == _HEAD + _BASE and not model.config.tied else found
        same = found.shape == tuple(weight.shape)
        if not same or dense and not np.array_equal(found, np.asarray(weight, np.float32)):
            raise InputError(
                f"the adapter at {path} carries a weight {found.shape}, '{key}', that is not the "
                f"model's {tuple(weight.shape)}: expected the model that it was trained on. "
                "Merge it with PEFT if its vocabulary was resized."
            )
    if not embedded:
        return tensors
    if not model.config.tied:
        return tensors
    if not config.tied:
        raise InputError(
            f"the adapter at {path} changes the tied embedding without ensure_weight_tying: "
            "expected embedding and output head to change together, as they are one weight "
            "here. Train it with ensure_weight_tying=True."
        )
    for own, copy in copies.items():
        if copy in tensors and not np.array_equal(tensors.pop(copy), tensors[own].T):
            raise InputError(
                f"the adapter at {path} has different updates of embedding and output head, "
                "which are one weight in this model. Merge it with PEFT."
            )
    return tensors


def _embedding(model: Model) -> str:
    (name,) = tensor_names("embed_tokens/embedding", model.config)
    return PREFIX + name.removesuffix(".weight")


def _copies(model: Model) -> dict[str, str]:
    """The head's factors by the embedding's, which they are the transposes of."""
    embedding = _embedding(model)
    return {embedding + EMBEDDING_A: _HEAD + B, embedding + EMBEDDING_B: _HEAD + A}


def _bases(model: Model, embedded: bool, *, head: bool) -> dict[str, Any]:
    """The weights under the updates of embedding and head, which PEFT saves beside them."""
    table = model.params["embed_tokens"]["embedding"]
    found = {_embedding(model) + _BASE: table} if embedded else {}
    if model.config.tied:
        return found | ({_HEAD + _BASE: table} if embedded else {})
    return found | ({_HEAD + _BASE: model.params["lm_head"]["kernel"]} if head else {})
