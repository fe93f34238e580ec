# SPDX-License-Identifier: Apache-2.0
"""GGUF files of other architectures than llama, written by the `gguf` package from the fixtures."""

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.gguf import read_gguf
from jax_qlora.interop.hf_config import read_config
from jax_qlora.interop.safetensors import read_directory
from tests.helpers import GOLDEN, golden

MODELS = GOLDEN / "models"
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
FEED_FORWARD_NORMS = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write(file: Path, name: str, **changes: Any) -> Path:
    """A fixture as llama.cpp's converter writes it: no row is permuted, Gemma's norms are 1 + w."""
    config, _ = read_config(MODELS / name)
    architecture = ARCHITECTURES[name]
    keys: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.max_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if architecture != "qwen2":
        keys |= {"attention.key_length": 32, "attention.value_length": 32}
    if architecture == "gemma3":
        keys |= {"attention.sliding_window": 6, "attention.sliding_window_pattern": 3}
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (keys | changes).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", [*map(str, range(13)), *"abcdefgh"])
    writer.add_array("tokenizer.ggml.merges", ["1 2"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.n_layers)
    for hf, tensor in read_directory(MODELS / name).items():
        module, _, kind = hf.rpartition(".")
        x = tensor.read().astype(np.float32)
        if architecture == "gemma3" and module.endswith("norm"):
            x = x + 1
        own = FEED_FORWARD_NORMS.get(module.rpartition(".")[2]) if architecture == "gemma3" else ""
        stem = f"blk.{module.split('.')[2]}.{own}" if own else names.get_name(module)
        writer.add_tensor(f"{stem}.{kind}", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_same_model_from_hugging_face(tmp_path: Path, name: str):
    model = jq.load_model(write(tmp_path / "m.gguf", name), quantization=None)
    outputs = golden("model_outputs.npz")
    for side in ("", "left/"):
        mask = outputs[f"{name}/{side}attention_mask"]
        tokens = jnp.array(outputs[f"{name}/{side}input_ids"], jnp.int32)
        got = model.apply(model.params, tokens, attention_mask=jnp.array(mask))
        want = outputs[f"{name}/{side}logits"]
        np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_is_that_of_the_same_model_from_hugging_face(tmp_path: Path, name: str):
    got, _ = read_gguf(write(tmp_path / "m.gguf", name))
    want, _ = read_config(MODELS / name)
    differs = {k for k in vars(got) if getattr(got, k) != getattr(want, k)}
    assert differs == {"bos_token_id", "eos_token_ids", "pad_token_id"}  # none in this file


def test_layers_of_gemma_3():
    """Five local layers, then a global one, unless the file says otherwise."""
    from jax_qlora.interop.gguf_config import config_from_gguf

    keys = {
        "block_count": 7, "context_length": 64, "embedding_length": 64, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 6,
        "vocab_size": 64,
    }  # fmt: skip
    metadata = {"general.architecture": "gemma3"} | {f"gemma3.{k}": v for k, v in keys.items()}
    config = config_from_gguf(metadata, {})
    assert config.windows == (6, 6, 6, 6, 6, None, 6) and config.query_pre_attn_scalar == 32
    assert config.local_rope_theta == 10_000
    metadata["gemma3.attention.sliding_window_pattern"] = [True, False] * 3 + [True]
    assert config_from_gguf(metadata, {}).windows == (6, None) * 3 + (6,)
    for pattern in (0, "LLG", [[True]]):
        metadata["gemma3.attention.sliding_window_pattern"] = pattern
        with pytest.raises(InputError, match="pattern' is .*; expected a positive period, or"):
            config_from_gguf(metadata, {})
    metadata["gemma3.attention.sliding_window_pattern"] = 6
    metadata["gemma3.attention.logit_softcapping"] = 5.0
    with pytest.raises(InputError, match="'gemma3.attention.logit_softcapping' is 5.0"):
        config_from_gguf(metadata, {})


def test_a_tensor_of_another_architecture(tmp_path: Path):
    from jax_qlora.interop.gguf_config import ARCHITECTURES as known

    assert "attn_q_norm" not in known["qwen2"].names
    file = write(tmp_path / "m.gguf", "qwen3")
    data = file.read_bytes().replace(b"qwen3", b"qwen2")
    file.write_bytes(data)
    with pytest.raises(InputError, match="'blk.0.attn_.*_norm.weight' is not one of a qwen2 model"):
        read_gguf(file)
