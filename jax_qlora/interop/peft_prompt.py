# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens in PEFT's format: prompt tuning and prefix tuning.

PEFT keeps both as one matrix, `prompt_embeddings`, a row for each virtual token. A prefix's row is
`[layers, 2, n_kv_heads, head_dim]`: of each layer the key, then the value (`PeftModel.get_prompt`
of peft 0.21). How the matrix came about in training (`prefix_projection`, P-tuning's encoder) is
not in it: PEFT saves what was computed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..lora import Adapter, VirtualTokens
from ..models import PREFIX, PROMPT, DecoderConfig, count_virtual
from .adapter_files import WEIGHTS_NAME, read_tensors, write_adapter
from .peft_config import CONFIG_NAME

KINDS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
"""The values of `peft_type` that are read here."""

_NAME = "prompt_embeddings"

# checked against the model and the matrix, by `_check_config`
_SIZES = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
# without effect on what trained virtual tokens do
_HARMLESS = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "task_type", "peft_version", "num_transformer_submodules", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection",
    "encoder_hidden_size", "encoder_reparameterization_type", "encoder_num_layers",
    "encoder_dropout", "init_weights",
}  # fmt: skip


def write_prompt(
    path: Path,
    virtual: Mapping[str, VirtualTokens],
    config: DecoderConfig,
    *,
    base_model: str | None,
) -> int:
    """Writes virtual tokens as a directory that PEFT loads.

    Args:
        path: Directory to make or replace, as for `save_adapter`.
        virtual: By path in the model's parameters.
        config: The model's shape.
        base_model: Name or path of the base model to note.

    Returns:
        How many tokens were written.

    Raises:
        InputError: they are of another model or not finite, or the directory cannot be written.
    """
    arrays = {name: np.asarray(entry.values, np.float32) for name, entry in virtual.items()}
    tokens = count_virtual(_as_params(arrays), config)
    if not all(np.isfinite(x).all() for x in arrays.values()):
        raise InputError(
            "the virtual tokens have values that are not finite: training diverged. Nothing was "
            "written; go back to a checkpoint and lower the learning rate."
        )
    if PROMPT in arrays:
        matrix, kind = arrays[PROMPT], "PROMPT_TUNING"
    else:
        # [layers, tokens, 2, heads, head_dim]
        pairs = np.stack([arrays[f"{PREFIX}/k"], arrays[f"{PREFIX}/v"]], axis=2)
        matrix, kind = np.moveaxis(pairs, 1, 0).reshape(tokens, -1), "PREFIX_TUNING"
    document: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        **_sizes(kind, config),
    }
    if kind == "PREFIX_TUNING":
        document |= {"encoder_hidden_size": document["token_dim"], "prefix_projection": False}
    text = json.dumps(document, indent=2) + "\n"
    write_adapter(path, {_NAME: np.ascontiguousarray(matrix)}, text)
    return tokens


def read_prompt(path: Path, raw: Mapping[str, Any], config: DecoderConfig) -> Adapter:
    """Reads virtual tokens that PEFT or `write_prompt` wrote.

    Args:
        path: The adapter's directory.
        raw: Its configuration, of one of `KINDS`.
        config: The shape of the model that they are for.

    Returns:
        An adapter as `init_prompt` or `init_prefix` makes it.

    Raises:
        InputError: the files are damaged, or of another model; or a field that changes the result
            is not supported.
    """
    kind = raw["peft_type"]
    _check_config(path / CONFIG_NAME, raw, config)
    file = path / WEIGHTS_NAME
    tensors = read_tensors(file)
    sizes = _sizes(kind, config)
    width = sizes["token_dim"]
    if kind == "PREFIX_TUNING":
        width *= 2 * config.n_layers
    wanted = (raw["num_virtual_tokens"], width)
    found = {name: x.shape for name, x in tensors.items()}
    if found != {_NAME: wanted}:
        raise InputError(
            f"{file}: expected one tensor, '{_NAME}' {wanted}, found {found}. It belongs to "
            "another configuration; save the adapter again."
        )
    matrix = tensors[_NAME]
    if not np.isfinite(matrix).all():
        raise InputError(
            f"{file}: '{_NAME}' has values that are not finite. Train again, with a lower learning "
            "rate."
        )
    if kind != "PREFIX_TUNING":
        return {PROMPT: VirtualTokens(jnp.asarray(matrix))}
    shape = (wanted[0], config.n_layers, 2, config.n_kv_heads, config.head_dim)
    pairs = np.moveaxis(matrix.reshape(shape), 0, 1)
    return {
        f"{PREFIX}/{name}": VirtualTokens(jnp.asarray(pairs[:, :, place]))
        for place, name in enumerate("kv")
    }


def _sizes(kind: str, config: DecoderConfig) -> dict[str, int]:
    """What PEFT has of the model's shape; a prefix is as wide as all key/value heads."""
    wide, heads = config.d_model, config.n_heads
    if kind == "PREFIX_TUNING":
        wide, heads = config.n_kv_heads * config.head_dim, config.n_kv_heads
    return {"token_dim": wide, "num_layers": config.n_layers, "num_attention_heads": heads}


def check_fields(file: Path, raw: Mapping[str, Any]) -> None:
    """Check what a configuration of virtual tokens says, whatever the model.

    Args:
        file: What to call it in messages.
        raw: Its content.

    Raises:
        InputError: A field changes the result and is not supported, or a count is none.
    """
    neutral = (None, False, "none", [], {}, "")
    for key, value in raw.items():
        if key not in {*_SIZES, *_HARMLESS} and value not in neutral:
            raise InputError(
                f"{file}: {key} is {value!r}: this field is not known to leave the result "
                "unchanged, which is not supported. Train without it."
            )
    tokens = raw.get("num_virtual_tokens")
    if type(tokens) is not int or tokens < 1:
        raise InputError(
            f"{file}: num_virtual_tokens is {tokens!r}, expected a whole number of at least 1."
        )
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise InputError(
            f"{file}: num_transformer_submodules is {raw['num_transformer_submodules']!r}, "
            "expected 1: it was trained on an encoder and a decoder."
        )


def _check_config(file: Path, raw: Mapping[str, Any], config: DecoderConfig) -> None:
    check_fields(file, raw)
    for name, size in _sizes(raw["peft_type"], config).items():
        if raw.get(name) != size:
            raise InputError(
                f"{file}: {name} is {raw.get(name)!r}, the model's is {size}. It was trained on "
                "another model."
            )


def _as_params(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays where a parameter tree has them, for `count_virtual`."""
    prefix = {name.rpartition("/")[2]: x for name, x in arrays.items() if name != PROMPT}
    attention = {"prefix": prefix} if prefix else {}
    params: dict[str, Any] = {"layers": {"self_attn": attention}}
    return params | ({PROMPT: arrays[PROMPT]} if PROMPT in arrays else {})
