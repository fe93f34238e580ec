# SPDX-License-Identifier: Apache-2.0
"""Model directories in 4 bits as bitsandbytes saves them, which transformers loads as they are.

A checkpoint is converted tensor by tensor, or a loaded model is written; kernels that are in 4 bits
already keep their codes. Blocks run over the flattened `[out, in]` tensor, so a kernel whose rows
are no multiple of the block is quantized here as bitsandbytes does it, and not as `quantize_array`
does, which pads rows.

References:
    `QuantState.as_dict` in https://github.com/bitsandbytes-foundation/bitsandbytes,
    `bitsandbytes/functional.py`.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..models import DecoderConfig
from ..quant import QuantizedArray
from ..quant.blockwise import GROUP_SIZE, quantize_absmax, quantize_blockwise
from ..quant.codebook import CODEBOOKS, DYNAMIC_MAP
from ..typing import Array, PyTree
from .bnb import BLOCK_SIZES, STATE
from .hf import is_linear, tensor_indices, tensor_names, tensor_shape
from .hf_config import config_to_hf
from .hf_write import (
    MAX_SHARD_BYTES,
    Progress,
    SavedModel,
    checked_leaves,
    count,
    count_updates,
    dense_tensor,
    plan_dense,
    write_model,
)
from .load_params import Encoding
from .model_card import Origin, model_card
from .safetensors_write import PlannedTensor

_CHUNK = 1 << 19  # elements encoded at a time
_LONGEST_OFFSET = -1.2345678901234567e-300  # so that the state's length is known before its value


def save_bnb(
    directory: str | Path,
    params: PyTree,
    config: DecoderConfig,
    *,
    encoding: Encoding,
    dtype: Any = None,
    tokenizer: Any = None,
    origin: Origin | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SavedModel:
    """Write a loaded model with the linears of its layers in bitsandbytes' 4 bits.

    Kernels that are in 4 bits keep their codes and constants. Dense ones, and those with an adapter
    attached, are quantized (again): a merged model moves when it is rounded to 4 bits.

    Args:
        directory: Where to; must not exist, or be empty, unless `overwrite`.
        params: The parameter tree; leaves may be arrays, QuantizedArray or LoraArray.
        config: The model's shape.
        encoding: The 4-bit format; that of the kernels which are in 4 bits.
        dtype: dtype of what is not quantized; by default each parameter's own.
        tokenizer: A `transformers` tokenizer to save beside the weights, or None.
        origin: What the model was made of, for its README.md; None writes none.
        max_shard_bytes: Largest weights file.
        overwrite: Replace a model that is in the directory.
        progress: Called after each tensor.

    Returns:
        What was written.

    Raises:
        InputError: As `save_hf`; a format that bitsandbytes has not; or a kernel in 4 bits whose
            format is another, or whose rows are padded.
    """
    check_encoding(encoding)
    planned: dict[str, PlannedTensor] = {}
    latest = Latest()
    for path, leaf in checked_leaves(params, config).items():
        if not is_linear(path):
            planned |= plan_dense(path, leaf, config, dtype)
            continue
        kind = np.dtype(jnp.dtype(dtype or leaf.dtype))
        shape = tensor_shape(path, config)
        names = zip(tensor_indices(path, config), tensor_names(path, config), strict=True)
        for index, name in names:
            if isinstance(leaf, QuantizedArray):
                make = partial(_kept, leaf, index, encoding, name)
            else:
                make = partial(_encoded_layer, leaf, index, encoding, name)
            planned |= plan_bnb(name, shape, make, latest, encoding=encoding, dtype=kind)
    named = str(jnp.dtype(dtype or checked_leaves(params, config)["embed_tokens/embedding"].dtype))
    content = config_to_hf(config, dtype=named)
    content["quantization_config"] = quantization_config(encoding, dtype=named)
    weights = f"{encoding.format} in 4 bits (bitsandbytes), the rest as {named}"
    return write_model(
        directory,
        planned,
        content,
        tokenizer=tokenizer,
        card=origin and model_card(origin, weights=weights, parameters=count(config)),
        updates=count_updates(params),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def check_encoding(encoding: Encoding) -> None:
    """Check that bitsandbytes has a format.

    Raises:
        InputError: It has not.
    """
    if encoding.format not in ("nf4", "fp4") or encoding.block_size not in BLOCK_SIZES:
        raise InputError(
            f"{encoding.format} in blocks of {encoding.block_size}: bitsandbytes has nf4 and fp4, "
            f"in blocks of {', '.join(map(str, BLOCK_SIZES))}. Use nf4 in blocks of 64."
        )


def quantization_config(encoding: Encoding, *, dtype: str) -> dict[str, Any]:
    """Return the entry of config.json that has transformers load the weights with bitsandbytes.

    Args:
        encoding: The 4-bit format.
        dtype: dtype of the matmuls there, e.g. "bfloat16".
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": encoding.format,
        "bnb_4bit_use_double_quant": encoding.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


