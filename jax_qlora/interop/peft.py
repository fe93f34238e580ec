# SPDX-License-Identifier: Apache-2.0
"""Adapters in the directory format of Hugging Face PEFT: adapter_config.json and safetensors.

A decoder's stacked update `[layers, rank, cols]` is PEFT's
`base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight` `[rank, cols]`, one tensor a layer.
PEFT gives each layer its own rank and scale; a stack has one. Lower ranks are padded with zeros,
which stay zero in training (each factor's gradient is a multiple of the other) and are cut off
again on saving. A differing scale is folded into `b`: the update is the same, but to an optimizer
that normalizes gradients the learning rate of that layer's `b` changes by the ratio of the scales.

Adapters of any other tree use the same format with the tree's path as the module's name.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..lora import Adapter, LoraPair, Targets, add_magnitudes
from ..lora.array import is_special
from ..lora.combine_factors import used_rank
from ..models import Model
from ..quant.layout import KernelLayout
from ..tree import flatten_paths
from .adapter_files import WEIGHTS_NAME, read_tensors, write_adapter
from .hf import tensor_indices, tensor_names
from .peft_config import PeftConfig, config_json, make_config, read_config
from .peft_whole import (
    PREFIX,
    Whole,
    check_weights,
    read_whole,
    whole_tensors,
    write_whole,
)

_SUFFIXES = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}
# of an embedding, whose rows are the vocabulary: transposed, and so named the other way round
_EMBEDDING_SUFFIXES = {"b": ".lora_embedding_A", "a": ".lora_embedding_B"}
_TIED = {f: f"{PREFIX}lm_head{_SUFFIXES[f]}" for f in ("a", "b")}


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What `save_adapter` wrote, and read back to check.

    Attributes:
        path: The adapter's directory.
        modules: Number of adapted modules; there are two tensors each, three with DoRA.
        nbytes: Size of the weights' file.
        b_norm: Euclidean norm of all `b` factors together; 0 for an untrained adapter.
    """

    path: Path
    modules: int
    nbytes: int
    b_norm: float


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """A linear module of the model: where its update lies in an adapter."""

    path: str
    layer: tuple[int, ...] | None  # layer and expert in the stack, or None for the whole leaf
    lead: tuple[int, ...]
    layout: KernelLayout
    head: bool
    embedding: bool = False


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    model: Model | Targets,
    *,
    base_model: str | None = None,
) -> SavedAdapter:
    """Writes an adapter that PEFT loads onto the same model.

    Written beside `path`, read back and compared, then moved into place; an adapter that was there
    is replaced only then, and other files of its directory are kept.

    Args:
        path: Directory to make.
        adapter: Path -> LoraPair, and what trains beside: see `attach`.
        model: The model it belongs to; or, for a tree that is no decoder of this library, the
            `Targets` found in it: modules are then named by path, with "/" as ".".
        base_model: Name or path of the base model to note in the configuration.

    Returns:
        What was written.

    Raises:
        InputError: the adapter is of another model, has values that are not finite or nothing to
            save, or the directory cannot be written.
    """
    path = Path(path)
    slots = _slots(model)
    pairs = {p: x for p, x in adapter.items() if isinstance(x, LoraPair)}
    dora = {pair.magnitude is not None for pair in pairs.values()}
    if len(dora) > 1:
        raise InputError(
            f"the adapter to save at {path} has magnitudes (DoRA) for some updates and none for "
            "others: expected all or none, as in PEFT. Make them with add_magnitudes."
        )
    tensors, ranks, scales = _unstack(pairs, slots)
    if dora == {True} and any(slots[module].embedding for module in ranks):
        raise InputError(
            f"the adapter to save at {path} is a DoRA adapter of the embedding: PEFT scales its "
            "columns, here DoRA scales rows. Leave the embedding out of the targets, or merge it."
        )
    if not ranks:
        beside = sorted(adapter.keys() - pairs.keys())
        found = f"has no update beside {_some(beside)}" if beside else "changes nothing"
        raise InputError(
            f"the adapter to save at {path} {found}: PEFT's format expects at least one update "
            "that is not zero in both factors. Make one with init_adapter."
        )
    settings: dict[str, Any] = dict(dora=dora == {True})
    if isinstance(model, Model):
        rest = {p: x for p, x in adapter.items() if p not in pairs}
        whole, more = write_whole(rest, model, ranks)
        _check_finite(whole)
        tensors, settings = tensors | whole, settings | more
        if model.config.tied:  # one update of one weight; PEFT has it twice
            for module in [m for m in ranks if slots[m].embedding]:
                settings["tied"] = True
                for factor, copy in _TIED.items():
                    key = _key(module, slots[module], factor)
                    tensors[copy] = np.ascontiguousarray(tensors[key].T)
    elif len(pairs) < len(adapter):
        raise InputError(
            f"the adapter to save at {path} trains whole weights or rows: expected updates alone "
            "for a tree that is no decoder of this library. Save those arrays yourself."
        )
    dropout = max(pair.dropout for pair in pairs.values())
    config = make_config(ranks, scales, slots, dropout=dropout, **settings)
    text = config_json(config, base_model=base_model, causal_lm=isinstance(model, Model))
    write_adapter(path, tensors, text)
    b = [x for name, x in tensors.items() if name.endswith(_SUFFIXES["b"])]
    return SavedAdapter(
        path=path,
        modules=len(ranks),
        nbytes=(path / WEIGHTS_NAME).stat().st_size,
        b_norm=float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in b))),
    )


