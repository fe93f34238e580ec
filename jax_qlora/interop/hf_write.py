# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model directories, written tensor by tensor from stacked parameters."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..lora.array import LoraArray, is_special, materialize
from ..models import DecoderConfig
from ..tree import flatten_paths
from ..typing import PyTree
from .hf import is_transposed, parameter_shapes, stored_shape, tensor_indices, tensor_names
from .hf_config import config_to_hf
from .model_card import Origin, model_card
from .output import new_directory
from .safetensors import read_directory
from .safetensors_write import PlannedTensor, write_directory

MAX_SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int], None]
"""Called after each tensor with the number of tensors written, and of all."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What was written, as read back from the headers of the files.

    Attributes:
        path: The directory or file.
        tensors: Number of tensors.
        nbytes: Bytes of their data.
        files: Sizes of the files with weights, by name.
        updates: Number of linear modules with an update that was folded in and is not zero.
    """

    path: Path
    tensors: int
    nbytes: int
    files: dict[str, int]
    updates: int


def save_hf(
    directory: str | Path,
    params: PyTree,
    config: DecoderConfig,
    *,
    dtype: Any = None,
    tokenizer: Any = None,
    origin: Origin | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SavedModel:
    """Write a model directory that transformers loads to the same logits.

    Layers are made dense one at a time, so `params` may be a quantized base with an adapter
    attached: the merged model never exists whole in memory, nor a whole file of it. The directory
    appears complete or not at all.

    Args:
        directory: Where to; must not exist, or be empty, unless `overwrite`.
        params: The parameter tree; leaves may be arrays, QuantizedArray or LoraArray.
        config: The model's shape.
        dtype: dtype of every tensor; by default each parameter's own.
        tokenizer: A `transformers` tokenizer to save beside the weights, or None.
        origin: What the model was made of, for its README.md; None writes none.
        max_shard_bytes: Largest weights file.
        overwrite: Replace what is in the directory.
        progress: Called after each tensor.

    Returns:
        What was written.

    Raises:
        InputError: The directory is in use, the parameters are not those of `config`, a merged
            weight is not finite in `dtype`, or the disk is full.
    """
    planned: dict[str, PlannedTensor] = {}
    for path, leaf in checked_leaves(params, config).items():
        planned |= plan_dense(path, leaf, config, dtype)
    kinds = {str(t.dtype) for t in planned.values()}
    named = kinds.pop() if len(kinds) == 1 else str(jnp.dtype(dtype or jnp.float32))
    return write_model(
        directory,
        planned,
        config_to_hf(config, dtype=named),
        tokenizer=tokenizer,
        card=origin and model_card(origin, weights=named, parameters=count(config)),
        updates=count_updates(params),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def write_model(
    directory: str | Path,
    planned: Mapping[str, PlannedTensor],
    config: Mapping[str, Any],
    *,
    tokenizer: Any,
    card: str | None,
    updates: int,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Progress | None,
    beside: Callable[[Path], None] | None = None,
) -> SavedModel:
    """Write planned tensors and the files beside them, and read back what was written.

    Args:
        directory: Where to.
        planned: The tensors, by name.
        config: Content of config.json.
        tokenizer: A `transformers` tokenizer, or None.
        card: Text of README.md, or None.
        updates: Number of updates folded in.
        max_shard_bytes: Largest weights file.
        overwrite: Replace what is in the directory.
        progress: Called after each tensor.
        beside: Writes other files, which replace those of the same name.

    Raises:
        InputError: As `save_hf`.
    """
    planned = dict(sorted(planned.items()))
    done = 0

    def wrote(_: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(planned))

    with new_directory(directory, overwrite=overwrite) as temporary:
        write_directory(temporary, planned, max_shard_bytes=max_shard_bytes, wrote=wrote)
        _write_json(temporary / "config.json", config)
        ends = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {k: config[k] for k in ends if config.get(k) is not None}
        _write_json(temporary / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, "utf-8")
        if beside is not None:
            beside(temporary)
        found = read_directory(temporary)
        for name, tensor in planned.items():
            if name not in found or (found[name].dtype, found[name].shape) != (
                tensor.dtype,
                tensor.shape,
            ):
                raise OSError(f"tensor '{name}' reads back as {found.get(name)}")
        files = {f.name: f.stat().st_size for f in sorted(temporary.glob("*.safetensors"))}
    return SavedModel(
        path=Path(directory),
        tensors=len(found),
        nbytes=sum(t.nbytes for t in found.values()),
        files=files,
        updates=updates,
    )


def checked_leaves(params: PyTree, config: DecoderConfig) -> dict[str, Any]:
    """Return the parameters by path, special ones whole.

    Args:
        params: The parameter tree.
        config: The model's shape.

    Raises:
        InputError: They are not those of `config`.
    """
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
    return leaves


def plan_dense(
    path: str, leaf: Any, config: DecoderConfig, dtype: Any
) -> Iterator[tuple[str, PlannedTensor]]:
    """Plan a parameter's tensors, dense and as Hugging Face stores them.

    Args:
        path: The parameter's path.
        leaf: Array, QuantizedArray or LoraArray.
        config: The model's shape.
        dtype: dtype of the tensors, or None for the parameter's own.
    """
    kind = np.dtype(jnp.dtype(dtype or leaf.dtype))
    shape = stored_shape(path, config)
    names = zip(tensor_indices(path, config), tensor_names(path, config), strict=True)
    for index, name in names:
        make = partial(dense_tensor, leaf, index, is_transposed(path, config), kind, name)
        yield name, PlannedTensor(dtype=kind, shape=shape, make=make)


def dense_tensor(
    leaf: Any, index: tuple[int, ...], transpose: bool, dtype: np.dtype, name: str
) -> np.ndarray:
    """Return one tensor: a layer of a stacked parameter, or a whole one.

    Args:
        leaf: Array, QuantizedArray or LoraArray.
        index: Where in the stack: layer, and expert; empty for a whole parameter.
        transpose: Whether it is a kernel `[in, out]`, written `[out, in]`.
        dtype: Its dtype; updates are folded in before, in float32.
        name: What to call it in messages.

    Raises:
        InputError: A value is not finite in `dtype`.
    """
    part = jax.tree.map(lambda x: x[index], leaf) if index else leaf
    with np.errstate(over="ignore"):  # reported below, by name
        dense = np.asarray(_dense(part, dtype) if is_special(part) else part).astype(dtype)
    if not np.all(np.isfinite(dense)):
        raise InputError(
            f"'{name}' has values that are not finite in {dtype}: nothing was written. Save in "
            "bfloat16 or float32, and check that training did not diverge."
        )
    return dense.T if transpose else dense


_dense = jax.jit(materialize, static_argnums=1)


def count_updates(params: PyTree) -> int:
    """Return the number of linear modules that have an update that is not zero."""
    total = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_special):
        if isinstance(leaf, LoraArray):
            a, b = (np.asarray(x) != 0 for x in (leaf.pair.a, leaf.pair.b))
            rescaled = leaf.pair.magnitude is not None  # DoRA's may differ from the base's norms
            total += int(np.sum(rescaled | np.any(a, axis=(-2, -1)) & np.any(b, axis=(-2, -1))))
    return total


def count(config: DecoderConfig) -> int:
    """Return the number of parameters of a model."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
