# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model directories: the names of tensors, and export."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..lora.array import is_special, materialize
from ..models import DecoderConfig, abstract_params
from ..tree import flatten_paths
from ..typing import PyTree
from .hf_config import config_to_hf
from .safetensors_write import PlannedTensor, write_directory


def tensor_names(path: str, config: DecoderConfig) -> tuple[str, ...]:
    """Return the names that a parameter's layers have in a checkpoint, or its one name.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_names("layers/mlp/up_proj/kernel", TINY)[1]
    'model.layers.1.mlp.up_proj.weight'
    >>> tensor_names("lm_head/kernel", TINY)
    ('lm_head.weight',)
    """
    module, _, kind = path.replace("/", ".").rpartition(".")
    name = f"{module}.{'bias' if kind == 'bias' else 'weight'}"
    if path.startswith("layers/"):
        rest = name.removeprefix("layers.")
        return tuple(f"model.layers.{i}.{rest}" for i in range(config.n_layers))
    return (name if path.startswith("lm_head/") else f"model.{name}",)


@lru_cache(maxsize=8)
def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by path, in tree order.

    >>> from jax_qlora.models.presets import TINY
    >>> parameter_shapes(TINY)["layers/mlp/up_proj/kernel"]
    (3, 32, 64)
    """
    return {path: x.shape for path, x in flatten_paths(abstract_params(config)).items()}


def tensor_shape(path: str, config: DecoderConfig) -> tuple[int, ...]:
    """Return the shape of each of a parameter's tensors in a checkpoint: kernels are `[out, in]`.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_shape("layers/mlp/up_proj/kernel", TINY)
    (64, 32)
    """
    shape = parameter_shapes(config)[path]
    shape = shape[1:] if path.startswith("layers/") else shape
    return shape[::-1] if path.endswith("/kernel") else shape


def save_hf(
    directory: str | Path,
    params: PyTree,
    config: DecoderConfig,
    *,
    dtype: Any = None,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a model directory that transformers loads to the same logits.

    Layers are made dense one at a time, so `params` may be a quantized base with an adapter
    attached: the merged model never exists whole in memory. The directory appears complete or not
    at all.

    Args:
        directory: Where to; must not exist, or be empty.
        params: The parameter tree; leaves may be arrays, QuantizedArray or LoraArray.
        config: The model's shape.
        dtype: dtype of every tensor; by default each parameter's own.
        tokenizer: A `transformers` tokenizer to save beside the weights, or None.
        max_shard_bytes: Largest weights file.

    Returns:
        The directory.

    Raises:
        InputError: The directory is in use, the parameters are not those of `config`, a merged
            weight is not finite in `dtype`, or the disk is full.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"'{directory}' is in use: expected a new or an empty directory, so that nothing is "
            "overwritten. Choose another, or remove it first."
        )
    planned = dict(sorted(_plan(params, config, dtype)))
    kinds = {str(t.dtype) for t in planned.values()}
    named = kinds.pop() if len(kinds) == 1 else str(jnp.dtype(dtype or jnp.float32))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise InputError(f"'{directory}' cannot be made: {error.strerror}.") from error
    try:
        write_directory(temporary, planned, max_shard_bytes=max_shard_bytes)
        _write_json(temporary / "config.json", config_to_hf(config, dtype=named))
        _write_json(temporary / "generation_config.json", _generation(config))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, directory)
    except OSError as error:
        full = " The disk is full." if error.errno == errno.ENOSPC else ""
        raise InputError(f"'{directory}' cannot be written: {error.strerror}.{full}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _plan(params: PyTree, config: DecoderConfig, dtype: Any) -> Iterator[tuple[str, PlannedTensor]]:
    leaves = flatten_paths(params, is_leaf=is_special)
    expected = parameter_shapes(config)
    wrong = [p for p in expected if p not in leaves or leaves[p].shape != expected[p]]
    wrong += [p for p in leaves if p not in expected]
    if wrong:
        found = leaves[wrong[0]].shape if wrong[0] in leaves else "nothing"
        want = expected[wrong[0]] if wrong[0] in expected else "no such parameter"
        raise InputError(
            f"The parameters are not those of the configuration: at '{wrong[0]}' expected {want}, "
            f"found {found} ({len(wrong)} differ). Pass the parameters of the loaded model."
        )
    for path, leaf in leaves.items():
        shape, names = tensor_shape(path, config), tensor_names(path, config)
        kind = np.dtype(jnp.dtype(dtype or leaf.dtype))
        for i, name in enumerate(names):
            layer = i if path.startswith("layers/") else None
            make = partial(_tensor, leaf, layer, path.endswith("/kernel"), kind, name)
            yield name, PlannedTensor(dtype=kind, shape=shape, make=make)


def _tensor(leaf: Any, layer: int | None, transpose: bool, dtype: Any, name: str) -> np.ndarray:
    part = leaf if layer is None else jax.tree.map(lambda x: x[layer], leaf)
    with np.errstate(over="ignore"):  # reported below, by name
        dense = np.asarray(_dense(part, dtype) if is_special(part) else part).astype(dtype)
    if not np.all(np.isfinite(dense)):
        raise InputError(
            f"'{name}' has values that are not finite in {dtype}: nothing was written. Save in "
            "bfloat16 or float32, and check that training did not diverge."
        )
    return dense.T if transpose else dense


_dense = jax.jit(materialize, static_argnums=1)


def _generation(config: DecoderConfig) -> dict[str, Any]:
    ids = config_to_hf(config, dtype="")
    return {
        k: ids[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if ids[k] is not None
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