def load_adapter(path: str | os.PathLike[str], model: Model | Targets) -> Adapter:
    """Reads a LoRA adapter that PEFT or `save_adapter` wrote, or a GGUF file of llama.cpp's.

    Every tensor of the file is used and every module that the configuration names is filled, or it
    is an error. Layers without an update get a zero one.

    Args:
        path: The adapter's directory, or its .gguf file: see `load_gguf_lora`.
        model: The model it was trained on, or the `Targets` of a tree, as for `save_adapter`.

    Returns:
        Path -> LoraPair, float32; and the arrays and TokenRows that are trained beside.

    Raises:
        InputError: files missing, damaged or not finite; a field of the configuration that changes
            the result and is not supported; or an adapter of another model (the differences are
            listed).
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, model)
    config = read_config(path)
    tensors = read_tensors(path / WEIGHTS_NAME)
    slots = _slots(model)
    targets = [m for m, slot in slots.items() if config.is_target(m, head=slot.head)]
    targets = [m for m in targets if not (slots[m].embedding and config.is_every_linear)]
    whole: dict[str, Whole] = {}
    if isinstance(model, Model):
        whole = whole_tensors(config, model, targets)
    tensors = _without_copies(path, config, tensors, model)
    _check_fit(path, config, tensors, slots, targets, whole)
    beside = read_whole(whole, tensors, model) if isinstance(model, Model) else {}
    stacks: dict[str, dict[tuple[int, ...] | None, str]] = {}
    for module in targets:
        stacks.setdefault(slots[module].path, {})[slots[module].layer] = module
    adapter: Adapter = {
        leaf: _stack(config, tensors, modules, slots[next(iter(modules.values()))])
        for leaf, modules in stacks.items()
    }
    if twice := sorted(adapter.keys() & beside.keys()):
        raise InputError(f"the adapter at {path} has two updates of {_some(twice)}: expected one.")
    if not config.dora:
        return adapter | beside
    # layers that the adapter leaves out keep the length of their rows
    partly = {p: x for p, x in adapter.items() if len(stacks[p]) < math.prod(x.lead)}
    untouched: Adapter = {}
    if isinstance(model, Model) and partly:
        leaves = flatten_paths(model.params, is_leaf=is_special)
        for leaf in partly:
            check_weights(leaves[leaf], leaf)
        untouched = add_magnitudes(model.params, partly)
    for leaf, pair in adapter.items():
        modules, slot = stacks[leaf], slots[next(iter(stacks[leaf].values()))]
        magnitude = np.zeros((*slot.lead, slot.layout.rows), np.float32)
        if leaf in untouched:
            magnitude[:] = np.asarray(untouched[leaf].magnitude)
        for layer, module in modules.items():
            magnitude[... if layer is None else layer] = tensors[_key(module, slot, "magnitude")]
        adapter[leaf] = replace(pair, magnitude=jnp.asarray(magnitude))
    return adapter | beside


def _load_gguf(path: Path, model: Model | Targets) -> Adapter:
    from .gguf_lora import load_gguf_lora

    if isinstance(model, Model):
        return load_gguf_lora(path, model.config)
    raise InputError(
        f"the adapter at {path} is a GGUF file, whose names are those of decoders: expected one in "
        "PEFT's format for a tree that is no decoder of this library."
    )


def _key(module: str, slot: _Slot, factor: str) -> str:
    suffixes = _SUFFIXES | _EMBEDDING_SUFFIXES if slot.embedding else _SUFFIXES
    return f"{PREFIX}{module}{suffixes[factor]}"


def _slots(model: Model | Targets) -> dict[str, _Slot]:
    """The linear modules and the embedding, by PEFT's name for them."""
    slots: dict[str, _Slot] = {}
    if isinstance(model, Targets):
        for t in model.found:
            name = t.path.replace("/", ".")
            slots[name] = _Slot(path=t.path, layer=None, lead=t.lead, layout=t.layout, head=t.head)
        return slots
    for path, leaf in flatten_paths(model.params, is_leaf=is_special).items():
        module, _, kind = path.rpartition("/")
        shape = tuple(leaf.shape)
        if kind == "embedding":
            layout = KernelLayout(shape=shape, in_axes=(-1,))
            name = tensor_names(path, model.config)[0].removesuffix(".weight")
            slots[name] = _Slot(
                path=path, layer=None, lead=(), layout=layout, head=False, embedding=True
            )
        if kind != "kernel":
            continue
        layout = KernelLayout(shape=shape[-2:], in_axes=(-2,))
        names = tensor_names(path, model.config)
        for index, name in zip(tensor_indices(path, model.config), names, strict=True):
            slots[name.removesuffix(".weight")] = _Slot(
                path=path,
                layer=index or None,
                lead=shape[:-2],
                layout=layout,
                head=module == "lm_head",
            )
    return slots


