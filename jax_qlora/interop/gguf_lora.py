# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as GGUF files, which llama.cpp's `--lora` takes: written and read.

Tensors are called as the weight they update, with `.lora_a` and `.lora_b` behind. The update is
`alpha / rank * (b @ a)`, with one alpha for the file and the rank of each tensor. The experts of a
layer are one tensor, with their axis in front.

References:
    `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of https://github.com/ggml-org/llama.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ..errors import InputError
from ..lora import Adapter, LoraPair
from ..models import DecoderConfig
from ..quant.layout import KernelLayout
from .gguf import GGUFTensor, check_entries
from .gguf_families import find_architecture, gguf_name, heads_of
from .gguf_metadata import GGUFEntry, read_gguf_header
from .gguf_write import GGUFPlan, permute, write_gguf
from .hf import parameter_shapes, tensor_indices, tensor_names
from .hf_write import Progress, SavedModel

_F32 = GGMLQuantizationType.F32


def save_gguf_lora(
    file: str | Path,
    adapter: Mapping[str, Any],
    config: DecoderConfig,
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SavedModel:
    """Write an adapter that llama.cpp applies to the same model in GGUF.

    Layers without an update are left out. Where scale times rank differs between kernels, the
    difference is folded into `b`: the update is the same.

    Args:
        file: Where to; must not exist, unless `overwrite`.
        adapter: Path -> LoraPair of the linears of the model.
        config: The model's shape.
        name: What the file calls the adapter.
        overwrite: Replace a file that is there.
        progress: Called after each tensor.

    Returns:
        What was written; `updates` is the number of modules with `b` not zero.

    Raises:
        InputError: The adapter is of another model, is no plain LoRA, or changes nothing; a value
            is not finite; or the file is in use.
    """
    for path, pair in adapter.items():
        _check(path, pair, config)
    adapter = {path: pair.whole() for path, pair in adapter.items()}
    alphas = [pair.scale * pair.rank for pair in adapter.values()]
    planned: dict[str, GGUFPlan] = {}
    updates = 0
    for path, pair in adapter.items():
        a, b = (np.asarray(x, np.float32) for x in (pair.a, pair.b))
        factor = np.float32(pair.scale * pair.rank / alphas[0])
        for stem, (layer, heads) in _places(path, config).items():
            own_a, own_b = a[layer], b[layer]
            if not (own_a.any() or own_b.any()):
                continue
            if not (np.isfinite(own_a).all() and np.isfinite(own_b).all()):
                raise InputError(f"The adapter's update of '{stem}' has values not finite.")
            updates += int(np.sum(own_a.any(axis=(-2, -1)) & own_b.any(axis=(-2, -1))))
            own_b = permute(own_b * factor, heads)
            planned[f"{stem}.lora_a"] = GGUFPlan(_F32, own_a.shape, partial(_same, own_a))
            planned[f"{stem}.lora_b"] = GGUFPlan(_F32, own_b.shape, partial(_same, own_b))
    if not planned:
        raise InputError(
            f"The adapter to write to '{file}' changes nothing: expected at least one update that "
            "is not zero in both factors."
        )
    architecture = find_architecture(config).name
    metadata: dict[str, Any] = {"general.architecture": architecture, "general.type": "adapter"}
    metadata |= {"general.name": name} if name else {}
    metadata |= {"adapter.type": "lora", "adapter.lora.alpha": float(alphas[0])}
    return write_gguf(
        file, metadata, planned, updates=updates, overwrite=overwrite, progress=progress
    )


def load_gguf_lora(file: str | Path, config: DecoderConfig) -> Adapter:
    """Read an adapter that llama.cpp takes.

    Every tensor of the file is used, or it is an error. Layers without an update get a zero one;
    where ranks differ between layers, lower ones are padded with zeros, and the difference of the
    scales is folded into `b`.

    Args:
        file: A .gguf file.
        config: The shape of the model it was trained on.

    Returns:
        Path -> LoraPair, float32.

    Raises:
        InputError: The file is damaged or no LoRA adapter; it is of another architecture or shape;
            a tensor is missing or has no use; alpha is missing; a value is not finite.
    """
    file = Path(file)
    metadata, entries = read_gguf_header(file)
    alpha = lora_alpha(metadata, where=f"'{file}'")
    want, found = find_architecture(config).name, metadata.get("general.architecture")
    if found != want:
        raise InputError(
            f"'{file}' is an adapter of the architecture {found!r}: expected {want!r}, that of a "
            f"{config.family} model. Give the model that it was trained on."
        )
    check_entries(entries, file)
    places = {
        stem: (path, *place)
        for path in parameter_shapes(config)
        if path.endswith("/kernel")
        for stem, place in _places(path, config).items()
    }
    stacks: dict[str, dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]] = {}
    for stem, (a, b) in _factors(entries, places, file).items():
        path, layer, heads = places[stem]
        _check_shapes(a, b, parameter_shapes(config)[path][len(layer) :], file)
        stacks.setdefault(path, {})[layer] = (_values(a, 0, file), _values(b, heads, file))
    return {
        path: _stack(layers, parameter_shapes(config)[path], alpha)
        for path, layers in stacks.items()
    }


def lora_alpha(metadata: Mapping[str, Any], *, where: str) -> float:
    """Return the numerator of an adapter's scale.

    Args:
        metadata: Key to value.
        where: What to call the file in messages.

    Raises:
        InputError: It is missing or no number; or the file holds no LoRA adapter, or one that is
            applied in a way that is not implemented.
    """
    for key, want in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != want:
            raise InputError(
                f"{where} is no LoRA adapter: {key} is {metadata.get(key)!r}, expected {want!r}."
            )
    known = ("adapter.type", "adapter.lora.alpha")
    for key in metadata:
        if key.startswith("adapter.") and key not in known:
            raise InputError(
                f"{where}: '{key}' is {metadata[key]!r:.80}, which is not implemented and may "
                "change what the adapter does."
            )
    alpha: Any = metadata.get("adapter.lora.alpha")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha == 0:
        raise InputError(
            f"{where}: adapter.lora.alpha is {alpha!r}: expected a finite number other than 0, by "
            "which the updates are scaled. Convert the adapter again."
        )
    return float(alpha)


def _places(path: str, config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """By its name in GGUF, where a weight is in the stack, and its permuted heads."""
    names = zip(tensor_indices(path, config), tensor_names(path, config), strict=True)
    return {gguf_name(name, config): (i[:1], heads_of(name, config)) for i, name in names}


def _factors(
    entries: Mapping[str, GGUFEntry], places: Mapping[str, Any], file: Path
) -> dict[str, tuple[GGUFEntry, GGUFEntry]]:
    """The two factors of each weight's update."""
    found: dict[str, dict[str, GGUFEntry]] = {}
    unknown = []
    for name, entry in entries.items():
        stem, _, factor = name.rpartition(".lora_")
        if stem in places and factor in ("a", "b"):
            found.setdefault(stem, {})[factor] = entry
        else:
            unknown.append(name)
    if unknown:
        raise InputError(
            f"'{file}': {len(unknown)} tensors are no updates of the model's linears: "
            f"{', '.join(unknown[:4])}; expected names such as 'blk.0.attn_q.weight.lora_a'. It is "
            "of another model, or changes embeddings or norms, which is not implemented."
        )
    for stem, factors in found.items():
        if len(factors) == 1:
            (has,) = factors
            raise InputError(
                f"'{file}': the update of '{stem}' has lora_{has} alone: expected lora_a and "
                "lora_b. Convert the adapter again."
            )
    if not found:
        raise InputError(f"'{file}' has no updates: expected tensors named *.lora_a and *.lora_b.")
    return {stem: (factors["a"], factors["b"]) for stem, factors in found.items()}


def _check_shapes(a: GGUFEntry, b: GGUFEntry, kernel: tuple[int, ...], file: Path) -> None:
    *lead, cols, rows = kernel
    rank = a.shape[-2] if len(a.shape) > 1 else 0
    for entry, want in ((a, (*lead, rank, cols)), (b, (*lead, rows, rank))):
        if entry.shape != want:
            raise InputError(
                f"'{file}': tensor '{entry.name}' has shape {list(entry.shape)}, expected "
                f"{list(want)}. Give the model that the adapter was trained on."
            )


def _values(entry: GGUFEntry, heads: int, file: Path) -> np.ndarray:
    rows = replace(entry, shape=(math.prod(entry.shape[:-1]), entry.shape[-1]))
    values = GGUFTensor(entry=rows, file=file, heads=heads).read().astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"'{file}': tensor '{entry.name}' has values that are not finite.")
    return values.reshape(entry.shape)


def _stack(
    layers: Mapping[tuple[int, ...], tuple[np.ndarray, np.ndarray]],
    shape: tuple[int, ...],
    alpha: float,
) -> LoraPair:
    """The updates of one kernel's layers, padded to the largest rank, under one scale."""
    *lead, cols, rows = shape
    rank = max(a.shape[-2] for a, _ in layers.values())
    a = np.zeros((*lead, rank, cols), np.float32)
    b = np.zeros((*lead, rows, rank), np.float32)
    for layer, (own_a, own_b) in layers.items():
        own = own_a.shape[-2]
        a[(*layer, ..., slice(own), slice(None))] = own_a
        b[(*layer, ..., slice(own))] = own_b * np.float32(rank / own)
    return LoraPair(
        a=jnp.asarray(a),
        b=jnp.asarray(b),
        layout=KernelLayout(shape=shape[-2:], in_axes=(-2,)),
        scale=alpha / rank,
        dropout=0.0,
    )


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _check(path: str, pair: Any, config: DecoderConfig) -> None:
    shapes = parameter_shapes(config)
    if not isinstance(pair, LoraPair) or pair.magnitude is not None:
        raise InputError(
            f"The adapter's update of '{path}' is no plain LoRA, which is all that GGUF adapters "
            "can say. Merge it and write the model (--format gguf)."
        )
    want = shapes.get(path) if path.endswith("/kernel") else None
    if want != (*pair.lead, *pair.layout.shape):
        raise InputError(
            f"The adapter's update of '{path}' is for a kernel of shape "
            f"{(*pair.lead, *pair.layout.shape)}; expected {want or 'the path of a linear'}. Write "
            "it with the model it was made for; updates of embeddings are not written to GGUF."
        )
