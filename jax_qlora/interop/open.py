# SPDX-License-Identifier: Apache-2.0
"""A model on disk, of any format that is read: its headers, and its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..models import DecoderConfig
from .bnb import check_quantization
from .download import resolve
from .gpt2 import gpt2_tensors
from .hf_config import read_config
from .safetensors import read_directory


class Checkpoint(NamedTuple):
    """A model on disk, of which only headers have been read.

    Attributes:
        path: Its directory, or its .gguf file.
        config: Its shape.
        tensors: Its tensors by Hugging Face's names.
        raw: The content of config.json; of a .gguf file None.
    """

    path: Path
    config: DecoderConfig
    tensors: Mapping[str, Any]
    raw: dict[str, Any] | None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a model consists of; no weights are read.

    Args:
        path: As for `load_model`.

    Raises:
        InputError: As for `load_model`.
    """
    path = resolve(path)
    if path.suffix == ".gguf":
        from .gguf import read_gguf

        return Checkpoint(path, *read_gguf(path), None)
    config, raw = read_config(path)
    check_quantization(raw, where=f"'{path / 'config.json'}'")
    tensors = gpt2_tensors(read_directory(path), config)
    return Checkpoint(path, config, tensors, raw)


def read_shape(path: Path) -> DecoderConfig:
    """Read a model's shape; its weights need not be there.

    Args:
        path: A model's directory, or its .gguf file.

    Raises:
        InputError: As for `load_model`.
    """
    if path.suffix == ".gguf":
        from .gguf import read_gguf

        return read_gguf(path)[0]
    return read_config(path)[0]


def find_tokenizer(path: Path) -> Any:
    """Return the tokenizer beside the weights, or None where there is none.

    Args:
        path: A model's directory, or its .gguf file.

    Raises:
        InputError: It cannot be read.
    """
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return None
    from .tokenizer import load_tokenizer

    return load_tokenizer(path)
