# SPDX-License-Identifier: Apache-2.0
"""GGUF files of the llama architecture: configuration and tensors, under Hugging Face's names.

The `gguf` package decodes the tensors. In such files the rows of the query and key projections are
permuted, so that rotary pairs are neighbors; they are put back in order here.

References:
    `convert_hf_to_gguf.py` of https://github.com/ggml-org/llama.cpp, class `LlamaModel`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import InputError
from ..models import DecoderConfig, RopeScaling
from ..models.config import validate_config
from ..models.rope import rope_frequencies, scale_frequencies
from .gguf_metadata import GGUFEntry, read_gguf_header

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Keys after "llama." that would change the numbers, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.finetuned": (False, True),
}
# Llama 3 files hold no parameters of the scaling, only its result: these are the published ones.
_LLAMA3_SCALINGS = (
    RopeScaling(kind="llama3", factor=8.0),
    RopeScaling(kind="llama3", factor=32.0),
)


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor in a GGUF file.

    Attributes:
        entry: Where it is.
        file: The file.
        heads: Heads whose rotary pairs are to be put back in order; 0 for none.
    """

    entry: GGUFEntry
    file: Path
    heads: int = 0

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
            return self._reorder(row)[start:stop]
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
        file: A .gguf file of the llama architecture.

    Returns:
        The configuration, and the tensors by the names they have in a Hugging Face checkpoint.

    Raises:
        InputError: The file is missing, truncated or damaged; another architecture; a key or a
            tensor that is not understood.
    """
    file = Path(file)
    metadata, entries = read_gguf_header(file)
    size = file.stat().st_size
    for entry in entries.values():
        try:
            kind = GGMLQuantizationType(entry.kind)
        except ValueError as error:
            raise InputError(
                f"'{file}': tensor '{entry.name}' is of type {entry.kind}, which the installed "
                "gguf package does not know. Update it: pip install --upgrade gguf."
            ) from error
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
    config = config_from_gguf(metadata, entries, where=f"'{file}'")
    factors = entries.pop("rope_freqs.weight", None)
    if factors is not None:
        tensor = GGUFTensor(entry=factors, file=file)
        config = replace(config, rope_scaling=_recognize(tensor, config))
    return config, _rename(entries, config, file)


def config_from_gguf(
    metadata: Mapping[str, Any], entries: Mapping[str, GGUFEntry], *, where: str = "GGUF metadata"
) -> DecoderConfig:
    """Translate the metadata of a GGUF file.

    Args:
        metadata: Key to value.
        entries: The file's tensors: whether the head is tied, and which biases there are, is told
            by their presence.
        where: What to call the file in messages.

    Raises:
        InputError: Another architecture; a key that is missing, unknown or has a value that is not
            implemented.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{where}: the architecture is {architecture!r}, which is not implemented; expected "
            "'llama'."
        )
    prefix = "llama."
    rest = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}

    def take(key: str, *default: Any) -> Any:
        value = rest.pop(key, *default) if default or key in rest else None
        if value is None and not default:
            raise InputError(f"{where}: the key '{prefix}{key}' is missing.")
        if isinstance(value, list):
            raise InputError(
                f"{where}: '{prefix}{key}' differs between layers ({value[:4]}...), which is not "
                "implemented; expected one number."
            )
        return value

    d_model, n_heads = take("embedding_length"), take("attention.head_count")
    head_dim = take("attention.key_length", d_model // n_heads)
    if take("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{where}: values and keys have different widths, not implemented.")
    if take("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{where}: only a part of each head is rotated, which is not implemented.")
    scaling = None
    kind, factor = take("rope.scaling.type", "none"), take("rope.scaling.factor", 1.0)
    take("rope.scaling.original_context_length", None)
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=factor)
    elif kind != "none":
        raise InputError(f"{where}: rope scaling of type '{kind}' is not implemented.")
    vocab = entries["token_embd.weight"].shape[0] if "token_embd.weight" in entries else 0

    def token(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    ends = dict.fromkeys(t for t in (token("eos"), token("eot")) if t is not None)
    config = DecoderConfig(
        vocab_size=take("vocab_size", vocab),
        d_model=d_model,
        d_ff=take("feed_forward_length"),
        n_layers=take("block_count"),
        n_heads=n_heads,
        n_kv_heads=take("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        max_length=take("context_length"),
        norm_eps=round(take("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        rope_theta=take("rope.freq_base", 10_000.0),
        rope_scaling=scaling,
        tied="output.weight" not in entries,
        qkv_bias="blk.0.attn_q.bias" in entries,
        out_bias="blk.0.attn_output.bias" in entries,
        mlp_bias="blk.0.ffn_up.bias" in entries,
        bos_token_id=token("bos"),
        eos_token_ids=tuple(ends),
        pad_token_id=token("padding"),
    )
    for key, value in rest.items():
        if value not in _NEUTRAL.get(key, ()):
            raise InputError(
                f"{where}: '{prefix}{key}' is {value!r}, which is not implemented and may change "
                "what the model computes."
            )
    try:
        return validate_config(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _rename(
    entries: Mapping[str, GGUFEntry], config: DecoderConfig, file: Path
) -> dict[str, GGUFTensor]:
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    tensors = {}
    for entry in entries.values():
        block, _, rest = entry.name.removeprefix("blk.").partition(".")
        module, _, kind = rest.rpartition(".")
        if entry.name in TOP_NAMES:
            name = TOP_NAMES[entry.name]
        elif entry.name.startswith("blk.") and module in LAYER_NAMES:
            name = f"model.layers.{block}.{LAYER_NAMES[module]}.{kind}"
        else:
            raise InputError(
                f"'{file}': tensor '{entry.name}' is not one of a llama model; expected names such "
                "as 'blk.0.attn_q.weight'."
            )
        permuted = heads.get(module, 0)
        tensors[name] = GGUFTensor(entry=entry, file=file, heads=permuted)
    return tensors


def _recognize(factors: GGUFTensor, config: DecoderConfig) -> RopeScaling:
    """Find the scaling whose frequencies are the plain ones divided by `factors`."""
    plain = rope_frequencies(config)
    wanted = factors.read().reshape(-1)
    for scaling in _LLAMA3_SCALINGS:
        if wanted.shape == plain.shape:
            found = plain / scale_frequencies(plain, scaling)
            if np.allclose(found, wanted, rtol=1e-3):
                return scaling
    raise InputError(
        f"'{factors.file}': the rotary factors in 'rope_freqs.weight' are not those of a known "
        "Llama 3 model. Use the model's Hugging Face directory, whose config.json names them."
    )
