# SPDX-License-Identifier: Apache-2.0
"""config.json of Hugging Face, in the spellings of transformers 4 and 5, as a DecoderConfig."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models import DecoderConfig, RopeScaling
from ..models.config import validate_config

# Keys of config.json that change no logits, whatever their value.
_HARMLESS = frozenset(
    """
    _name_or_path architectures transformers_version torch_dtype dtype use_cache initializer_range
    return_dict return_dict_in_generate output_scores output_hidden_states output_attentions
    id2label label2id problem_type task_specific_params tokenizer_class prefix is_llama_config
    transformers.js_config unsloth_fixed unsloth_version pretraining_tp sep_token_id
    decoder_start_token_id torchscript use_bfloat16 max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id
""".split()
)
# Keys that would change logits or training, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "finetuning_task": (None,),
    "tf_legacy_loss": (False,),
    "auto_map": (None,),
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM"}


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
    except (OSError, ValueError) as error:
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
    family = raw.get("model_type")
    if family not in _ARCHITECTURES:
        raise InputError(
            f"{where}: model_type is {family!r}, which is not implemented: expected one of "
            f"{', '.join(_ARCHITECTURES)}."
        )
    architecture = _ARCHITECTURES[family]
    if raw.get("architectures") not in (None, [architecture]):
        raise InputError(
            f"{where}: architectures is {raw['architectures']}, which is not implemented: expected "
            f"['{architecture}']."
        )
    keys = _Keys(raw, where)
    n_heads, d_model = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    ends = keys.pop("eos_token_id", None)
    theta, scaling = _rope(keys)
    bias = keys.boolean("attention_bias", False)
    config = DecoderConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        d_ff=keys.integer("intermediate_size"),
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads),
        head_dim=keys.integer("head_dim", d_model // max(n_heads, 1)),
        max_length=keys.integer("max_position_embeddings", 2048),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=keys.boolean("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=keys.boolean("mlp_bias", False),
        bos_token_id=keys.integer("bos_token_id", None),
        eos_token_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        pad_token_id=keys.integer("pad_token_id", None),
    )
    keys.pop("model_type", None)
    keys.pop("quantization_config", None)  # interop.bnb reads it
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
    if config.qkv_bias != config.out_bias:
        raise InputError(
            "A llama config.json has one attention_bias for all projections: expected qkv_bias and "
            f"out_bias to be equal, found {config.qkv_bias} and {config.out_bias}."
        )
    scaling = None
    if config.rope_scaling is not None:
        s = config.rope_scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            scaling |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_length,
            }
    ends = list(config.eos_token_ids)
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_length,
        "mlp_bias": config.mlp_bias,
        "model_type": config.family,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


class _Keys:
    """The keys of a config.json that have not been understood yet."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.rest = {key: value for key, value in raw.items() if key not in _HARMLESS}
        self.where = where

    def pop(self, key: str, default: Any) -> Any:
        return self.rest.pop(key, default)

    def integer(self, key: str, *default: Any) -> Any:
        return self._typed(key, "a whole number", lambda x: type(x) is int, default)

    def number(self, key: str, *default: Any) -> Any:
        return float(self._typed(key, "a number", lambda x: type(x) in (int, float), default))

    def boolean(self, key: str, *default: Any) -> Any:
        return self._typed(key, "true or false", lambda x: type(x) is bool, default)

    def _typed(self, key: str, what: str, ok: Any, default: tuple) -> Any:
        value = self.rest.pop(key, None)
        if value is None and default:
            return default[0]
        if not ok(value):
            raise InputError(f"{self.where}: {key} is {value!r}; expected {what}.")
        return value

    def refuse_rest(self) -> None:
        for key, value in self.rest.items():
            if key not in _NEUTRAL:
                raise InputError(
                    f"{self.where}: key '{key}' (= {value!r}) is not known, and may change what "
                    "the model computes. If it surely does not, remove it from the file."
                )
            if value not in _NEUTRAL[key]:
                raise InputError(
                    f"{self.where}: {key} is {value!r}, which is not implemented; expected "
                    f"{_NEUTRAL[key][0]!r}."
                )


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    both = keys.pop("rope_parameters", None)
    scaling = keys.pop("rope_scaling", None) if both is None else both
    if not isinstance(scaling, dict | None):
        raise InputError(f"{keys.where}: rope_scaling is {scaling!r}; expected an object or null.")
    inner = _Keys(scaling or {}, f"{keys.where}, rope settings")
    theta = keys.number("rope_theta", 10_000.0)
    theta = inner.number("rope_theta", theta)
    kind = inner.pop("rope_type", None)
    legacy = inner.pop("type", None)
    kind = kind or legacy or "default"
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"{keys.where}: rope_type is {kind!r}, which is not implemented; expected default, "
            "linear or llama3."
        )
    result = None
    if kind == "linear":
        result = RopeScaling(kind="linear", factor=inner.number("factor"))
    elif kind == "llama3":
        result = RopeScaling(
            kind="llama3",
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_length=inner.integer("original_max_position_embeddings"),
        )
    inner.refuse_rest()
    return theta, result
