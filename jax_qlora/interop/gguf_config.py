# SPDX-License-Identifier: Apache-2.0
"""The configuration of a decoder as the metadata of a GGUF file, both ways.

References:
    `conversion/*.py` and `src/llama-model.cpp` of https://github.com/ggml-org/llama.cpp.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..models import DecoderConfig, RopeScaling
from ..models.config import validate_config
from .gguf_families import ARCHITECTURES, family_of, find_architecture, gguf_name
from .gguf_keys import GGUFKeys
from .gguf_metadata import GGUFEntry
from .hf import parameter_shapes, tensor_names, tensor_shape

# Llama 3 files hold no parameters of the scaling, only its result: these are the published ones.
LLAMA3_SCALINGS = (
    RopeScaling(kind="llama3", factor=8.0),
    RopeScaling(kind="llama3", factor=32.0),
)


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
    family = family_of(metadata, where)
    known = ARCHITECTURES[family]
    keys = GGUFKeys(metadata, known.name, where)
    d_model, n_heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", d_model // n_heads)
    if keys.take("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{where}: values and keys have different widths, not implemented.")
    if keys.take("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{where}: only a part of each head is rotated, which is not implemented.")
    vocab = entries["token_embd.weight"].shape[0] if "token_embd.weight" in entries else 0

    def token(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if type(value := metadata.get(key)) not in (int, type(None)):
            raise InputError(f"{where}: '{key}' is {value!r}; expected the number of a token.")
        return value

    ends = dict.fromkeys(t for t in (token("eos"), token("eot")) if t is not None)
    fields: dict[str, Any] = dict(
        family=family,
        vocab_size=keys.whole("vocab_size", vocab),
        d_model=d_model,
        d_ff=keys.whole("feed_forward_length"),
        n_layers=keys.whole("block_count"),
        n_heads=n_heads,
        n_kv_heads=keys.whole("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        max_length=keys.whole("context_length"),
        norm_eps=round(keys.real("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        rope_theta=keys.real("rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(keys),
        tied="output.weight" not in entries,
        qkv_bias="blk.0.attn_q.bias" in entries,
        out_bias="blk.0.attn_output.bias" in entries,
        mlp_bias="blk.0.ffn_up.bias" in entries,
        bos_token_id=token("bos"),
        eos_token_ids=tuple(ends),
        pad_token_id=token("padding"),
    )
    config = DecoderConfig(**{**fields, **known.fixed, **known.read(keys, fields)})
    keys.refuse_rest()
    try:
        return validate_config(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _rope_scaling(keys: GGUFKeys) -> RopeScaling | None:
    factor = keys.real("rope.scaling.factor", 1.0)
    kind = keys.take("rope.scaling.type", "none" if factor in (0, 1) else "linear")  # llama.cpp
    keys.take("rope.scaling.original_context_length", None)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind != "none":
        raise InputError(f"{keys.where}: rope scaling of type '{kind}' is not implemented.")
    return None


def model_metadata(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys that say what a model computes.

    Args:
        config: The model's shape.

    Raises:
        InputError: There is no architecture for it, or a file cannot say all that the model is.
    """
    known = find_architecture(config)
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
    prefixed = {f"{known.name}.{k}": v for k, v in (values | known.write(config)).items()}
    metadata = {"general.architecture": known.name} | prefixed
    _check_readable(metadata, config)
    return metadata


def _check_readable(metadata: Mapping[str, Any], config: DecoderConfig) -> None:
    """The file says all that the configuration does, or the model is of another architecture."""
    entries = {
        gguf_name(name, config): GGUFEntry(
            name=name, shape=tensor_shape(path, config), kind=0, offset=0
        )
        for path in parameter_shapes(config)
        for name in tensor_names(path, config)
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
