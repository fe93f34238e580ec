# SPDX-License-Identifier: Apache-2.0
"""The architectures of GGUF files: what their metadata and the names of their tensors mean.

References:
    `conversion/*.py` and `src/llama-model.cpp` of https://github.com/ggml-org/llama.cpp.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..models import DecoderConfig, RopeScaling
from ..models.config import validate_config
from .gguf_metadata import GGUFEntry

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
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Architecture(NamedTuple):
    """One `general.architecture`.

    Attributes:
        family: Its `model_type` in Hugging Face's checkpoints.
        names: Modules of a layer there, by their name in GGUF.
        fixed: Fields of the configuration that all its models share.
        permuted: Whether the rows of query and key projections are permuted, so that rotary pairs
            are neighbors.
        norm_offset: What has been added to the weights of norms.
    """

    family: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any]
    permuted: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {
    "llama": Architecture("llama", LAYER_NAMES, {}, permuted=True),
    "qwen2": Architecture("qwen2", LAYER_NAMES, {}),
    "qwen3": Architecture("qwen3", LAYER_NAMES | _QK_NORMS, {"qk_norm": True}),
    "gemma3": Architecture(
        "gemma3_text",
        LAYER_NAMES | _QK_NORMS | _GEMMA_NORMS,
        {
            "qk_norm": True,
            "activation": "gelu_tanh",
            "norm_offset": True,
            "post_norms": True,
            "embed_scale": True,
        },
        norm_offset=1.0,
    ),
}
# Keys after the architecture that would change the numbers, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.finetuned": (False, True),
}


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
    known = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise InputError(
            f"{where}: the architecture is {architecture!r}, which is not implemented; expected "
            f"one of {', '.join(ARCHITECTURES)}."
        )
    prefix = f"{architecture}."
    rest = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    pattern = rest.pop("attention.sliding_window_pattern", 6) if architecture == "gemma3" else 1

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

    def whole(key: str, *default: Any) -> Any:
        value = take(key, *default)
        if default == (value,) or (type(value) is int and value > 0):
            return value
        raise InputError(f"{where}: '{prefix}{key}' is {value!r}; expected a whole number above 0.")

    def real(key: str, *default: Any) -> Any:
        value = take(key, *default)
        if default == (value,) or (type(value) in (int, float) and math.isfinite(value)):
            return value
        raise InputError(f"{where}: '{prefix}{key}' is {value!r}; expected a finite number.")

    d_model, n_heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = whole("attention.key_length", d_model // n_heads)
    if take("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{where}: values and keys have different widths, not implemented.")
    if take("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{where}: only a part of each head is rotated, which is not implemented.")
    scaling = None
    factor = real("rope.scaling.factor", 1.0)
    kind = take("rope.scaling.type", "none" if factor in (0, 1) else "linear")  # llama.cpp's rule
    take("rope.scaling.original_context_length", None)
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=factor)
    elif kind != "none":
        raise InputError(f"{where}: rope scaling of type '{kind}' is not implemented.")
    vocab = entries["token_embd.weight"].shape[0] if "token_embd.weight" in entries else 0

    def token(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if type(value := metadata.get(key)) not in (int, type(None)):
            raise InputError(f"{where}: '{key}' is {value!r}; expected the number of a token.")
        return value

    ends = dict.fromkeys(t for t in (token("eos"), token("eot")) if t is not None)
    n_layers, own = whole("block_count"), {}
    if architecture == "gemma3":
        own = _gemma3(whole, real, n_layers, d_model // n_heads, head_dim)
        own["local_layers"] = _local_layers(pattern, n_layers, where)
    config = DecoderConfig(
        **known.fixed,
        **own,
        family=known.family,
        vocab_size=whole("vocab_size", vocab),
        d_model=d_model,
        d_ff=whole("feed_forward_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=whole("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        max_length=whole("context_length"),
        norm_eps=round(real("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        rope_theta=real("rope.freq_base", 10_000.0),
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


def _gemma3(
    whole: Callable, real: Callable, n_layers: int, width: int, head: int
) -> dict[str, Any]:
    """What llama.cpp has for Gemma 3 beside the keys: `width` is that of a head's share of d."""
    scalar = width if n_layers == 62 else head  # 62 layers: the model of 27B
    return {
        "local_rope_theta": float(real("rope.freq_base_swa", 10_000.0)),
        "logit_softcap": real("final_logit_softcapping", None),
        "query_pre_attn_scalar": float(scalar),
        "sliding_window": whole("attention.sliding_window"),
    }


def _local_layers(pattern: Any, n_layers: int, where: str) -> tuple[bool, ...]:
    """Which layers see a window; empty: all. Of a period, the last layer does not."""
    if type(pattern) is int and pattern > 0:
        local = [(i + 1) % pattern != 0 for i in range(n_layers)]
    elif isinstance(pattern, list) and all(type(x) in (bool, int) for x in pattern):
        local = pattern
    else:
        raise InputError(
            f"{where}: 'gemma3.attention.sliding_window_pattern' is {pattern!r}; expected a "
            "positive period, or a list of which layers see a window."
        )
    return () if all(local) else tuple(map(bool, local))
