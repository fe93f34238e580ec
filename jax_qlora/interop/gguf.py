# SPDX-License-Identifier: Apache-2.0
"""GGUF files: configuration and tensors, under Hugging Face's names.

The `gguf` package decodes the tensors. Where the rows of the query and key projections are
permuted, so that rotary pairs are neighbors, they are put back in order here.

References:
    `convert_hf_to_gguf.py` of https://github.com/ggml-org/llama.cpp, class `LlamaModel`.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import InputError
from ..models import DecoderConfig, RopeScaling
from ..models.rope import rope_frequencies, scale_frequencies
from .gguf_config import LLAMA3_SCALINGS, config_from_gguf
from .gguf_families import ARCHITECTURES
from .gguf_metadata import GGUFEntry, read_gguf_header
from .gguf_names import TOP_NAMES

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor in a GGUF file.

    Attributes:
        entry: Where it is.
        file: The file.
        heads: Heads whose rotary pairs are to be put back in order; 0 for none.
        offset: What is subtracted from its values.
    """

    entry: GGUFEntry
    file: Path
    heads: int = 0
    offset: float = 0.0

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, `[out, in]` for a linear."""
        return self.entry.shape

    @property
    def dtype(self) -> np.dtype:
        """Data type of what `read` returns."""
        return _PLAIN.get(GGMLQuantizationType(self.entry.kind), np.dtype(np.float32))

    @property
    def stored_bytes(self) -> int:
        """Bytes of its data in the file."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.entry.kind)]
        return math.prod(self.shape) // block * size

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read and decode the tensor, or some rows of it.

        Args:
            start: First index of the first axis to read.
            stop: First index not to read; the end by default.

        Raises:
            InputError: The file cannot be read.
        """
        if len(self.shape) == 1:  # one row: it is decoded whole
            (row,) = self._rows(0, 1)
            row = self._reorder(row)[start:stop]
            return row - row.dtype.type(self.offset) if self.offset else row
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if not self.heads:
            return self._rows(start, stop)
        # whole heads, as the rows of a head are among themselves in another order
        size = self.shape[0] // self.heads
        first, last = start // size * size, -(-stop // size) * size
        return self._reorder(self._rows(first, last))[start - first : stop - first]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        kind = GGMLQuantizationType(self.entry.kind)
        row_bytes = self.stored_bytes // math.prod(self.shape[:-1])
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.entry.offset + start * row_bytes)
                data = stream.read((stop - start) * row_bytes)
            raw = np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)
        except (OSError, ValueError) as error:
            raise InputError(
                f"'{self.file}': tensor '{self.name}' cannot be read: {error}. Download it again."
            ) from error
        return raw.view(self.dtype) if kind in _PLAIN else dequantize(raw, kind)

    def _reorder(self, rows: np.ndarray) -> np.ndarray:
        """Put each head's rotary pairs, (pair, side) in the file, in the order (side, pair)."""
        if not self.heads:
            return rows
        half = self.shape[0] // self.heads // 2
        return rows.reshape(-1, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_gguf(file: str | Path) -> tuple[DecoderConfig, dict[str, GGUFTensor]]:
    """Read what a GGUF file holds: no tensor is read yet.

    Args:
        file: A .gguf file.

    Returns:
        The configuration, and the tensors by the names they have in a Hugging Face checkpoint.

    Raises:
        InputError: The file is missing, truncated or damaged; another architecture; a key or a
            tensor that is not understood.
    """
    file = Path(file)
    metadata, entries = read_gguf_header(file)
    check_entries(entries, file)
    config = config_from_gguf(metadata, entries, where=f"'{file}'")
    factors = entries.pop("rope_freqs.weight", None)
    if factors is not None:
        tensor = GGUFTensor(entry=factors, file=file)
        config = replace(config, rope_scaling=_recognize(tensor, config))
    return config, _rename(entries, config, file)


def check_entries(entries: Mapping[str, GGUFEntry], file: Path) -> None:
    """Check that a file holds the data of its tensors.

    Args:
        entries: The tensors.
        file: The file.

    Raises:
        InputError: A tensor is of an unknown type, of broken blocks, or ends behind the file.
    """
    size = file.stat().st_size
    for entry in entries.values():
        if not _decodes(entry.kind):
            raise InputError(
                f"'{file}': tensor '{entry.name}' is of type {entry.kind}, which the installed "
                "gguf package does not decode. Update it: pip install --upgrade gguf."
            )
        kind = GGMLQuantizationType(entry.kind)
        if entry.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise InputError(
                f"'{file}' is damaged: rows of {entry.shape[-1]} in tensor '{entry.name}' are no "
                f"multiple of the block of {kind.name}. Download it again."
            )
        end = entry.offset + GGUFTensor(entry=entry, file=file).stored_bytes
        if end > size:
            raise InputError(
                f"'{file}' is truncated: tensor '{entry.name}' ends at byte {end} of {size}. "
                "Download it again."
            )


@functools.cache
def _decodes(kind: int) -> bool:
    """Whether the package decodes a type: some, of whole numbers or new ones, it only names."""
    try:
        known = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except (ValueError, NotImplementedError):
        return False
    return True


def _rename(
    entries: Mapping[str, GGUFEntry], config: DecoderConfig, file: Path
) -> dict[str, GGUFTensor]:
    known = ARCHITECTURES[config.family]
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads} if known.permuted else {}
    tensors = {}
    for entry in entries.values():
        block, _, rest = entry.name.removeprefix("blk.").partition(".")
        module, _, kind = rest.rpartition(".")
        if entry.name in TOP_NAMES:
            name = TOP_NAMES[entry.name]
        elif entry.name.startswith("blk.") and module in known.names:
            name = f"model.layers.{block}.{known.names[module]}.{kind}"
        else:
            raise InputError(
                f"'{file}': tensor '{entry.name}' is not one of a {config.family} model; expected "
                "names such as 'blk.0.attn_q.weight'."
            )
        offset = known.norm_offset if name.endswith("norm.weight") else 0.0
        for i, part in enumerate(_experts(entry, file)) if "*" in name else [(0, entry)]:
            tensors[name.replace("*", str(i))] = GGUFTensor(
                entry=part, file=file, heads=heads.get(module, 0), offset=offset
            )
    return tensors


def _experts(entry: GGUFEntry, file: Path) -> list[GGUFEntry]:
    """The tensors of which one that holds all experts of a layer consists."""
    if len(entry.shape) != 3:
        raise InputError(
            f"'{file}': tensor '{entry.name}' has shape {list(entry.shape)}; expected three axes, "
            "the first of which counts experts."
        )
    size = GGUFTensor(entry=entry, file=file).stored_bytes // entry.shape[0]
    return [
        replace(entry, shape=entry.shape[1:], offset=entry.offset + i * size)
        for i in range(entry.shape[0])
    ]


def _recognize(factors: GGUFTensor, config: DecoderConfig) -> RopeScaling:
    """Find the scaling whose frequencies are the plain ones divided by `factors`."""
    plain = rope_frequencies(config)
    wanted = factors.read().reshape(-1)
    for scaling in LLAMA3_SCALINGS:
        if wanted.shape == plain.shape:
            found = plain / scale_frequencies(plain, scaling)
            if np.allclose(found, wanted, rtol=1e-3):
                return scaling
    raise InputError(
        f"'{factors.file}': the rotary factors in 'rope_freqs.weight' are not those of a known "
        "Llama 3 model. Use the model's Hugging Face directory, whose config.json names them."
    )
