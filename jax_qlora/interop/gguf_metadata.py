# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file, metadata and tensor table, read in a twentieth of a second.

The `gguf` package reads it too, but makes a NumPy view of each of a vocabulary's strings (seconds).

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

# Kinds of values, and how `struct` spells those of fixed size.
_NUMBERS: dict[int, str] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_STRING, _ARRAY = 8, 9
_AXES = 4  # a tensor has at most


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file: key -> number, string or list of these.

    Args:
        path: a GGUF file, version 2 or 3, little-endian.

    Raises:
        InputError: the file is missing, is no GGUF file, ends inside the header, or its header
            holds something that no writer makes.
    """
    return read_gguf_header(path)[0]


@dataclass(frozen=True, kw_only=True)
class GGUFEntry:
    """Where a GGUF file keeps a tensor.

    Attributes:
        name: Its name in the file.
        shape: Its shape, slowest axis first (the file has it the other way round).
        kind: Number of its `GGMLQuantizationType`.
        offset: Byte of the file at which its data start.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def read_gguf_header(path: str | Path) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
    """Return the metadata of a GGUF file, and where its tensors are, by name.

    Args:
        path: a GGUF file, version 2 or 3, little-endian.

    Raises:
        InputError: as `read_gguf_metadata`.
    """
    try:
        with Path(path).open("rb") as file:
            return _Header(file, Path(path).stat().st_size).read()
    except FileNotFoundError as error:
        raise InputError(f"No GGUF file at '{path}'.") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error}. Expected a GGUF file.") from error
    except (struct.error, EOFError, UnicodeDecodeError, KeyError) as error:
        raise InputError(
            f"'{path}' is not a complete GGUF file (version 2 or 3): its header cannot be read "
            f"({error}). Download it again."
        ) from error


class _Header:
    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
        magic, version, tensors, count = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise EOFError(f"it starts with {magic!r}, version {version}")
        values = {}
        for _ in range(count):
            key = self.string()
            values[key] = self.value(self.numbers("I")[0])
        table = []
        for _ in range(tensors):
            name, (axes,) = self.string(), self.numbers("I")
            shape = self.numbers(f"{axes}Q")[::-1] if 1 <= axes <= _AXES else ()
            if not shape or 0 in shape:
                raise EOFError(f"tensor '{name}' has {axes} axes {list(shape)}; expected 1 to 4")
            table.append((name, shape, *self.numbers("IQ")))
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise EOFError(f"general.alignment is {alignment!r}; expected a positive number")
        data = -(-self.file.tell() // alignment) * alignment
        entries = {
            name: GGUFEntry(name=name, shape=shape, kind=kind, offset=data + offset)
            for name, shape, kind, offset in table
        }
        return values, entries

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(_NUMBERS[kind])[0]
        item, count = self.numbers("IQ")
        if item in _NUMBERS:
            return list(self.numbers(f"{count}{_NUMBERS[item]}"))
        if item != _STRING:  # lists of lists: llama.cpp refuses them too
            raise EOFError(f"it has a list of values of kind {item}")
        return [self.value(item) for _ in range(count)]

    def string(self) -> str:
        return self.bytes(self.numbers("Q")[0]).decode("utf-8")

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))

    def bytes(self, count: int) -> bytes:
        if count > self.size:  # damaged: do not try to allocate it
            raise EOFError(f"it announces {count} bytes in a file of {self.size}")
        data = self.file.read(count)
        if len(data) < count:
            raise EOFError("it ends too early")
        return data
