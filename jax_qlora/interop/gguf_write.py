# SPDX-License-Identifier: Apache-2.0
"""GGUF files, written tensor by tensor: the architectures that `gguf_config.py` has.

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
from .gguf import LLAMA3_SCALINGS
from .gguf_config import ARCHITECTURES, TOP_NAMES, Architecture, config_from_gguf
from .gguf_metadata import GGUFEntry, read_gguf_header
from .gguf_tokenizer import tokenizer_to_gguf
from .hf import tensor_indices, tensor_names, tensor_shape
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
_TOP = {hf: name for name, hf in TOP_NAMES.items()}
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
    planned = _plan(params, config, kind)
    metadata = model_metadata(config) | {"general.type": "model"}
    metadata |= {"general.name": name} if name else {}
    metadata["general.file_type"] = int(KINDS[kind][1])
    metadata["general.quantization_version"] = 2
    _check_readable(metadata, planned, config)
    metadata |= tokenizer_to_gguf(tokenizer, config)
    return write_gguf(
        file,
        metadata,
        planned,
        updates=count_updates(params),
        overwrite=overwrite,
        progress=progress,
    )


def find_architecture(config: DecoderConfig) -> tuple[str, Architecture]:
    """Return the architecture of a model's files, with its name.

    Args:
        config: The model's shape.

    Raises:
        InputError: There is none here.
    """
    family = "llama" if config.family == "mistral" else config.family
    for name, architecture in ARCHITECTURES.items():
        if architecture.family == family:
            return name, architecture
    known = [architecture.family for architecture in ARCHITECTURES.values()]
    raise InputError(
        f"A {config.family} model cannot be written to GGUF here: expected one of "
        f"{', '.join(known)}, mistral. Write a Hugging Face directory (--format hf) and convert it "
        "with llama.cpp's convert_hf_to_gguf.py."
    )


def model_metadata(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys that say what a model computes.

    Args:
        config: The model's shape.

    Raises:
        InputError: As `find_architecture`.
    """
    architecture, _ = find_architecture(config)
    values: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.max_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(config.rope_scaling.factor),
        }
    if architecture == "gemma3":
        values |= _gemma3(config)
    prefixed = {f"{architecture}.{k}": v for k, v in values.items()}
    return {"general.architecture": architecture} | prefixed


def _gemma3(config: DecoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if config.sliding_window is not None:
        local = [window is not None for window in config.windows]
        values["attention.sliding_window"] = config.sliding_window
        if local != [(i + 1) % 6 != 0 for i in range(config.n_layers)]:
            # llama.cpp reads a period, of 6 without the key, and some versions read no key.
            raise InputError(
                "A GGUF file of a gemma3 model cannot say which layers see a window, unless all "
                f"do but each sixth; expected that, found {local}. Write the model as a Hugging "
                "Face directory (--format hf)."
            )
    if config.local_rope_theta is not None:
        values["rope.freq_base_swa"] = float(config.local_rope_theta)
    if config.logit_softcap is not None:
        values["final_logit_softcapping"] = float(config.logit_softcap)
    return values


def gguf_name(name: str, config: DecoderConfig) -> str:
    """Return what GGUF calls a tensor of a checkpoint.

    >>> from jax_qlora.models.presets import TINY
    >>> gguf_name("model.layers.3.self_attn.q_proj.weight", TINY)
    'blk.3.attn_q.weight'
    >>> gguf_name("lm_head.weight", TINY)
    'output.weight'

    Args:
        name: Its name in Hugging Face's checkpoint.
        config: The model's shape.

    Raises:
        InputError: The architecture has no such tensor.
    """
    architecture, known = find_architecture(config)
    names = {module: own for own, module in known.names.items()}
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    if name in _TOP:
        return _TOP[name]
    if name.startswith("model.layers.") and module in names:
        return f"blk.{layer}.{names[module]}.{kind}"
    raise InputError(
        f"'{name}' has no place in a GGUF file of the {architecture} architecture. Write the model "
        "as a Hugging Face directory (--format hf)."
    )


def heads_of(name: str, config: DecoderConfig) -> int:
    """Return the number of heads by which a tensor's rows are permuted in GGUF; 0 for none."""
    if not find_architecture(config)[1].permuted:
        return 0
    if ".self_attn.q_proj." in name:
        return config.n_heads
    return config.n_kv_heads if ".self_attn.k_proj." in name else 0


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
    offset = find_architecture(config)[1].norm_offset
    for path, leaf in checked_leaves(params, config).items():
        shape = tensor_shape(path, config)
        own = KINDS[kind][0] if len(shape) == 2 else _F32
        if own == _Q4_0 and not path.startswith("layers/"):
            own = _Q8_0
        if shape[-1] % GGML_QUANT_SIZES[own][0]:
            own = _F16
        names = zip(tensor_indices(path, config), tensor_names(path, config), strict=True)
        for index, name in names:
            make = partial(
                _encoded, leaf, index, path.endswith("/kernel"), own, heads_of(name, config), name
            )
            if offset and name.endswith("norm.weight"):
                make = partial(_add_offset, make, offset)
            planned[gguf_name(name, config)] = GGUFPlan(own, shape, make)
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


def _add_offset(make: Callable[[], np.ndarray], offset: float) -> np.ndarray:
    return make() + np.float32(offset)


def _check_readable(
    metadata: Mapping[str, Any], planned: Mapping[str, GGUFPlan], config: DecoderConfig
) -> None:
    """The file says all that the configuration does, or the model is of another architecture."""
    entries = {
        name: GGUFEntry(name=name, shape=tensor.shape, kind=tensor.kind, offset=0)
        for name, tensor in planned.items()
    }
    tokens = ("bos_token_id", "eos_token_ids", "pad_token_id")  # with the tokenizer
    again = vars(config_from_gguf(metadata, entries))
    # llama.cpp has a place for the factors in this architecture, and `read_gguf` knows these.
    factors = metadata["general.architecture"] == "llama" and (
        config.rope_scaling in LLAMA3_SCALINGS
    )
    lost = [
        f"{field} = {value!r}"
        for field, value in vars(config).items()
        if field not in ("family", *tokens)
        and not (field == "rope_scaling" and factors)
        and again[field] != value
    ]
    if lost:
        raise InputError(
            f"A GGUF file of a {config.family} model cannot say {', '.join(lost)}. Write the model "
            "as a Hugging Face directory (--format hf)."
        )
