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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..quant import QuantizedArray
from ..quant.blockwise import GROUP_SIZE
from ..quant.codebook import CODEBOOKS, DYNAMIC_MAP
from .safetensors import StoredTensor, aligned_bytes

STATE = ".quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
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
    if not isinstance(quantization, Mapping):
        raise InputError(f"{where}: quantization_config is {quantization!r}; expected an object.")
    method = quantization.get("quant_method", "bitsandbytes")
    four_bits = quantization.get("load_in_4bit", quantization.get("_load_in_4bit", False))
    if method != "bitsandbytes" or not four_bits:
        kind = f"{method}, 8 bits" if quantization.get("load_in_8bit") else method
        raise InputError(
            f"{where}: the weights are quantized ({kind}), which is not read: expected "
            "bitsandbytes 4-bit weights, or none. Use the unquantized checkpoint that this one was "
            "made from (its model card names it); it is quantized to 4 bits while it is read."
        )


def bnb_parts(tensors: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """Return the names of the tensors that make up a 4-bit one, or None if it is an ordinary one.

    Args:
        tensors: All tensors of the checkpoint.
        name: Name of the weight.

    Raises:
        InputError: A part is missing.
    """
    states = [name + STATE + kind for kind in _FORMATS if name + STATE + kind in tensors]
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
    tensors: Mapping[str, StoredTensor],
    names: Sequence[str],
    shape: tuple[int, ...],
    *,
    dtype: Any,
    host: Any = None,
) -> QuantizedArray:
    """Read 4-bit weights of the layers of a model into one stack; nothing is computed.

    Args:
        tensors: All tensors of the checkpoint.
        names: Names of the weights, one a layer.
        shape: What the logical shape `[out, in]` of each must be.
        dtype: dtype of the array that the result stands for.
        host: Where the parts stay, if not on the device; the result is then streamed.

    Returns:
        The kernels `[layers, in, out]`.

    Raises:
        InputError: The parts contradict each other, `shape`, or this library's codebooks; or
            layers are quantized differently.
    """
    rows, cols = shape
    first, stacks = None, {}
    for layer, name in enumerate(names):
        kind, parts = _read_parts(tensors, name, shape)
        first = first or kind
        if kind != first:
            raise InputError(
                f"'{tensors[name].file}': layers are quantized differently ('{names[0]}' as "
                f"{first}, '{name}' as {kind}): expected all alike. Load with quantization=None, "
                "which makes all of them dense."
            )
        for part, x in parts.items():
            if part not in stacks:
                size = (len(names), *x.shape)
                data = aligned_bytes(math.prod(size) * x.itemsize)
                stacks[part] = data.view(x.dtype).reshape(size)
            stacks[part][layer] = x
    assert first is not None
    arrays: dict[str, Any] = {part: jax.device_put(x, host) for part, x in stacks.items()}
    return QuantizedArray.from_parts(
        kernel_shape=(cols, rows),
        format=first.format,
        block_size=first.block_size,
        group_size=first.group_size,
        dtype=jnp.dtype(dtype),
        streamed=host is not None,
        **arrays,
    )


class _Kind(NamedTuple):
    """What the layers of a stack must have in common."""

    format: str
    block_size: int
    group_size: int
    double_quant: bool


def _read_parts(
    tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]
) -> tuple[_Kind, dict[str, np.ndarray]]:
    """One weight, as the arguments of `QuantizedArray.from_parts`."""
    (state_name,) = [name + STATE + k for k in _FORMATS if name + STATE + k in tensors]
    where = f"'{tensors[name].file}': the 4-bit tensor '{name}'"
    format = state_name.removeprefix(name + STATE)
    double_quant = f"{name}.nested_absmax" in tensors
    try:
        state = json.loads(bytes(tensors[state_name].read()))
        found, block_size = tuple(state["shape"]), int(state["blocksize"])
        group_size = int(state["nested_blocksize"]) if double_quant else GROUP_SIZE
        offset = np.float32(state["nested_offset"] if double_quant else 0)
        declared = state.get("quant_type", format)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where} has a quantization state that cannot be read: {error!r}. Download it again."
        ) from error
    if found != shape:
        raise InputError(
            f"{where} has shape {list(found)}, expected {list(shape)} from config.json. The file "
            "and the configuration belong to different models."
        )
    if declared != format or block_size not in BLOCK_SIZES or group_size < 1:
        raise InputError(
            f"{where} has a quantization state that contradicts itself: {declared!r} under the "
            f"name of {format}, blocks of {block_size}, groups of {group_size}; expected blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}. Download it again."
        )
    _check_table(where, "quant_map", tensors[f"{name}.quant_map"].read(), CODEBOOKS[format].levels)
    rows, cols = shape
    small = math.gcd(cols, block_size)
    blocks, repeats = math.ceil(rows * cols / block_size), block_size // small

    codes = tensors[name].read().reshape(-1).view(np.uint8)  # whatever dtype it is stored as
    absmax = tensors[f"{name}.absmax"].read()
    wanted = np.uint8 if double_quant else np.float32
    sizes_fit = codes.size == math.ceil(rows * cols / 2) and absmax.size == blocks
    if not sizes_fit or cols % 2 or small % 2 or absmax.dtype != wanted:
        raise InputError(
            f"{where} of shape {list(shape)} in blocks of {block_size} has {codes.size} bytes of "
            f"codes and {absmax.size} block constants ({absmax.dtype}); expected "
            f"{math.ceil(rows * cols / 2)} and {blocks} ({np.dtype(wanted)}), and rows of even "
            "length."
        )
    repeated = np.repeat(absmax.reshape(-1), repeats) if repeats > 1 else absmax
    parts = {
        "codes": codes.reshape(rows, cols // 2),
        "absmax": repeated[: rows * cols // small].reshape(rows, cols // small),
    }
    if double_quant:
        table = tensors[f"{name}.nested_quant_map"].read()
        _check_table(where, "nested_quant_map", table, DYNAMIC_MAP)
        nested = tensors[f"{name}.nested_absmax"].read()
        if nested.size != math.ceil(blocks / group_size):
            raise InputError(
                f"{where} has {nested.size} constants of groups; expected "
                f"{math.ceil(blocks / group_size)} for {blocks} blocks in groups of {group_size}. "
                "Download it again."
            )
        parts |= {"absmax_scale": nested, "absmax_offset": np.asarray(offset)}
    if not all(np.all(np.isfinite(x)) for x in parts.values() if x.dtype == np.float32):
        raise InputError(f"{where} has block constants that are not finite. Download it again.")
    return _Kind(format, small, group_size * repeats, double_quant), parts


def _check_table(where: str, part: str, found: np.ndarray, want: np.ndarray) -> None:
    if found.shape != want.shape or not np.array_equal(found.astype(np.float32), want):
        raise InputError(
            f"{where} has a {part} that is not the standard one: expected the levels that "
            "bitsandbytes uses, found others. It was quantized by a modified library."
        )
