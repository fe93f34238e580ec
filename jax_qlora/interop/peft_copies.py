# SPDX-License-Identifier: Apache-2.0
"""What PEFT saves twice: the update of a tied embedding, and the embedding under an update."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from ..errors import InputError
from ..models import Model
from .hf import tensor_names
from .peft_config import PeftConfig
from .peft_layers import EMBEDDING_A, EMBEDDING_B, A, B
from .peft_whole import PREFIX

_HEAD = f"{PREFIX}lm_head"


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
    tensors = dict(tensors)
    copies = _copies(model)
    if not all(key in tensors for key in copies):
        return tensors
    leaf = model.params["embed_tokens"]["embedding"]
    bases = (f"{x}.base_layer.weight" for x in (_embedding(model), _HEAD))
    for key in _present(bases, tensors):
        found = tensors.pop(key)
        # a quantized embedding, or one of shapes alone, has no values to be equal to
        dense = isinstance(leaf, jax.Array | np.ndarray)
        same = found.shape == tuple(leaf.shape)
        if not same or dense and not np.array_equal(found, np.asarray(leaf, np.float32)):
            raise InputError(
                f"the adapter at {path} carries an embedding {found.shape} that is not the "
                f"model's {tuple(leaf.shape)}: expected the model that it was trained on. "
                "Merge it with PEFT if its vocabulary was resized."
            )
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


def _present(keys: Iterable[str], tensors: Mapping[str, np.ndarray]) -> list[str]:
    return [key for key in keys if key in tensors]
