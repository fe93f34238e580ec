# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as GGUF files, for llama.cpp's `--lora`.

Tensors are called as the weight they update, with `.lora_a` and `.lora_b` behind. The update is
`alpha / rank * (b @ a)`, with one alpha for the file and the rank of each tensor.

References:
    `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of https://github.com/ggml-org/llama.cpp.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from ..errors import InputError
from ..lora import LoraPair
from ..models import DecoderConfig
from .gguf_write import GGUFPlan, find_architecture, gguf_name, heads_of, permute, write_gguf
from .hf import parameter_shapes, tensor_names
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
    alphas = [pair.scale * pair.rank for pair in adapter.values()]
    planned: dict[str, GGUFPlan] = {}
    updates = 0
    for path, pair in adapter.items():
        a, b = (np.asarray(x, np.float32) for x in (pair.a, pair.b))
        factor = np.float32(pair.scale * pair.rank / alphas[0])
        for layer, weight in enumerate(tensor_names(path, config)):
            own_a, own_b = (x[layer] if path.startswith("layers/") else x for x in (a, b))
            if not (own_a.any() or own_b.any()):
                continue
            if not (np.isfinite(own_a).all() and np.isfinite(own_b).all()):
                raise InputError(f"The adapter's update of '{weight}' has values not finite.")
            updates += bool(own_a.any() and own_b.any())
            own_b = permute(own_b * factor, heads_of(weight, config))
            stem = gguf_name(weight, config)
            planned[f"{stem}.lora_a"] = GGUFPlan(_F32, own_a.shape, partial(_same, own_a))
            planned[f"{stem}.lora_b"] = GGUFPlan(_F32, own_b.shape, partial(_same, own_b))
    if not planned:
        raise InputError(
            f"The adapter to write to '{file}' changes nothing: expected at least one update that "
            "is not zero in both factors."
        )
    architecture, _ = find_architecture(config)
    metadata: dict[str, Any] = {"general.architecture": architecture, "general.type": "adapter"}
    metadata |= {"general.name": name} if name else {}
    metadata |= {"adapter.type": "lora", "adapter.lora.alpha": float(alphas[0])}
    return write_gguf(
        file, metadata, planned, updates=updates, overwrite=overwrite, progress=progress
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
