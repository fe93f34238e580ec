# SPDX-License-Identifier: Apache-2.0
"""A checkpoint into a 4-bit one, once, tensor by tensor; it is then read back without work.

The result is a bitsandbytes directory, so that it serves transformers and PEFT as well as this
library: one format instead of a cache of our own, of the same size and the same codes.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from .bnb import bnb_parts
from .bnb_write import Latest, check_encoding, encode_rows, plan_bnb, quantization_config
from .hf import is_linear, parameter_shapes, tensor_names
from .hf_config import config_to_hf
from .hf_write import MAX_SHARD_BYTES, Progress, SavedModel, count, write_model
from .load_params import Encoding, check_tensors
from .model_card import Origin, model_card
from .open import find_tokenizer, open_checkpoint
from .safetensors_write import PlannedTensor

# Files of a model directory that its 4-bit form shares, besides its weights and config.json.
_KEPT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def quantize_checkpoint(
    source: str | Path,
    directory: str | Path,
    *,
    encoding: Encoding,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SavedModel:
    """Write a checkpoint with the linears of its layers in 4 bits; the rest is copied.

    Holds one tensor in memory. Where the rows of a linear are whole blocks, the codes are those
    that `load_model` would make of the checkpoint.

    Args:
        source: A dense model, as for `load_model`.
        directory: Where to; must not exist, or be empty, unless `overwrite`.
        encoding: The format: nf4 or fp4.
        max_shard_bytes: Largest weights file.
        overwrite: Replace a model that is in the directory.
        progress: Called after each tensor.

    Returns:
        What was written.

    Raises:
        InputError: The checkpoint is damaged or in 4 bits already; bitsandbytes has no such format;
            a weight is not finite; or as `save_hf`.
    """
    check_encoding(encoding)
    path, config, tensors, raw = open_checkpoint(source)
    check_tensors(tensors, config, where=f"'{path}'")
    planned: dict[str, PlannedTensor] = {}
    latest = Latest()
    linears = {
        name
        for parameter in parameter_shapes(config)
        if is_linear(parameter)
        for name in tensor_names(parameter, config)
    }
    for name, tensor in tensors.items():
        if bnb_parts(tensors, name):
            raise InputError(
                f"'{path}' is in 4 bits already ('{name}'): expected a dense checkpoint. Load it "
                "as it is."
            )
        dtype = _stored_dtype(tensor) if raw is None else np.dtype(tensor.dtype)
        if name in linears:
            make = partial(
                encode_rows, tensor.read, tensor.shape, encoding, where=f"'{path}': '{name}'"
            )
            planned |= plan_bnb(name, tensor.shape, make, latest, encoding=encoding, dtype=dtype)
        else:
            make = partial(_read, tensor, dtype)
            planned[name] = PlannedTensor(dtype=dtype, shape=tensor.shape, make=make)
    dtype = str(planned[tensor_names("embed_tokens/embedding", config)[0]].dtype)
    content: dict[str, Any] = config_to_hf(config, dtype=dtype) if raw is None else dict(raw)
    content["quantization_config"] = quantization_config(encoding, dtype=dtype)
    origin = Origin(base_model=str(source))
    weights = f"{encoding.format} in 4 bits (bitsandbytes), the rest as {dtype}"
    return write_model(
        directory,
        planned,
        content,
        tokenizer=find_tokenizer(path) if raw is None else None,
        card=model_card(origin, weights=weights, parameters=count(config)),
        updates=0,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
        beside=None if raw is None else partial(_copy, path),
    )


def _stored_dtype(tensor: Any) -> np.dtype:
    """Dtype in which a tensor of a GGUF file is kept: as `load_model` does, norms in float32."""
    return np.dtype(np.float32 if len(tensor.shape) == 1 else jnp.bfloat16)


def _read(tensor: Any, dtype: np.dtype) -> np.ndarray:
    return tensor.read().astype(dtype, copy=False)


def _copy(source: Path, directory: Path) -> None:
    for name in _KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
