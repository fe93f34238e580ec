# SPDX-License-Identifier: Apache-2.0
"""GGUF files, written tensor by tensor: the architectures that `gguf_families.py` has.

References:
    `conversion/*.py` of https://github.com/ggml-org/llama.cpp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from ..errors import InputError
from ..models import DecoderConfig
from ..models.rope import rope_frequencies, scale_frequencies
from ..typing import PyTree
from .gguf_config import model_metadata
from .gguf_families import find_architecture, gguf_name, heads_of
from .gguf_metadata import read_gguf_header
from .gguf_tokenizer import tokenizer_to_gguf
from .hf import is_expert, tensor_indices, tensor_names, tensor_shape
from .hf_write import Progress, SavedModel, checked_leaves, count_updates, dense_tensor
from .output import new_file

_F32, _F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
_Q8_0, _Q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0
KINDS = {
    "f32": (_F32, LlamaFileType.ALL_F32),
    "f16": (_F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (_Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_CHUNK = 1 << 20  # elements quantized at a time: NumPy makes several copies of them


class GGUFPlan(NamedTuple):
    """A tensor to write: its place in the file is planned first, its data are made when due.

    Attributes:
        kind: Its type.
        shape: Its shape, slowest axis first.
        make: Returns its data, encoded.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def save_gguf(
    file: str | Path,
    params: PyTree,
    config: DecoderConfig,
    *,
    kind: str = "f16",
    tokenizer: Any,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SavedModel:
    """Write a GGUF file that llama.cpp runs.

    Norms and biases are float32. With `q4_0` the embedding and the head are Q8_0, which costs
    little and keeps much; rows that are no multiple of the 32 of a block stay F16.

    Args:
        file: Where to; must not exist, unless `overwrite`.
        params: The parameter tree; leaves may be arrays, QuantizedArray or LoraArray.
        config: The model's shape.
        kind: "f32", "f16", "q8_0" or "q4_0".
        tokenizer: A `transformers` tokenizer, of those that `tokenizer_to_gguf` takes.
        name: What the file calls the model.
        overwrite: Replace a file that is there.
        progress: Called after each tensor.

    Returns:
        What was written.

    Raises:
        InputError: The file is in use; no architecture says what the model computes; the tokenizer
            is of another kind; a weight is not finite in F16; or the disk is full.
    """
    if kind not in KINDS:
        raise InputError(f"GGUF type '{kind}': expected one of {', '.join(KINDS)}.")
    if tokenizer is None:
        raise InputError(
            f"'{file}' needs a tokenizer: expected one beside the model, a tokenizer.json. A GGUF "
            "file is of no use without."
        )
    metadata = model_metadata(config) | {"general.type": "model"}
    planned = _plan(params, config, kind)
    metadata |= {"general.name": name} if name else {}
    metadata["general.file_type"] = int(KINDS[kind][1])
    metadata["general.quantization_version"] = 2
    metadata |= tokenizer_to_gguf(tokenizer, config)
    return write_gguf(
        file,
        metadata,
        planned,
        updates=count_updates(params),
        overwrite=overwrite,
        progress=progress,
    )


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put each head's rows, (side, pair) in torch's layout, in the order (pair, side).

    Args:
        rows: `[heads * head_dim, ...]`.
        heads: Number of heads; 0 leaves them as they are.
    """
    if not heads:
        return rows
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    file: str | Path,
    metadata: Mapping[str, Any],
    planned: Mapping[str, GGUFPlan],
    *,
    updates: int,
    overwrite: bool,
    progress: Progress | None,
) -> SavedModel:
    """Write a GGUF file, making one tensor at a time, and read back its header.

    Args:
        file: Where to.
        metadata: Key to bool, int, float, string, or list of strings or ints.
        planned: The tensors, by name.
        updates: Number of updates it holds.
        overwrite: Replace a file that is there.
        progress: Called after each tensor.

    Raises:
        InputError: The file is in use or cannot be written, or a tensor cannot be made.
    """
    with new_file(file, overwrite=overwrite) as partial_file:
        writer = GGUFWriter(partial_file, metadata["general.architecture"])
        try:
            for key, value in metadata.items():
                if key != "general.architecture":
                    _add(writer, key, value)
            for name, tensor in planned.items():
                dtype = np.dtype(np.float32)  # the kind says how it is stored
                writer.add_tensor_info(name, tensor.shape, dtype, tensor.nbytes, tensor.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, tensor in enumerate(planned.values(), 1):
                writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
                if progress is not None:
                    progress(done, len(planned))
        finally:
            writer.close()
        _, found = read_gguf_header(partial_file)
        size = partial_file.stat().st_size
        wrong = [
            name
            for name, tensor in planned.items()
            if name not in found
            or (found[name].kind, found[name].shape) != (tensor.kind, tensor.shape)
            or found[name].offset + tensor.nbytes > size
        ]
        if wrong:
            raise OSError(f"tensor '{wrong[0]}' reads back as {found.get(wrong[0])}")
    file = Path(file)
    return SavedModel(
        path=file,
        tensors=len(found),
        nbytes=sum(tensor.nbytes for tensor in planned.values()),
        files={file.name: size},
        updates=updates,
    )


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _plan(params: PyTree, config: DecoderConfig, kind: str) -> dict[str, GGUFPlan]:
    planned = {}
    offset = find_architecture(config).norm_offset
    for path, leaf in checked_leaves(params, config).items():
        shape = tensor_shape(path, config)
        router = path.endswith("/gate/kernel")  # llama.cpp keeps these in float32
        own = KINDS[kind][0] if len(shape) == 2 and not router else _F32
        if own == _Q4_0 and not path.startswith("layers/"):
            own = _Q8_0
        if shape[-1] % GGML_QUANT_SIZES[own][0]:
            own = _F16
        parts: dict[str, list[Callable[[], np.ndarray]]] = {}
        names = zip(tensor_indices(path, config), tensor_names(path, config), strict=True)
        for index, name in names:
            make = partial(
                _encoded, leaf, index, path.endswith("/kernel"), own, heads_of(name, config), name
            )
            if offset and name.endswith("norm.weight"):
                make = partial(_add_offset, make, offset)
            parts.setdefault(gguf_name(name, config), []).append(make)
        for name, makes in parts.items():
            if is_expert(path):
                planned[name] = GGUFPlan(own, (len(makes), *shape), partial(_stacked, makes))
            else:
                planned[name] = GGUFPlan(own, shape, makes[0])
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        plain = rope_frequencies(replace(config, rope_scaling=None))
        factors = np.asarray(plain / scale_frequencies(plain, scaling), np.float32)
        planned["rope_freqs.weight"] = GGUFPlan(_F32, factors.shape, lambda: factors)
    return planned


def _encoded(
    leaf: Any,
    index: tuple[int, ...],
    transpose: bool,
    kind: GGMLQuantizationType,
    heads: int,
    name: str,
) -> np.ndarray:
    dtype = np.dtype(np.float16 if kind == _F16 else np.float32)
    rows = permute(dense_tensor(leaf, index, transpose, dtype, name), heads)
    if kind in (_F32, _F16):
        return rows
    step = max(1, _CHUNK // rows.shape[1])
    return np.concatenate(
        [
            quantize(np.ascontiguousarray(rows[start : start + step]), kind)
            for start in range(0, len(rows), step)
        ]
    )


def _stacked(makes: list[Callable[[], np.ndarray]]) -> np.ndarray:
    """The experts of a layer, one after the other into one array."""
    first = makes[0]()
    stack = np.empty((len(makes), *first.shape), first.dtype)
    stack[0] = first
    for i, make in enumerate(makes[1:], 1):
        stack[i] = make()
    return stack


def _add_offset(make: Callable[[], np.ndarray], offset: float) -> np.ndarray:
    return make() + np.float32(offset)
