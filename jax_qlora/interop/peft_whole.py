# SPDX-License-Identifier: Apache-2.0
"""What an adapter of PEFT holds beside updates: whole modules, biases, and rows of tokens."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..lora import TokenRows
from ..lora.array import is_special, materialize
from ..models import Model
from ..quant.layout import KernelLayout
from ..tree import flatten_paths
from .hf import is_transposed, n_lead, stored_shape, tensor_indices, tensor_names
from .peft_config import PeftConfig

PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Where a tensor of the file goes.

    Attributes:
        path: The parameter.
        index: Layer, and expert, in its stack; empty for a parameter that is not stacked.
        shape: The tensor's shape in the file.
        tokens: Which rows it replaces, or None for the whole parameter.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    tokens: tuple[int, ...] | None = None


def whole_tensors(config: PeftConfig, model: Model, targets: Iterable[str]) -> dict[str, Whole]:
    """The tensors that a configuration asks for beside updates, by key.

    Args:
        config: The adapter's configuration.
        model: The model.
        targets: Names of the modules that have updates.

    Raises:
        InputError: the adapter would train one use of a tied embedding alone, or rows that the
            model does not have.
    """
    targets, found = set(targets), {}
    for path in _paths(model):
        names = tensor_names(path, model.config)
        for index, name in zip(tensor_indices(path, model.config), names, strict=True):
            module, _, kind = name.rpartition(".")
            entry = Whole(path=path, index=index, shape=stored_shape(path, model.config))
            if config.is_saved(module):
                if path == "embed_tokens/embedding" and model.config.tied:
                    _check_tied(config.tied, "modules_to_save")
                    found[f"{PREFIX}lm_head.weight"] = entry
                found[PREFIX + name] = entry
            elif kind == "bias" and (
                config.bias == "all" or (config.bias == "lora_only" and module in targets)
            ):
                found[bias_key(module, targets)] = entry
            elif kind == "weight":
                for end, indices in config.tokens.items():
                    # PEFT's name of the embedding, whatever the model calls it
                    is_embedding = end == "embed_tokens" and path == "embed_tokens/embedding"
                    if is_embedding or module == end or module.endswith(f".{end}"):
                        _check_rows(indices, entry.shape[0], module)
                        shape = (len(indices), entry.shape[-1])
                        found[PREFIX + module + _TOKENS] = Whole(
                            path=path, index=(), shape=shape, tokens=indices
                        )
    return found


def bias_key(module: str, targets: Iterable[str]) -> str:
    """PEFT's key of a trained bias: a module with an update is wrapped round its base."""
    return f"{PREFIX}{module}{'.base_layer' if module in targets else ''}.bias"


def _check_rows(indices: tuple[int, ...], rows: int, module: str) -> None:
    if wrong := [i for i in indices if i >= rows]:
        raise InputError(
            f"the adapter trains row {wrong[0]} of '{module}', which has {rows} rows: expected the "
            "model that it was trained on. If tokens were added to that, name them when it is "
            "loaded: load_model(..., new_tokens=[...])."
        )


def _check_tied(tied: bool, what: str) -> None:
    if not tied:
        raise InputError(
            f"the adapter has the tied embedding in {what} without ensure_weight_tying: expected "
            "embedding and output head to change together, as they are one weight here. Train it "
            "with ensure_weight_tying=True, or merge it with PEFT."
        )


def read_whole(
    entries: Mapping[str, Whole], tensors: Mapping[str, np.ndarray], model: Model
) -> dict[str, Any]:
    """The trained weights and rows by path; layers and experts left out keep the base's.

    Args:
        entries: From `whole_tensors`.
        tensors: The file's, of the right shapes.
        model: The model.

    Raises:
        InputError: layers are left out, and the model is shapes without weights.
    """
    leaves = flatten_paths(model.params, is_leaf=is_special)
    adapter: dict[str, Any] = {}
    stacks: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for key, entry in entries.items():
        if entry.tokens is not None:
            layout = _vocabulary(entry.path, tuple(leaves[entry.path].shape))
            rows = jnp.asarray(tensors[key])
            adapter[entry.path] = TokenRows(rows=rows, indices=entry.tokens, layout=layout)
            continue
        value = tensors[key].T if is_transposed(entry.path, model.config) else tensors[key]
        stacks.setdefault(entry.path, {})[entry.index] = value
    for path, parts in stacks.items():
        shape = tuple(leaves[path].shape)
        partly = len(parts) < math.prod(shape[: n_lead(path)])
        if partly:
            check_weights(leaves[path], path)
        full = np.array(materialize(leaves[path], jnp.float32)) if partly else np.empty(shape, "f")
        for index, value in parts.items():
            full[index] = value
        adapter[path] = jnp.asarray(full)
    return adapter


