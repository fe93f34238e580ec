# SPDX-License-Identifier: Apache-2.0
"""What sets the families apart in GGUF: a table, and the keys that only some have.

References:
    `conversion/*.py` and `src/models/*.cpp` of https://github.com/ggml-org/llama.cpp: what is
    written, and what a missing key means.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..models import DecoderConfig
from .gguf_keys import GGUFKeys
from .gguf_names import (
    ATTENTION_NAMES,
    GEMMA_NORMS,
    LAYER_NAMES,
    MIXTRAL_EXPERTS,
    PHI3_NAMES,
    QK_NORMS,
    QWEN_EXPERTS,
    TOP_NAMES,
)

_TOP = {hf: name for name, hf in TOP_NAMES.items()}

_GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": True,
    "post_norms": True,
    "embed_scale": True,
}


def _read_nothing(keys: GGUFKeys, known: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _write_nothing(config: DecoderConfig) -> dict[str, Any]:
    return {}


class Architecture(NamedTuple):
    """How the models of a family are written.

    Attributes:
        name: Their `general.architecture`.
        names: Modules of a layer in Hugging Face's checkpoints, by their name in GGUF.
        fixed: Fields of the configuration that all models of the family share.
        read: Takes the keys that not all have: `(keys, fields that are known) -> fields`.
        write: The inverse: the keys that not all have.
        permuted: Whether the rows of query and key projections are permuted, so that rotary pairs
            are neighbors.
        norm_offset: What has been added to the weights of norms.
    """

    name: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = {}
    read: Callable[[GGUFKeys, Mapping[str, Any]], dict[str, Any]] = _read_nothing
    write: Callable[[DecoderConfig], dict[str, Any]] = _write_nothing
    permuted: bool = False
    norm_offset: float = 0.0


def _read_experts(keys: GGUFKeys, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n_experts": keys.whole("expert_count"),
        "experts_per_token": keys.whole("expert_used_count"),
    }


def _write_experts(config: DecoderConfig) -> dict[str, Any]:
    return {"expert_count": config.n_experts, "expert_used_count": config.experts_per_token}


def _read_qwen3_moe(keys: GGUFKeys, known: Mapping[str, Any]) -> dict[str, Any]:
    experts = _read_experts(keys, known)
    shared = known["d_ff"] // experts["experts_per_token"]
    return experts | {"d_ff": keys.whole("expert_feed_forward_length", shared)}


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    return _write_experts(config) | {
        "expert_feed_forward_length": config.d_ff,
        "feed_forward_length": config.d_ff * config.experts_per_token,
    }


def _read_phi3(keys: GGUFKeys, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": keys.whole("attention.sliding_window", 0) or None}


def _write_phi3(config: DecoderConfig) -> dict[str, Any]:
    if config.n_heads * config.head_dim != config.d_model:
        raise InputError(
            f"A GGUF file of a phi3 model cannot say head_dim = {config.head_dim}: expected "
            f"{config.d_model} / {config.n_heads}. Write the model as a Hugging Face directory "
            "(--format hf)."
        )
    return {"attention.sliding_window": config.sliding_window or 0}


def _read_gemma2(keys: GGUFKeys, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_softcap": keys.real("attn_logit_softcapping", 50.0),
        "logit_softcap": keys.real("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(known, layers_of_27b=46),
        "sliding_window": keys.whole("attention.sliding_window", 4096),
        "local_layers": _local_layers(keys, known["n_layers"], 2),
    }


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    return _window(config, 2) | {key: float(x) for key, x in caps.items() if x is not None}


def _read_gemma3(keys: GGUFKeys, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "local_rope_theta": float(keys.real("rope.freq_base_swa", 10_000.0)),
        "logit_softcap": keys.real("final_logit_softcapping", None),
        "query_pre_attn_scalar": _query_scalar(known, layers_of_27b=62),
        "sliding_window": keys.whole("attention.sliding_window"),
        "local_layers": _local_layers(keys, known["n_layers"], 6),
    }


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    values = _window(config, 6)
    if config.local_rope_theta is not None:
        values["rope.freq_base_swa"] = float(config.local_rope_theta)
    if config.logit_softcap is not None:
        values["final_logit_softcapping"] = float(config.logit_softcap)
    return values


def _query_scalar(known: Mapping[str, Any], *, layers_of_27b: int) -> float:
    """No key has it: llama.cpp tells the model of 27B by its layers, whose scalar is its own."""
    own = known["n_layers"] == layers_of_27b
    return float(known["d_model"] // known["n_heads"] if own else known["head_dim"])


def _local_layers(keys: GGUFKeys, n_layers: int, period: int) -> tuple[bool, ...]:
    """Which layers see a window; empty: all. Of a period, the last layer does not."""
    pattern = keys.pop("attention.sliding_window_pattern", period)
    if type(pattern) is int and pattern > 0:
        local = _alternate(n_layers, pattern)
    elif isinstance(pattern, list) and all(type(x) in (bool, int) for x in pattern):
        local = pattern
    else:
        raise InputError(
            f"{keys.where}: '{keys.prefix}attention.sliding_window_pattern' is {pattern!r}; "
            "expected a positive period, or a list of which layers see a window."
        )
    return () if all(local) else tuple(map(bool, local))


def _window(config: DecoderConfig, period: int) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    local = [window is not None for window in config.windows]
    if local != _alternate(config.n_layers, period):
        # llama.cpp reads a period, its own without the key, and some versions read no key.
        nth = {2: "second", 6: "sixth"}[period]
        raise InputError(
            f"A GGUF file of a {config.family} model cannot say which layers see a window, unless "
            f"all do but each {nth}; expected that, found {local}. Write the model as a Hugging "
            "Face directory (--format hf)."
        )
    return {"attention.sliding_window": config.sliding_window}


def _alternate(n_layers: int, period: int) -> list[bool]:
    return [(i + 1) % period != 0 for i in range(n_layers)]


ARCHITECTURES = {
    "llama": Architecture("llama", LAYER_NAMES, permuted=True),
    "mixtral": Architecture(
        "llama", ATTENTION_NAMES | MIXTRAL_EXPERTS, {}, _read_experts, _write_experts, permuted=True
    ),
    "qwen2": Architecture("qwen2", LAYER_NAMES),
    "qwen3": Architecture("qwen3", LAYER_NAMES | QK_NORMS, {"qk_norm": True}),
    "qwen3_moe": Architecture(
        "qwen3moe",
        ATTENTION_NAMES | QK_NORMS | QWEN_EXPERTS,
        {"qk_norm": True},
        _read_qwen3_moe,
        _write_qwen3_moe,
    ),
    "phi3": Architecture("phi3", PHI3_NAMES, {"fused": True}, _read_phi3, _write_phi3),
    "gemma2": Architecture(
        "gemma2",
        LAYER_NAMES | GEMMA_NORMS,
        {**_GEMMA, "tied": True},
        _read_gemma2,
        _write_gemma2,
        norm_offset=1.0,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        LAYER_NAMES | QK_NORMS | GEMMA_NORMS,
        {**_GEMMA, "qk_norm": True},
        _read_gemma3,
        _write_gemma3,
        norm_offset=1.0,
    ),
}
"""By the `model_type` of Hugging Face's checkpoints."""