class Parts(NamedTuple):
    """One 4-bit tensor, flattened as bitsandbytes holds it.

    Attributes:
        codes: uint8 `[ceil(n / 2)]`.
        absmax: uint8 `[blocks]` with double quantization, else float32.
        nested_absmax: float32 `[groups]` with double quantization.
        offset: float32 scalar with double quantization.
    """

    codes: np.ndarray
    absmax: np.ndarray
    nested_absmax: np.ndarray | None
    offset: float | None


class Latest:
    """The parts of the tensor that is being written: made with its first, dropped with the next."""

    name: str | None = None
    parts: Parts | None = None

    def get(self, name: str, make: Callable[[], Parts]) -> Parts:
        """Return a tensor's parts."""
        if self.name != name or self.parts is None:
            self.parts = None
            self.name, self.parts = name, make()
        return self.parts


def plan_bnb(
    name: str,
    shape: tuple[int, ...],
    make: Callable[[], Parts],
    latest: Latest,
    *,
    encoding: Encoding,
    dtype: np.dtype,
) -> Iterator[tuple[str, PlannedTensor]]:
    """Plan the tensors of one 4-bit weight.

    Args:
        name: The weight's name.
        shape: Its shape `[out, in]`.
        make: Quantizes it.
        latest: Shared by the weights of a checkpoint, so that each is quantized once.
        encoding: The format.
        dtype: dtype of the weight that the 4 bits stand for.
    """
    format, block_size, double_quant, _ = encoding
    size = math.prod(shape)
    blocks = -(-size // block_size)
    state: dict[str, Any] = {
        "quant_type": format,
        "blocksize": block_size,
        "dtype": str(dtype),
        "shape": list(shape),
    }
    if double_quant:
        state |= {
            "nested_blocksize": GROUP_SIZE,
            "nested_dtype": "float32",
            "nested_offset": _LONGEST_OFFSET,
        }
    length = len(json.dumps(state))

    def get() -> Parts:
        return latest.get(name, make)

    def write_state() -> np.ndarray:
        if double_quant:
            state["nested_offset"] = get().offset
        return np.frombuffer(json.dumps(state).ljust(length).encode(), np.uint8)

    def tensor(kind: Any, size: tuple[int, ...], make: Callable[[], Any]) -> PlannedTensor:
        return PlannedTensor(dtype=np.dtype(kind), shape=size, make=make)

    float32 = np.float32
    yield name, tensor(np.uint8, ((size + 1) // 2, 1), lambda: get().codes[:, None])
    kind = np.uint8 if double_quant else float32
    yield f"{name}.absmax", tensor(kind, (blocks,), lambda: get().absmax)
    yield f"{name}.quant_map", tensor(float32, (16,), lambda: CODEBOOKS[format].levels)
    if double_quant:
        groups = (-(-blocks // GROUP_SIZE),)
        yield f"{name}.nested_absmax", tensor(float32, groups, lambda: get().nested_absmax)
        yield f"{name}.nested_quant_map", tensor(float32, (256,), lambda: DYNAMIC_MAP)
    yield f"{name}{STATE}{format}", tensor(np.uint8, (length,), write_state)


def encode_rows(
    read: Callable[[int, int], np.ndarray],
    shape: tuple[int, ...],
    encoding: Encoding,
    *,
    where: str,
) -> Parts:
    """Quantize a tensor, some rows at a time.

    Args:
        read: Returns the rows from a first to before a last.
        shape: `[out, in]`.
        encoding: The format.
        where: What to call the tensor in messages.

    Raises:
        InputError: It has values that are not finite.
    """
    format, block_size, double_quant, _ = encoding
    rows, cols = shape
    unit = block_size // math.gcd(cols, block_size)  # rows that are whole blocks
    step = max(1, _CHUNK // cols // unit) * unit
    size = rows * cols
    codes = np.empty((size + 1) // 2, np.uint8)
    absmax = np.empty(-(-size // block_size), np.float32)
    for start in range(0, rows, step):
        chunk = read(start, min(start + step, rows)).reshape(-1)
        flat = np.zeros(min(step, -(-rows // unit) * unit) * cols, chunk.dtype)
        flat[: chunk.size] = chunk
        packed, constants, finite = _encode(flat, format, block_size)
        if not finite:
            raise InputError(
                f"{where} has values that are not finite (NaN or infinity): nothing was written. "
                "The checkpoint is damaged, or its training diverged."
            )
        first = start * cols
        part = codes[first // 2 : (first + chunk.size + 1) // 2]
        part[:] = np.asarray(packed)[: part.size]
        part = absmax[first // block_size : -(-(first + chunk.size) // block_size)]
        part[:] = np.asarray(constants)[: part.size]
    if not double_quant:
        return Parts(codes, absmax, None, None)
    codes8, scale, offset = _encode_absmax(absmax)
    return Parts(codes, np.asarray(codes8), np.asarray(scale), float(offset))


@partial(jax.jit, static_argnums=(1, 2))
def _encode(flat: Array, format: str, block_size: int) -> tuple[Array, Array, Array]:
    codes, absmax = quantize_blockwise(flat, format=format, block_size=block_size)
    return codes, absmax, jnp.all(jnp.isfinite(flat))


_encode_absmax = jax.jit(quantize_absmax)


def _encoded_layer(leaf: Any, index: tuple[int, ...], encoding: Encoding, name: str) -> Parts:
    rows = dense_tensor(leaf, index, True, np.dtype(np.float32), name)
    return encode_rows(lambda a, b: rows[a:b], rows.shape, encoding, where=f"'{name}'")


def _kept(leaf: QuantizedArray, index: tuple[int, ...], encoding: Encoding, name: str) -> Parts:
    """A kernel that is in 4 bits, its codes as they are."""
    q = jax.tree.map(lambda x: np.asarray(x[index]), leaf)
    # blocks that straddled rows were split, and their constants repeated: undo that
    repeats = q.group_size // GROUP_SIZE
    absmax = q.absmax.reshape(-1)
    once = absmax[:: max(repeats, 1)]
    if (
        (q.format, q.double_quant) != (encoding.format, encoding.double_quant)
        or q.block_size * repeats != encoding.block_size
        or q.layout.cols % q.block_size
        or not np.array_equal(np.repeat(once, repeats)[: absmax.size], absmax)
    ):
        raise InputError(
            f"'{name}' is {q!r}, which cannot be kept as {encoding.format} in blocks of "
            f"{encoding.block_size}{' with double quantization' * encoding.double_quant} over "
            "flattened rows. Write it in its own format, or quantize the dense model "
            "(--quantization none)."
        )
    offset = float(q.absmax_offset) if q.double_quant else None
    return Parts(q.codes.reshape(-1), once, q.absmax_scale, offset)