def check_weights(leaf: Any, path: str) -> None:
    """Check that the base's weight is there, of which an adapter leaves layers as they are.

    Raises:
        InputError: The model is shapes alone.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)):
        raise InputError(
            f"the adapter trains some layers or experts of '{path}' and leaves others as they are: "
            "expected a model with its weights, found shapes alone. Load the model first, or write "
            "the merged model (--format hf)."
        )


def _vocabulary(path: str, shape: tuple[int, ...]) -> KernelLayout:
    """The layout of an embedding or an output head; its rows are the vocabulary."""
    return KernelLayout(shape=shape, in_axes=(-2,) if path.endswith("/kernel") else (-1,))


def write_whole(
    adapter: Mapping[str, Any], model: Model, targets: Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by key, and the settings of `PeftConfig` under which PEFT uses them.

    Args:
        adapter: The entries that are no updates: arrays and TokenRows by path.
        model: The model.
        targets: Names of the modules that have updates.

    Raises:
        InputError: PEFT has no way to say it: a part of a module's weights, or some biases; or
            values are not finite.
    """
    targets = set(targets)
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    tokens: dict[str, tuple[int, ...]] = {}
    biases: set[str] = set()
    others: set[str] = set()
    arrays = {p for p, x in adapter.items() if not isinstance(x, TokenRows)}
    for path in _paths(model):
        names = tensor_names(path, model.config)
        module = path.rpartition("/")[0]
        siblings = {p for p in _paths(model) if p.rpartition("/")[0] == module}
        if path not in adapter:
            others |= set(names) if path.endswith("/bias") and not siblings & arrays else set()
            continue
        value = adapter[path]
        if isinstance(value, TokenRows):
            name = names[0].removesuffix(".weight")
            tensors[PREFIX + name + _TOKENS] = np.asarray(value.rows, np.float32)
            tokens[name.rpartition(".")[2]] = value.indices
            continue
        full = np.asarray(value, np.float32)
        alone = path.endswith("/bias") and siblings & arrays == {path} and len(siblings) > 1
        if not alone and not siblings <= arrays:
            raise InputError(
                f"the adapter trains '{path}' as a whole and not {sorted(siblings - arrays)}: "
                "expected all weights of a module, as PEFT saves modules. Train them too."
            )
        for index, name in zip(tensor_indices(path, model.config), names, strict=True):
            part = full[index]
            weight = np.ascontiguousarray(part.T if is_transposed(path, model.config) else part)
            own = name.rpartition(".")[0]
            if alone:
                biases.add(name)
                tensors[bias_key(own, targets)] = weight
                continue
            tensors[PREFIX + name] = weight
            modules += [] if own in modules else [own]
        if path == "embed_tokens/embedding" and model.config.tied:
            tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}{names[0]}"]
    settings: dict[str, Any] = dict(modules_to_save=tuple(modules), tokens=tokens)
    if biases:
        of_targets = {f"{module}.bias" for module in targets} & (biases | others)
        if others and biases != of_targets:
            raise InputError(
                f"the adapter trains {len(biases)} of {len(biases | others)} biases: expected all, "
                "or those of the modules that have updates, which is what PEFT's bias can say."
            )
        settings["bias"] = "lora_only" if others else "all"
    (embedding,) = tensor_names("embed_tokens/embedding", model.config)
    if model.config.tied and embedding.removesuffix(".weight") in modules:
        settings["tied"] = True
    if bad := [k.removeprefix(PREFIX) for k, x in tensors.items() if not np.isfinite(x).all()]:
        raise InputError(
            f"the trained weights of {', '.join(bad[:6])} have values that are not finite: "
            "training diverged. Nothing was written; go back to a checkpoint and lower the "
            "learning rate."
        )
    return tensors, settings


def _paths(model: Model) -> list[str]:
    return list(flatten_paths(model.params, is_leaf=is_special))
