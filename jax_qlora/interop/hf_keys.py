# SPDX-License-Identifier: Apache-2.0
"""The keys of a config.json, taken one by one, so that none is left that was not understood."""

import sys
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..models import RopeScaling

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
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id cache_implementation
""".split()
)
# Keys that would change logits or training, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "attention_bias": (False,),
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
_ROPE_KINDS = ("default", "linear", "llama3")


class Keys:
    """The keys that have not been understood yet.

    Args:
        raw: The content of the file, or of an object in it.
        where: What to call it in messages.
        absent: What a missing key means, where that is not "it must be there".
        neutral: Further keys that change nothing, and the values at which they do not; None: any.
        spelling: What a key is called in the file, where that is not its name here; None: the file
            has no such key.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        absent: Mapping[str, Any] | None = None,
        neutral: Mapping[str, tuple[Any, ...] | None] | None = None,
        spelling: Mapping[str, str | None] | None = None,
    ):
        self.where = where
        self.absent = absent or {}
        self.neutral = {**dict.fromkeys(_HARMLESS), **_NEUTRAL, **(neutral or {})}
        self.spelling = spelling or {}
        self.rest = dict(raw)

    def pop(self, key: str) -> Any:
        """Take a value as it is, null included; what a missing key means, or None."""
        name = self.spelling.get(key, key)
        return None if name is None else self.rest.pop(name, self.absent.get(name))

    def integer(self, key: str, *, optional: bool = False) -> Any:
        """Take a whole number, or None if that is allowed."""
        return self._typed(key, "a whole number", lambda x: type(x) is int, optional)

    def number(self, key: str, *, optional: bool = False) -> Any:
        """Take a number as a float, or None if that is allowed."""
        value = self._typed(key, "a number", is_number, optional)
        return None if value is None else float(value)

    def boolean(self, key: str) -> bool:
        """Take true or false."""
        return self._typed(key, "true or false", lambda x: type(x) is bool, False)

    def tokens(self, key: str) -> tuple[int, ...]:
        """Take one token id, several, or none.

        Raises:
            InputError: It is something else.
        """
        value = self.pop(key)
        value = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(x) is int for x in value):
            raise InputError(f"{self.where}: {key} is {value!r}; expected token ids.")
        return tuple(value)

    def _typed(self, key: str, what: str, ok: Any, optional: bool) -> Any:
        value = self.pop(key)
        if not ok(value) and not (optional and value is None):
            name = self.spelling.get(key, key)
            raise InputError(f"{self.where}: {name} is {value!r}; expected {what}.")
        return value

    def refuse_rest(self) -> None:
        """Refuse the first key that is left and may change what is computed.

        Raises:
            InputError: There is one.
        """
        for key, value in self.rest.items():
            if key not in self.neutral:
                raise InputError(
                    f"{self.where}: key '{key}' (= {value!r}) is not known, and may change what "
                    "the model computes. If it surely does not, remove it from the file."
                )
            allowed = self.neutral[key]
            if allowed is not None and value not in allowed:
                raise InputError(
                    f"{self.where}: {key} is {value!r}, which is not implemented; expected "
                    f"{allowed[0]!r}."
                )


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can be; JSON has whole ones of any length."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def read_rope(keys: Keys) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    theta = keys.pop("rope_theta")
    both = keys.pop("rope_parameters")
    scaling = keys.pop("rope_scaling") if both is None else both
    return read_rope_settings(scaling, theta, where=keys.where)


def read_rope_settings(
    settings: Any, theta: Any, *, where: str
) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling from one object, whose theta, if it has one, is the one that counts.

    Raises:
        InputError: The object is none, or holds a kind or a key that is not implemented.
    """
    if not isinstance(settings, dict | None):
        raise InputError(f"{where}: rope_scaling is {settings!r}; expected an object or null.")
    inner = Keys(settings or {}, f"{where}, rope settings", {"rope_theta": theta})
    theta = inner.number("rope_theta")
    kind, legacy = inner.pop("rope_type"), inner.pop("type")
    kind = kind or legacy or "default"
    if kind not in _ROPE_KINDS:
        raise InputError(
            f"{where}: rope_type is {kind!r}, which is not implemented; expected default, "
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


def write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json."""
    if scaling is None:
        return None
    settings = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        settings |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return settings
