# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one or sharded, read tensor by tensor.

A file is a little-endian uint64, that many bytes of JSON (name -> dtype, shape, byte range), and
the data. Tensors are read with plain reads into memory of their own: mapped pages would count as
this process's memory for as long as the file is open.

References:
    https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_ALIGNMENT = 64  # what XLA needs to use a host buffer without copying it

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        name: Its name in the file.
        dtype: Its dtype.
        shape: Its shape.
        file: Where it is.
        offset: Byte at which its data start.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read the data, or some rows of it, into a new array.

        Args:
            start: First index of the first axis to read.
            stop: First index not to read; the end by default.

        Raises:
            InputError: The file has become unreadable or shorter since its header was read.
        """
        rows = self.shape[:1]
        if rows:
            rows = (len(range(*slice(start, stop).indices(rows[0]))),)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = aligned_bytes(math.prod(rows) * row_bytes)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start * row_bytes)
                done = 0
                while done < len(data) and (n := file.readinto(data.data[done:])):
                    done += n
        except OSError as error:
            raise InputError(f"'{self.file}' cannot be read: {error}.") from error
        if done < len(data):
            raise InputError(
                f"'{self.file}' is truncated: tensor '{self.name}' needs {len(data)} bytes, found "
                f"{done}. Download or copy the file again."
            )
        return data.view(self.dtype).reshape(rows + self.shape[1:])


def aligned_bytes(count: int) -> np.ndarray:
    """Allocate `count` bytes, uninitialized, at an address that suits XLA."""
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count]


def read_header(file: str | Path) -> dict[str, StoredTensor]:
    """Read which tensors a safetensors file holds, by name; no data is read.

    Args:
        file: A .safetensors file.

    Raises:
        InputError: The file is missing, truncated or damaged (names the file and what is wrong).
    """
    file = Path(file)

    def damaged(what: str) -> InputError:
        return InputError(
            f"'{file}' is not a complete safetensors file: {what}. Download or copy it again."
        )

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 <= length <= min(size - 8, _MAX_HEADER):
                raise damaged(f"its header does not fit in its {size} bytes")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise InputError(f"No file '{file}': expected a safetensors file there.") from error
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        if isinstance(error, InputError):
            raise
        raise damaged(f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, data, end = {}, 8 + length, 0
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            sane = type(dtype) is str and all(
                type(n) is int and n >= 0 for n in (*shape, start, stop)
            )
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"the entry of '{name}' is {entry!r}") from error
        if not sane:
            raise damaged(f"the entry of '{name}' is {entry!r}")
        if dtype not in DTYPES:
            raise InputError(
                f"'{file}': tensor '{name}' has dtype {dtype}, which is not read: expected one of "
                f"{', '.join(DTYPES)}. Convert the checkpoint to bfloat16."
            )
        tensor = StoredTensor(
            name=name, dtype=DTYPES[dtype], shape=shape, file=file, offset=data + start
        )
        if stop - start != tensor.nbytes:
            raise damaged(
                f"tensor '{name}' of {dtype} {list(shape)} needs {tensor.nbytes} bytes and has "
                f"{stop - start}"
            )
        if data + stop > size:
            raise damaged(f"tensor '{name}' ends at byte {data + stop} of {size}")
        tensors[name], end = tensor, max(end, data + stop)
    place = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != place:
            raise damaged(f"tensor '{tensor.name}' starts at byte {tensor.offset}, not {place}")
        place += tensor.nbytes
    if tensors and end != size:
        raise damaged(f"its tensors end at byte {end} of {size}")
    return tensors


def read_directory(directory: str | Path) -> dict[str, StoredTensor]:
    """Read which tensors a checkpoint directory holds: one file, or shards and their index.

    Args:
        directory: Holds model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        All tensors by name.

    Raises:
        InputError: There is no such file, a shard is missing or damaged, or the index names a file
            outside the directory or a tensor that is not in its shard.
    """
    directory = Path(directory)
    index = directory / INDEX
    if not index.is_file():
        if (directory / SINGLE).is_file():
            return read_header(directory / SINGLE)
        found = sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
        pickled = f" {found[0]} is a pickle, which can run code and is never read." if found else ""
        raise InputError(
            f"No weights in '{directory}': expected {SINGLE} or {INDEX}.{pickled} Convert the "
            "checkpoint with transformers: model.save_pretrained(directory)."
        )
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"'{index}' is no index of shards: expected JSON with a 'weight_map' of tensor names "
            f"to file names ({error}). Download it again."
        ) from error
    outside = [f for f in shards.values() if f in ("", ".", "..") or "/" in f or "\\" in f]
    if outside:
        raise InputError(
            f"'{index}' names the file '{outside[0]}': expected plain names of files in the same "
            "directory. Do not use this checkpoint unless you know why it points elsewhere."
        )
    headers = {file: read_header(directory / file) for file in sorted(set(shards.values()))}
    tensors = {}
    for name, file in shards.items():
        if name not in headers[file]:
            raise InputError(
                f"'{index}' says that tensor '{name}' is in '{file}', which does not hold it. "
                "Shards and index are of different checkpoints: download both again."
            )
        tensors[name] = headers[file][name]
    for file, header in headers.items():
        for name in header:
            if name not in shards:
                raise InputError(
                    f"'{directory / file}' holds tensor '{name}', which '{INDEX}' does not list. "
                    "Shards and index are of different checkpoints: download both again."
                )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries
