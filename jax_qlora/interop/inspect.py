# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint or an adapter, by its headers alone: no weights are read."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gguf import GGMLQuantizationType

from ..errors import InputError
from ..models import DecoderConfig
from ..quant import quantize_rows
from ..tree import nbytes
from .adapter_files import WEIGHTS_NAME
from .bnb import STATE, bnb_parts
from .gguf import GGUFTensor, check_entries
from .gguf_families import family_of
from .gguf_lora import lora_alpha
from .gguf_metadata import GGUFEntry, read_gguf_header
from .hf import is_linear, parameter_shapes, tensor_names, tensor_shape
from .load_params import check_tensors
from .open import open_checkpoint
from .peft_config import CONFIG_NAME, read_config, read_document
from .peft_parameters import name_experts
from .peft_prompt import KINDS, check_fields
from .safetensors import read_header

_LAYER = re.compile(r"\.(?:layers|h)\.\d+\.|^blk\.\d+\.")
_SHAPE = (
    "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_length",
    "tied",
)  # fmt: skip


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint or an adapter consists of.

    Args:
        path: A model as for `load_model`, or an adapter: PEFT's directory, or a .gguf file.

    Returns:
        Plain data. `kind` is "model" or "adapter". Of a model: family, shape, parameters, bytes,
        formats, bits for each parameter, linears, and the bytes of its weights if loaded as nf4, in
        16 and in 32 bits. Of an adapter: base model, targets with their ranks, parameters, bytes,
        and `loads`: True, or why it does not load here.

    Raises:
        InputError: There is nothing like that; files are damaged, or of a model that is not read.
    """
    local = Path(path).expanduser()
    if (local / CONFIG_NAME).is_file():
        return _inspect_adapter(local)
    if local.suffix == ".gguf" and local.is_file():
        metadata, entries = read_gguf_header(local)
        if metadata.get("general.type") == "adapter":
            return _inspect_gguf_adapter(local, metadata, entries)
    return _inspect_model(path)


def _inspect_model(path: str | Path) -> dict[str, Any]:
    where, config, tensors, _ = open_checkpoint(path)
    check_tensors(tensors, config, where=f"'{where}'")
    formats: dict[str, Counter[str]] = {}
    linears = []
    for parameter, names in _parameters(config):
        shape = tensor_shape(parameter, config)
        kinds = Counter()
        for name in names:
            kind, size = _stored(tensors, name)
            kinds[kind] += 1
            formats.setdefault(kind, Counter()).update(
                tensors=1, parameters=math.prod(shape), bytes=size
            )
        if parameter.endswith("/kernel"):
            module = parameter.removeprefix("layers/").removesuffix("/kernel").replace("/", ".")
            linears.append(
                {"name": module, "shape": list(shape), "count": len(names), "formats": dict(kinds)}
            )
    stored = sum(kind["bytes"] for kind in formats.values())
    parameters = sum(kind["parameters"] for kind in formats.values())
    return {
        "kind": "model",
        "path": str(where),
        "format": "GGUF" if where.suffix == ".gguf" else "safetensors",
        "family": config.family,
        "shape": {name: getattr(config, name) for name in _SHAPE},
        "parameters": parameters,
        "bytes": stored,
        "bits_per_parameter": round(8 * stored / parameters, 3),
        "formats": {kind: dict(counts) for kind, counts in formats.items()},
        "linears": linears,
        "memory": _memory(config),
    }


def _parameters(config: DecoderConfig) -> Iterable[tuple[str, tuple[str, ...]]]:
    return ((path, tensor_names(path, config)) for path in parameter_shapes(config))


def _stored(tensors: Mapping[str, Any], name: str) -> tuple[str, int]:
    """In what format a weight is stored, and its bytes, block constants included."""
    parts = bnb_parts(tensors, name)
    if parts:
        (state,) = [part for part in parts if STATE in part]
        return state.rpartition("__")[2], sum(tensors[part].nbytes for part in parts)
    tensor = tensors[name]
    if isinstance(tensor, GGUFTensor):
        return GGMLQuantizationType(tensor.entry.kind).name, tensor.stored_bytes
    return str(tensor.dtype), tensor.nbytes


def _memory(config: DecoderConfig) -> dict[str, int]:
    """Bytes of the weights in memory, by how they are held; norms are float32 in all."""
    packed = rest = norms = 0
    for path, shape in parameter_shapes(config).items():
        if is_linear(path):
            rows, cols = tensor_shape(path, config)
            stack = jax.ShapeDtypeStruct(
                (math.prod(shape) // (rows * cols), rows, cols), jnp.bfloat16
            )
            packed += nbytes(jax.eval_shape(quantize_rows, stack))
        elif path.endswith("/scale"):
            norms += 4 * math.prod(shape)
        else:
            rest += math.prod(shape)
    total = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    dense = total - norms // 4
    return {"nf4": packed + 2 * rest + norms, "16 bits": 2 * dense + norms, "32 bits": 4 * total}


def _inspect_adapter(path: Path) -> dict[str, Any]:
    raw = read_document(path)
    header = read_header(path / WEIGHTS_NAME)
    shapes = named = {name: x.shape for name, x in header.items()}
    loads: bool | str = True
    try:
        if raw.get("peft_type") in KINDS:
            check_fields(path / CONFIG_NAME, raw)
        else:
            named = name_experts(shapes, read_config(path, raw))
    except InputError as error:
        loads = str(error)
    return {
        "kind": "adapter",
        "path": str(path),
        "format": "PEFT",
        "base_model": raw.get("base_model_name_or_path"),
        "method": raw.get("peft_type"),
        "alpha": raw.get("lora_alpha"),
        "virtual_tokens": raw.get("num_virtual_tokens"),
        **_updates(shapes, ".lora_A.weight"),
        "targets": _updates(named, ".lora_A.weight")["targets"],
        "whole": _whole(shapes),
        "dtypes": sorted({str(x.dtype) for x in header.values()}),
        "bytes": sum(x.nbytes for x in header.values()),
        "loads": loads,
    }


def _whole(names: Iterable[str]) -> dict[str, int]:
    """Parameters that are no updates but replaced, by the end of their names, and their number."""
    plain = (n for n in names if n.endswith((".weight", ".bias")) and "lora_" not in n)
    own = (n for n in plain if not n.endswith(".base_layer.weight"))  # a copy beside an update
    return dict(Counter(_LAYER.split(n)[-1].rpartition("model.")[2] for n in own))


def _inspect_gguf_adapter(
    path: Path, metadata: Mapping[str, Any], entries: Mapping[str, GGUFEntry]
) -> dict[str, Any]:
    check_entries(entries, path)
    loads: bool | str = True
    try:
        lora_alpha(metadata, where=f"'{path}'")
        family_of(metadata, f"'{path}'")
    except InputError as error:
        loads = str(error)
    return {
        "kind": "adapter",
        "path": str(path),
        "format": "GGUF",
        "base_model": f"a {metadata.get('general.architecture')} model",
        "method": metadata.get("adapter.type"),
        "alpha": metadata.get("adapter.lora.alpha"),
        **_updates({name: entry.shape for name, entry in entries.items()}, ".lora_a"),
        "bytes": sum(GGUFTensor(entry=e, file=path).stored_bytes for e in entries.values()),
        "loads": loads,
    }


def _updates(shapes: Mapping[str, tuple[int, ...]], suffix: str) -> dict[str, Any]:
    """Targets by the end of their names, each with its ranks and their number."""
    targets: dict[str, Counter[int]] = {}
    for name, shape in shapes.items():
        if name.endswith(suffix):
            module = _LAYER.split(name.removesuffix(suffix).removesuffix(".weight"))[-1]
            # PEFT's is [rank, ...], also of a convolution; in GGUF experts come before
            rank = shape[0] if suffix == ".lora_A.weight" else shape[-2:][0]
            targets.setdefault(module, Counter())[rank] += 1
    return {
        "targets": {name: dict(ranks) for name, ranks in targets.items()},
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
    }
