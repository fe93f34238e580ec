# SPDX-License-Identifier: Apache-2.0
"""What sets the families apart in their config.json: a table, and the keys that only some have.

References:
    `configuration_<family>.py` of https://github.com/huggingface/transformers: what a missing key
    means.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..models import DecoderConfig
from .hf_keys import Keys, read_rope, read_rope_settings

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


class Family(NamedTuple):
    """One `model_type`.

    Attributes:
        architecture: The class that `transformers` makes of it.
        fixed: Fields of the configuration that all models of the family share.
        absent: What a missing key of config.json means.
        read: Takes the keys that not all families have: `(keys, n_layers) -> fields`.
        write: The inverse: the keys that not all families have.
        neutral: Keys without effect, and the values at which they have none; None: any value.
        spelling: What the family calls keys that all others share; None: it has no such key.
    """

    architecture: str
    fixed: Mapping[str, Any]
    absent: Mapping[str, Any]
    read: Callable[[Keys, int], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    neutral: Mapping[str, tuple[Any, ...] | None]
    spelling: Mapping[str, str | None] = {}


def _read_llama(keys: Keys, n_layers: int) -> dict[str, Any]:
    return _rope(keys) | _bias(keys) | {"mlp_bias": keys.boolean("mlp_bias")}


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return _bias_key(config) | {"mlp_bias": config.mlp_bias}


def _read_windowed(keys: Keys, n_layers: int) -> dict[str, Any]:
    return _rope(keys) | {"sliding_window": keys.integer("sliding_window", optional=True)}


def _write_windowed(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _read_qwen2(keys: Keys, n_layers: int) -> dict[str, Any]:
    first = keys.integer("max_window_layers")
    window = keys.integer("sliding_window", optional=True)
    window = window if keys.boolean("use_sliding_window") else None
    local = _layer_types(
        keys, n_layers, [window is not None and i >= first for i in range(n_layers)]
    )
    return _rope(keys) | _local(window, local)


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    local = [window is not None for window in config.windows]
    return {
        "layer_types": [_LOCAL if x else _GLOBAL for x in local],
        # read only where there are no layer_types: the number of global layers before local ones
        "max_window_layers": local.index(True) if any(local) else config.n_layers,
        "sliding_window": config.sliding_window,
        "use_sliding_window": any(local),
    }


def _read_qwen3(keys: Keys, n_layers: int) -> dict[str, Any]:
    return _read_qwen2(keys, n_layers) | _bias(keys)


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen2(config) | _bias_key(config)


def _read_gemma2(keys: Keys, n_layers: int) -> dict[str, Any]:
    window = keys.integer("sliding_window")
    local = _layer_types(keys, n_layers, [i % 2 == 0 for i in range(n_layers)])
    return _rope(keys) | _bias(keys) | _local(window, local) | _read_scores(keys)


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.query_pre_attn_scalar
    return {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [_GLOBAL if w is None else _LOCAL for w in config.windows],
        # transformers 5 refuses 256.0
        "query_pre_attn_scalar": int(scalar) if scalar and scalar.is_integer() else scalar,
        "sliding_window": config.sliding_window,
        **_bias_key(config),
    }


def _read_gemma3(keys: Keys, n_layers: int) -> dict[str, Any]:
    same = keys.pop("_sliding_window_pattern")  # as version 5 spells it
    pattern = keys.pop("sliding_window_pattern")
    pattern = next((x for x in (pattern, same) if x is not None), 6)
    if type(pattern) is not int or pattern < 1:
        raise InputError(f"{keys.where}: sliding_window_pattern is {pattern!r}; expected a count.")
    local = _layer_types(keys, n_layers, [(i + 1) % pattern != 0 for i in range(n_layers)])
    theta, local_theta = keys.pop("rope_theta"), keys.pop("rope_local_base_freq")
    both, scaling = keys.pop("rope_parameters"), keys.pop("rope_scaling")
    if both is None:
        both = {_GLOBAL: scaling}
    if not isinstance(both, dict) or not both.keys() <= {_GLOBAL, _LOCAL}:
        raise InputError(
            f"{keys.where}: rope_parameters is {both!r}; expected an object with '{_GLOBAL}' and "
            f"'{_LOCAL}'."
        )
    theta, scaling = read_rope_settings(both.get(_GLOBAL), theta, where=keys.where)
    local_theta, local_scaling = read_rope_settings(both.get(_LOCAL), local_theta, where=keys.where)
    if local_scaling is not None:
        raise InputError(
            f"{keys.where}: rope_parameters stretch '{_LOCAL}' ({local_scaling.kind}), which is "
            "not implemented; expected rope_type default."
        )
    rope = {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}
    window = _local(keys.integer("sliding_window"), local)
    return rope | _bias(keys) | window | _read_scores(keys)


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    kinds = _write_gemma2(config)
    local = [kind == _LOCAL for kind in kinds["layer_types"]]
    pattern = local.index(False) + 1 if False in local else config.n_layers + 1
    alternate = [(i + 1) % pattern != 0 for i in range(config.n_layers)]
    return {
        **kinds,
        "rope_local_base_freq": config.local_rope_theta,
        # what versions of transformers that know no layer_types read
        **({"sliding_window_pattern": pattern} if local == alternate else {}),
    }


def _read_mixtral(keys: Keys, n_layers: int) -> dict[str, Any]:
    return _read_windowed(keys, n_layers) | {
        "n_experts": keys.integer("num_local_experts"),
        "experts_per_token": keys.integer("num_experts_per_tok"),
    }


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    return _write_windowed(config) | {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def _read_qwen3_moe(keys: Keys, n_layers: int) -> dict[str, Any]:
    window = keys.integer("sliding_window", optional=True)
    used = keys.boolean("use_sliding_window")  # by all layers
    experts = "num_experts" if "num_experts" in keys.rest else "num_local_experts"  # version 4, 5
    return {
        **_rope(keys),
        **_bias(keys),
        "sliding_window": window if used else None,
        "d_ff": keys.integer("moe_intermediate_size"),
        "n_experts": keys.integer(experts),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "normalize_routing": keys.boolean("norm_topk_prob"),
    }


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_bias_key(config),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "moe_intermediate_size": config.d_ff,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalize_routing,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _read_gpt2(keys: Keys, n_layers: int) -> dict[str, Any]:
    # scores are divided by the root of the width of a head, or of 1
    return {} if keys.boolean("scale_attn_weights") else {"query_pre_attn_scalar": 1.0}


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "scale_attn_weights": config.query_pre_attn_scalar is None,
    }


def _rope(keys: Keys) -> dict[str, Any]:
    theta, scaling = read_rope(keys)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _bias(keys: Keys) -> dict[str, Any]:
    bias = keys.boolean("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _bias_key(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _read_scores(keys: Keys) -> dict[str, Any]:
    activation = keys.pop("hidden_activation")
    if activation != "gelu_pytorch_tanh":
        raise InputError(
            f"{keys.where}: hidden_activation is {activation!r}, which is not implemented; "
            "expected 'gelu_pytorch_tanh'."
        )
    return {
        "query_pre_attn_scalar": keys.number("query_pre_attn_scalar"),
        "attention_softcap": keys.number("attn_logit_softcapping", optional=True),
        "logit_softcap": keys.number("final_logit_softcapping", optional=True),
    }


def _layer_types(keys: Keys, n_layers: int, otherwise: list[bool]) -> list[bool]:
    """Which layers are local, as `layer_types` says, or as the family has it without that key."""
    kinds = keys.pop("layer_types")
    if kinds is None:
        return otherwise
    if (
        not isinstance(kinds, list)
        or len(kinds) != n_layers
        or any(kind not in (_LOCAL, _GLOBAL) for kind in kinds)
    ):
        raise InputError(
            f"{keys.where}: layer_types is {kinds!r}; expected '{_LOCAL}' or '{_GLOBAL}' for each "
            f"of {n_layers} layers."
        )
    return [kind == _LOCAL for kind in kinds]


def _local(window: int | None, local: list[bool]) -> dict[str, Any]:
    """The fields in their one spelling: equal functions have equal configurations."""
    if window is None or not any(local):
        return {}
    return {"sliding_window": window, "local_layers": () if all(local) else tuple(local)}


_COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA_LIKE: dict[str, tuple[Any, ...] | None] = {"hidden_act": ("silu",)}
_GEMMA_LIKE: dict[str, tuple[Any, ...] | None] = {
    "hidden_act": None,  # hidden_activation is what counts
    "use_bidirectional_attention": (False, None),
}
# Settings of a loss that balances experts, which is not applied.
_ROUTING: dict[str, tuple[Any, ...] | None] = {
    "output_router_logits": (False,),
    "router_aux_loss_coef": None,
    "router_jitter_noise": (0, None),
}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA_FIXED = {
    "activation": "gelu_tanh",
    "norm_offset": True,
    "post_norms": True,
    "embed_scale": True,
}
# The code in the repositories of Phi-3 is that of transformers, which has it since 4.40.
_PHI3_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {},
        {**_COMMON, "max_position_embeddings": 2048, "mlp_bias": False},
        _read_llama,
        _write_llama,
        _LLAMA_LIKE,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {},
        {
            **_COMMON,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _read_windowed,
        _write_windowed,
        _LLAMA_LIKE,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"qkv_bias": True},
        {**_COMMON, **_QWEN, "max_position_embeddings": 32_768},
        _read_qwen2,
        _write_qwen2,
        _LLAMA_LIKE,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": True},
        {**_COMMON, **_QWEN, "max_position_embeddings": 32_768, "head_dim": 128},
        _read_qwen3,
        _write_qwen3,
        _LLAMA_LIKE,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"fused": True},
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
        },
        _read_windowed,
        _write_windowed,
        {
            **_LLAMA_LIKE,
            "resid_pdrop": (0,),
            "embd_pdrop": (0,),
            "original_max_position_embeddings": None,  # read by kinds of rope that are refused
            "auto_map": (None, _PHI3_CODE),
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {},
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "max_position_embeddings": 131_072,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _read_mixtral,
        _write_mixtral,
        {**_LLAMA_LIKE, **_ROUTING},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True},
        {
            **_COMMON,
            "max_position_embeddings": 32_768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "norm_topk_prob": False,
        },
        _read_qwen3_moe,
        _write_qwen3_moe,
        {
            **_LLAMA_LIKE,
            **_ROUTING,
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "max_window_layers": None,  # version 5 does not read it
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA_FIXED,
        {
            **_COMMON,
            **_GEMMA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _read_gemma2,
        _write_gemma2,
        _GEMMA_LIKE,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA_FIXED, "qk_norm": True},
        {
            **_COMMON,
            **_GEMMA,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        _read_gemma3,
        _write_gemma3,
        _GEMMA_LIKE,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "fused": True,
            "gated": False,
            "layer_norm": True,
            "learned_positions": True,
            "activation": "gelu_tanh",
        },
        {
            "vocab_size": 50_257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,  # four times n_embd
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
        },
        _read_gpt2,
        _write_gpt2,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": None,  # scores are in float32 here in any case
            # dropout of the base in training: only adapters have dropout here
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop")),
            # of heads that are no language model's, and what the code no longer reads
            **dict.fromkeys(
                ("summary_type", "summary_use_proj", "summary_activation")
                + ("summary_proj_to_labels", "summary_first_dropout", "n_ctx", "_num_labels")
            ),
        },
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "rms_norm_eps": "layer_norm_epsilon",
            **dict.fromkeys(
                ("attention_dropout", "head_dim", "hidden_act", "num_key_value_heads")
                + ("rope_scaling", "rope_theta")
            ),
        },
    ),
}
"""By `model_type`."""
