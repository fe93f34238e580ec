# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one or sharded, written tensor by tensor; whole or not at all."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .safetensors import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to write: its place in the file is planned first, its data are made when due.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        make: Returns its data.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_file(
    file: str | Path,
    tensors: Mapping[str, PlannedTensor],
    *,
    metadata: Mapping[str, str] | None,
    wrote: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a safetensors file, making one tensor at a time.

    It is written beside its place and moved there when complete, so that an interruption leaves
    what was there before.

    Args:
        file: Where to.
        tensors: What, by name.
        metadata: The free-form header entry; `{"format": "pt"}` is what transformers expects.
        wrote: Called with the name of each tensor that has been written.

    Raises:
        InputError: The disk is full, or the directory cannot be written to.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(_header(tensors, metadata))
            for name, tensor in tensors.items():
                data = np.asarray(tensor.make(), order="C")
                if (data.dtype, data.shape) != (tensor.dtype, tensor.shape):
                    raise AssertionError((data.dtype, data.shape, tensor))
                stream.write(data.reshape(-1).view(np.uint8).data)
                wrote(name)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise InputError(
            f"'{file}' cannot be written: {error.strerror or error}. It needs "
            f"{sum(t.nbytes for t in tensors.values()):,} bytes: free space, or write elsewhere."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_directory(
    directory: Path,
    tensors: Mapping[str, PlannedTensor],
    *,
    max_shard_bytes: int,
    wrote: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a checkpoint as transformers does: one file, or shards and their index.

    Args:
        directory: Where to; it exists.
        tensors: What, by name.
        max_shard_bytes: Largest file, unless one tensor is larger.
        wrote: Called with the name of each tensor that has been written.

    Raises:
        InputError: As `write_file`.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_file(directory / SINGLE, tensors, metadata=metadata, wrote=wrote)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, metadata=metadata, wrote=wrote)
        weight_map |= dict.fromkeys(shard, name)
    total = {"total_size": sum(t.nbytes for t in tensors.values())}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards(tensors: Mapping[str, PlannedTensor], limit: int) -> Iterator[dict[str, PlannedTensor]]:
    shard: dict[str, PlannedTensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _header(tensors: Mapping[str, PlannedTensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