def _unstack(
    adapter: Mapping[str, LoraPair], slots: Mapping[str, _Slot]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, float]]:
    """Tensors by key, and rank and scale by module."""
    by_path: dict[str, list[tuple[str, _Slot]]] = {}
    for module, slot in slots.items():
        by_path.setdefault(slot.path, []).append((module, slot))
    unknown = sorted(set(adapter) - set(by_path))
    if unknown:
        raise InputError(
            f"the adapter has updates of {_some(unknown)}, which are no linear modules of the "
            f"model: expected some of {_some(by_path)}. Save it with the model it was made for."
        )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for path, pair in adapter.items():
        a, b = (np.asarray(x, np.float32) for x in (pair.a, pair.b))
        for module, slot in by_path[path]:
            if (pair.lead, pair.layout) != (slot.lead, slot.layout):
                raise InputError(
                    f"the adapter's update of '{path}' is for a kernel "
                    f"{(*pair.lead, *pair.layout.shape)}, the model's is "
                    f"{(*slot.lead, *slot.layout.shape)}. Save it with the model it was made for."
                )
            module_a, module_b = (a, b) if slot.layer is None else (a[slot.layer], b[slot.layer])
            parts = {"a": module_a, "b": module_b}
            if pair.magnitude is not None:
                m = np.asarray(pair.magnitude, np.float32)
                parts["magnitude"] = m if slot.layer is None else m[slot.layer]
            if not all(np.isfinite(x).all() for x in parts.values()):
                raise InputError(
                    f"the adapter's update of '{module}' has values that are not finite: expected "
                    "finite ones, training diverged. Nothing was written; go back to a checkpoint "
                    "and lower the learning rate."
                )
            rank = used_rank(module_a, module_b)
            if rank == 0 and pair.magnitude is None:
                continue
            rank = max(rank, 1)
            parts |= {"a": module_a[..., :rank, :], "b": module_b[..., :rank]}
            for factor, x in parts.items():
                x = x.T if slot.embedding else x
                tensors[_key(module, slot, factor)] = np.ascontiguousarray(x)
            ranks[module], scales[module] = rank, pair.scale
    return tensors, ranks, scales


def _stack(
    config: PeftConfig,
    tensors: Mapping[str, np.ndarray],
    modules: Mapping[tuple[int, ...] | None, str],
    slot: _Slot,
) -> LoraPair:
    """The update of one leaf: its layers padded to the largest rank, under one scale."""
    scales = {m: config.scale_of(m) for m in modules.values()}
    scale = max(scales.values(), key=abs)
    rank = max(config.rank_of(m) for m in modules.values())
    a = np.zeros((*slot.lead, rank, slot.layout.cols), np.float32)
    b = np.zeros((*slot.lead, slot.layout.rows, rank), np.float32)
    for layer, module in modules.items():
        index = layer or ()
        own_a, own_b = (tensors[_key(module, slot, f)] for f in "ab")
        if slot.embedding:
            own_a, own_b = own_a.T, own_b.T
        own_rank = own_a.shape[-2]
        folded = own_b if scales[module] == scale else own_b * np.float64(scales[module] / scale)
        a[(*index, ..., slice(own_rank), slice(None))] = own_a
        b[(*index, ..., slice(own_rank))] = folded
    return LoraPair(
        a=jnp.asarray(a),
        b=jnp.asarray(b),
        layout=slot.layout,
        scale=float(scale),
        dropout=config.dropout,
    )


