# SPDX-License-Identifier: Apache-2.0
"""config.json of Hugging Face, in the spellings of transformers 4 and 5, as a DecoderConfig."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models import DecoderConfig
from ..models.config import validate_config
from .hf_families import FAMILIES
from .hf_keys import Keys, write_rope


def read_config(directory: str | Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read the config.json of a model directory.

    Args:
        directory: A Hugging Face model directory.

    Returns:
        The configuration, and the file's own content.

    Raises:
        InputError: The file is missing or no JSON object, or as `config_from_hf`.
    """
    file = Path(directory) / "config.json"
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"No config.json in '{directory}': expected a Hugging Face model directory, with "
            "config.json and *.safetensors."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(raw, dict):
        raise InputError(f"'{file}': expected a JSON object, found {type(raw).__name__}.")
    return config_from_hf(raw, where=f"'{file}'"), raw


def config_from_hf(raw: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """Translate the content of a config.json, in the spelling of transformers 4 or 5.

    Every key must be one that is understood, or known to change nothing: a key that is silently
    dropped is a model that silently computes something else.

    Args:
        raw: The content.
        where: What to call it in messages.

    Raises:
        InputError: An unknown architecture; a key that is missing, unknown, of the wrong type, or
            has a value that is not implemented.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise InputError(
            f"{where}: model_type is {name!r}, which is not implemented: expected one of "
            f"{', '.join(FAMILIES)}."
        )
    if raw.get("architectures") not in (None, [family.architecture]):
        raise InputError(
            f"{where}: architectures is {raw['architectures']}, which is not implemented: expected "
            f"['{family.architecture}']."
        )
    keys = Keys(raw, where, family.absent, family.neutral, family.spelling)
    keys.pop("model_type")
    keys.pop("quantization_config")  # interop.bnb reads it
    n_heads, d_model = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    n_kv_heads = keys.integer("num_key_value_heads", optional=True)
    head_dim = keys.integer("head_dim", optional=True)
    if family.spelling.get("head_dim", "") is None and d_model % max(n_heads, 1):
        raise InputError(
            f"{where}: n_embd is {d_model}; expected a multiple of the {n_heads} heads (n_head)."
        )
    n_layers = keys.integer("num_hidden_layers")
    # null where a family has a default width
    d_ff = keys.integer("intermediate_size", optional="n_inner" in family.absent)
    fields = dict(
        family=name,
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        d_ff=4 * d_model if d_ff is None else d_ff,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        head_dim=d_model // max(n_heads, 1) if head_dim is None else head_dim,
        max_length=keys.integer("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps"),
        tied=keys.boolean("tie_word_embeddings"),
        bos_token_id=keys.integer("bos_token_id", optional=True),
        eos_token_ids=keys.tokens("eos_token_id"),
        pad_token_id=keys.integer("pad_token_id", optional=True),
    )
    config = DecoderConfig(**{**fields, **family.fixed, **family.read(keys, n_layers)})
    keys.refuse_rest()
    try:
        return validate_config(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def config_to_hf(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """Translate a configuration into a config.json that transformers 4 and 5 both read.

    That is the spelling of version 4: version 4 would ignore the `rope_parameters` of version 5
    and compute something else.

    Args:
        config: The model.
        dtype: dtype of the saved weights, e.g. "bfloat16".

    Raises:
        InputError: transformers has no such model.
    """
    family = FAMILIES[config.family]
    ends = list(config.eos_token_ids)
    shared = {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_length,
        "model_type": config.family,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": write_rope(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }
    names = {key: family.spelling.get(key, key) for key in shared}
    written = {name: shared[key] for key, name in names.items() if name is not None}
    written |= family.write(config)
    again = vars(config_from_hf(written))
    lost = [f"{k} = {v!r}" for k, v in vars(config).items() if v != again[k]]
    if lost:
        raise InputError(
            f"A {config.family} config.json cannot say {', '.join(lost)}: expected a model that "
            "transformers knows."
        )
    return written