def family_of(metadata: Mapping[str, Any], where: str) -> str:
    """Return the family of a file's model: a `llama` that has experts is a Mixtral.

    Args:
        metadata: Key to value.
        where: What to call the file in messages.

    Raises:
        InputError: The architecture is none of those here.
    """
    name = metadata.get("general.architecture")
    if name == "llama" and metadata.get("llama.expert_count", 0) != 0:
        return "mixtral"
    for family, architecture in ARCHITECTURES.items():
        if architecture.name == name:
            return family
    known = dict.fromkeys(architecture.name for architecture in ARCHITECTURES.values())
    raise InputError(
        f"{where}: the architecture is {name!r}, which is not implemented; expected one of "
        f"{', '.join(known)}."
    )


def find_architecture(config: DecoderConfig) -> Architecture:
    """Return how a model is written.

    Args:
        config: The model's shape.

    Raises:
        InputError: There is no architecture for it here.
    """
    family = "llama" if config.family == "mistral" else config.family
    if family in ARCHITECTURES:
        return ARCHITECTURES[family]
    raise InputError(
        f"A {config.family} model cannot be written to GGUF here: expected one of "
        f"{', '.join(ARCHITECTURES)}, mistral. Write a Hugging Face directory (--format hf) and "
        "convert it with llama.cpp's convert_hf_to_gguf.py."
    )


def gguf_name(name: str, config: DecoderConfig) -> str:
    """Return what GGUF calls a tensor of a checkpoint; all experts of a layer have one name.

    >>> from jax_qlora.models.presets import TINY
    >>> gguf_name("model.layers.3.self_attn.q_proj.weight", TINY)
    'blk.3.attn_q.weight'
    >>> gguf_name("lm_head.weight", TINY)
    'output.weight'

    Args:
        name: Its name in Hugging Face's checkpoint.
        config: The model's shape.

    Raises:
        InputError: The architecture has no such tensor.
    """
    known = find_architecture(config)
    names = {module: own for own, module in known.names.items()}
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    module = re.sub(r"\.experts\.\d+\.", ".experts.*.", module)
    if name in _TOP:
        return _TOP[name]
    if name.startswith("model.layers.") and module in names:
        return f"blk.{layer}.{names[module]}.{kind}"
    raise InputError(
        f"'{name}' has no place in a GGUF file of the {known.name} architecture. Write the model "
        "as a Hugging Face directory (--format hf)."
    )


def heads_of(name: str, config: DecoderConfig) -> int:
    """Return the number of heads by which a tensor's rows are permuted in GGUF; 0 for none.

    Args:
        name: Its name in Hugging Face's checkpoint.
        config: The model's shape.
    """
    if not find_architecture(config).permuted:
        return 0
    if ".self_attn.q_proj." in name:
        return config.n_heads
    return config.n_kv_heads if ".self_attn.k_proj." in name else 0