def _without_copies(
    path: Path, config: PeftConfig, tensors: dict[str, np.ndarray], model: Model | Targets
) -> dict[str, np.ndarray]:
    """The tensors without those that PEFT saves twice, or beside an embedding's update.

    Raises:
        InputError: they are not what they should be copies of.
    """
    if not isinstance(model, Model):
        return tensors
    tensors = dict(tensors)
    embedding = f"{PREFIX}model.embed_tokens"
    leaf = model.params["embed_tokens"]["embedding"]
    for key in (f"{embedding}.base_layer.weight", f"{PREFIX}lm_head.base_layer.weight"):
        if key in tensors and f"{embedding}.lora_embedding_A" in tensors:
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
    if model.config.tied and f"{embedding}.lora_embedding_A" in tensors:
        if not config.tied:
            raise InputError(
                f"the adapter at {path} changes the tied embedding without ensure_weight_tying: "
                "expected embedding and output head to change together, as they are one weight "
                "here. Train it with ensure_weight_tying=True."
            )
        for factor, copy in _TIED.items():
            own = tensors[f"{embedding}{_EMBEDDING_SUFFIXES[factor]}"]
            if copy in tensors and not np.array_equal(tensors.pop(copy), own.T):
                raise InputError(
                    f"the adapter at {path} has different updates of embedding and output head, "
                    "which are one weight in this model. Merge it with PEFT."
                )
    return tensors


def _check_fit(
    path: Path,
    config: PeftConfig,
    tensors: Mapping[str, np.ndarray],
    slots: Mapping[str, _Slot],
    targets: Iterable[str],
    whole: Mapping[str, Whole],
) -> None:
    """Every tensor used, every target filled, every shape right."""
    want: dict[str, tuple[int, ...]] = {key: entry.shape for key, entry in whole.items()}
    for module in targets:
        slot = slots[module]
        lead = slot.lead if slot.layer is None else ()
        rank = config.rank_of(module)
        a, b = (*lead, rank, slot.layout.cols), (*lead, slot.layout.rows, rank)
        want[_key(module, slot, "a")] = a[::-1] if slot.embedding else a
        want[_key(module, slot, "b")] = b[::-1] if slot.embedding else b
        if config.dora and slot.embedding:
            raise InputError(
                f"the adapter at {path} is a DoRA adapter of the embedding '{module}': PEFT scales "
                "its columns, here DoRA scales rows. Merge it with PEFT."
            )
        if config.dora:
            want[_key(module, slot, "magnitude")] = (*lead, slot.layout.rows)
    missing = [k for k in want if k not in tensors]
    unused = [k for k in tensors if k not in want]
    shapes = [
        f"{k.removeprefix(PREFIX)}: expected {want[k]}, found {x.shape}"
        for k, x in tensors.items()
        if k in want and x.shape != want[k]
    ]
    if missing or unused or shapes:
        lines = [
            f"{title} ({len(items)}): {_some(items)}"
            for title, items in (
                ("missing", missing),
                ("not in the model or not a target", unused),
                ("of another shape", shapes),
            )
            if items
        ]
        hint = "The adapter was trained on another model, or its configuration was changed."
        raise InputError(
            f"the adapter at {path} does not fit the model: its configuration asks for "
            f"{len(want)} tensors, the file has {len(tensors)}. " + "; ".join(lines) + f". {hint}"
        )
    if not want:
        raise InputError(
            f"the adapter at {path} has no target in the model: target_modules "
            f"{config.target_modules!r} match none of {_some(slots)}."
        )
    bad = [k for k, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        raise InputError(
            f"{path / WEIGHTS_NAME}: {_some(bad)} have values that are not finite. Train again, "
            "with a lower learning rate."
        )


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:6]) + (f", ... ({len(items)} in all)" if len(items) > 6 else "")


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    bad = [k.removeprefix(PREFIX) for k, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        raise InputError(
            f"the trained weights of {_some(bad)} have values that are not finite: training "
            "diverged. Nothing was written; go back to a checkpoint and lower the learning rate."
        )
