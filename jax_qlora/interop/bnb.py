# SPDX-License-Identifier: Apache-2.0
"""4-bit tensors as bitsandbytes saves them, read as QuantizedArray without requantizing.

After a tensor's name come `.absmax`, `.quant_map`, with double quantization `.nested_absmax` and
`.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON bytes. Blocks run over
the flattened `[out, in]` tensor; where they straddle rows, the same values are kept as smaller
blocks with their constants repeated.

References:
    https://github.com/bitsandbytes-foundation/bitsandbytes, `QuantState.as_dict` in
    `bitsandbytes/functional.py`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..quant import QuantizedArray
from ..quant.codebook import CODEBOOKS, DYNAMIC_MAP
from .safetensors import StoredTensor

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = ("nf4", "fp4")


def check_quantization(raw: Mapping[str, Any], *, where: str) -> None:
    """Check that a config.json declares weights that are not quantized, or that can be read.

    Args:
        raw: The content of config.json.
        where: What to call it in messages.

    Raises:
        InputError: It declares another quantization than 4-bit bitsandbytes.
    """
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method", "bitsandbytes")
    four_bits = quantization.get("load_in_4bit", quantization.get("_load_in_4bit", False))
    if method != "bitsandbytes" or not four_bits:
        kind = f"{method}, 8 bits" if quantization.get("load_in_8bit") else method
        raise InputError(
            f"{where}: the weights are quantized ({kind}), which is not read: expected "
            "bitsandbytes 4-bit weights, or none. Use the unquantized checkpoint."
        )


def bnb_parts(tensors: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """Return the names of the tensors that make up a 4-bit one, or None if it is an ordinary one.

    Args:
        tensors: All tensors of the checkpoint.
        name: Name of the weight.

    Raises:
        InputError: A part is missing.
    """
    states = [name + _STATE + kind for kind in _FORMATS if name + _STATE + kind in tensors]
    if not states:
        return None
    parts = [name, f"{name}.absmax", f"{name}.quant_map", *states]
    nested = [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    if any(part in tensors for part in nested):
        parts += nested
    for part in parts:
        if part not in tensors:
            raise InputError(
                f"'{name}' is a 4-bit tensor without its part '{part}': the checkpoint is not "
                "complete. Download it again."
            )
    return tuple(parts)


def read_bnb(
    tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], *, dtype: Any
) -> QuantizedArray:
    """Read one 4-bit weight.

    Args:
        tensors: All tensors of the checkpoint.
        name: Name of the weight.
        shape: What its logical shape `[out, in]` must be.
        dtype: dtype of the array that the result stands for.

    Returns:
        The kernel `[in, out]`.

    Raises:
        InputError: The parts contradict each other, `shape`, or this library's codebooks.
    """
    (state_name,) = [name + _STATE + k for k in _FORMATS if name + _STATE + k in tensors]
    where = f"'{tensors[name].file}': the 4-bit tensor '{name}'"
    format = state_name.removeprefix(name + _STATE)
    try:
        state = json.loads(bytes(tensors[state_name].read()))
        found, block_size = tuple(state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{where} has a quantization state that cannot be read: {error}."
        ) from error
    if found != shape:
        raise InputError(
            f"{where} has shape {list(found)}, expected {list(shape)} from config.json. The file "
            "and the configuration belong to different models."
        )
    _check_table(where, "quant_map", tensors[f"{name}.quant_map"].read(), CODEBOOKS[format].levels)
    rows, cols = shape
    small = math.gcd(cols, block_size)
    blocks, repeats = math.ceil(rows * cols / block_size), block_size // small

    codes = tensors[name].read().reshape(-1).view(np.uint8)  # whatever dtype it is stored as
    absmax = tensors[f"{name}.absmax"].read()
    sizes_fit = codes.size == math.ceil(rows * cols / 2) and absmax.size == blocks
    if not sizes_fit or cols % 2 or small % 2:
        raise InputError(
            f"{where} of shape {list(shape)} in blocks of {block_size} has {codes.size} bytes of "
            f"codes and {absmax.size} block constants; expected {math.ceil(rows * cols / 2)} and "
            f"{blocks}, and rows of even length."
        )

    def constants(x: np.ndarray) -> np.ndarray:
        repeated = np.repeat(x.reshape(-1), repeats) if repeats > 1 else x
        return repeated[: rows * cols // small].reshape(rows, cols // small)

    parts, group_size = {"absmax": constants(absmax)}, 256
    if f"{name}.nested_absmax" in tensors:
        table = tensors[f"{name}.nested_quant_map"].read()
        _check_table(where, "nested_quant_map", table, DYNAMIC_MAP)
        group_size = int(state["nested_blocksize"]) * repeats
        parts["absmax_scale"] = tensors[f"{name}.nested_absmax"].read()
        parts["absmax_offset"] = np.asarray(state["nested_offset"], np.float32)
    floats = [x for x in parts.values() if x.dtype == np.float32]
    if not all(np.all(np.isfinite(x)) for x in floats):
        raise InputError(f"{where} has block constants that are not finite. Download it again.")
    arrays: dict[str, Any] = {part: jnp.asarray(x) for part, x in parts.items()}
    return QuantizedArray.from_parts(
        codes=jnp.asarray(codes.reshape(rows, cols // 2)),
        kernel_shape=(cols, rows),
        format=format,
        block_size=small,
        group_size=group_size,
        dtype=jnp.dtype(dtype),
        **arrays,
    )


def _check_table(where: str, part: str, found: np.ndarray, want: np.ndarray) -> None:
    if found.shape != want.shape or not np.array_equal(found.astype(np.float32), want):
        raise InputError(
            f"{where} has a {part} that is not the standard one: expected the levels that "
            "bitsandbytes uses, found others. It was quantized by a modified library."
        )
