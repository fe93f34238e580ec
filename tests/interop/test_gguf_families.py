# SPDX-License-Identifier: Apache-2.0
"""GGUF files of other architectures than llama, written by the `gguf` package from the fixtures."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.gguf import read_gguf
from jax_qlora.interop.gguf_config import config_from_gguf, model_metadata
from jax_qlora.interop.gguf_families import ARCHITECTURES as known
from jax_qlora.interop.hf_config import read_config
from jax_qlora.interop.safetensors import read_directory
from tests.helpers import GOLDEN, assert_trees_close, golden
from tests.interop.test_gguf import permute

MODELS = GOLDEN / "models"
ARCHITECTURES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "mixtral": "llama",
    "mistral_sharded": "llama",
}
WINDOWED = ("mixtral", "mistral_sharded")  # no file of theirs has their window
FEED_FORWARD_NORMS = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"} | {
    f"{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")
}


def keys_of(name: str, config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a fixture."""
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
    if name in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    if name == "gemma3_text":
        keys |= {"attention.sliding_window": 6, "attention.sliding_window_pattern": 3}
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    if name == "gemma2":
        keys |= {"attention.sliding_window": 6}
        keys |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
        del keys["rope.freq_base"]
    if name == "phi3":
        keys |= {"attention.sliding_window": 0, "rope.scaling.original_context_length": 128}
    if config.n_experts:
        keys |= {"expert_count": config.n_experts, "expert_used_count": config.experts_per_token}
    if name == "qwen3_moe":
        keys |= {"expert_feed_forward_length": config.d_ff, "feed_forward_length": 32}
    return keys


def tensors_of(name: str, config: Any) -> dict[str, np.ndarray]:
    """As llama.cpp's converter has them: Gemma's norms are 1 + w, Mixtral's heads are permuted."""
    architecture = ARCHITECTURES[name]
    gemma, heads = architecture.startswith("gemma"), {}
    if architecture == "llama":
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.n_layers)
    tensors, experts = {}, {}
    for hf, tensor in read_directory(MODELS / name).items():
        module, _, kind = hf.rpartition(".")
        last = module.rpartition(".")[2]
        x = tensor.read().astype(np.float32)
        x = permute(x, heads[last]) if last in heads else x
        x = x + 1 if gemma and module.endswith("norm") else x
        if name == "gemma2" and last == "q_proj":  # no key has query_pre_attn_scalar
            x = x * np.float32(np.sqrt(config.head_dim / config.query_pre_attn_scalar))
        own = FEED_FORWARD_NORMS.get(last) if gemma else ""
        if ".experts." in module:
            number = module.split(".")[-2]
            stem = f"blk.{module.split('.')[2]}.{EXPERTS[last]}"
            experts.setdefault(f"{stem}.{kind}", {})[int(number)] = x
            continue
        stem = f"blk.{module.split('.')[2]}.{own}" if own else names.get_name(module)
        tensors[f"{stem}.{kind}"] = x
    stacked = {name: np.stack([x[i] for i in sorted(x)]) for name, x in experts.items()}
    return tensors | stacked


def write(
    file: Path,
    name: str,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> Path:
    """A fixture as a GGUF file."""
    config, _ = read_config(MODELS / name)
    architecture = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (keys_of(name, config) | changes).items():
        if key in drop:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", [*map(str, range(13)), *"abcdefgh"])
    writer.add_array("tokenizer.ggml.merges", ["1 2"])
    for tensor, x in (tensors_of(name, config) | (extra or {})).items():
        writer.add_tensor(tensor, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.proves("GGUF in")
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WINDOWED])
def test_logits_are_those_of_the_same_model_from_hugging_face(tmp_path: Path, name: str):
    model = jq.load_model(write(tmp_path / "m.gguf", name), quantization=None)
    outputs = golden("model_outputs.npz") | golden("family_outputs.npz")
    for side in ("", "left/"):
        mask = outputs[f"{name}/{side}attention_mask"]
        tokens = jnp.array(outputs[f"{name}/{side}input_ids"], jnp.int32)
        got = model.apply(model.params, tokens, attention_mask=jnp.array(mask))
        want = outputs[f"{name}/{side}logits"]
        np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=1e-4)


@pytest.mark.proves("GGUF in")
@pytest.mark.parametrize("name", WINDOWED)
def test_a_model_of_llamas_architecture_is_the_same_but_for_its_window(tmp_path: Path, name: str):
    """No file has a window; the published models have none. `test_load.py` has the logits."""
    model = jq.load_model(write(tmp_path / "m.gguf", name), quantization=None)
    want = jq.load_model(MODELS / name, quantization=None)
    assert_trees_close(model.params, want.params)
    tokens = {"bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": 0}
    assert dataclasses.replace(model.config, **tokens) == dataclasses.replace(
        want.config, sliding_window=None, family=model.config.family
    )


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WINDOWED])
def test_config_is_that_of_the_same_model_from_hugging_face(tmp_path: Path, name: str):
    got, _ = read_gguf(write(tmp_path / "m.gguf", name))
    want, _ = read_config(MODELS / name)
    differs = {k for k in vars(got) if getattr(got, k) != getattr(want, k)}
    differs -= {"query_pre_attn_scalar"} if name == "gemma2" else set()
    assert differs == {"bos_token_id", "eos_token_ids", "pad_token_id"}  # none in this file


def test_what_a_missing_key_means_in_gemma_2_and_qwen_3(tmp_path: Path):
    drop = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    config, _ = read_gguf(write(tmp_path / "m.gguf", "gemma2", drop))
    assert config.windows == (4096, None, 4096) and config.tied
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    drop = ("expert_feed_forward_length",)
    config, _ = read_gguf(write(tmp_path / "q.gguf", "qwen3_moe", drop, feed_forward_length=72))
    assert config.d_ff == 24  # of 3 experts each


def test_experts_that_are_no_stack(tmp_path: Path):
    name = "blk.0.ffn_up_exps.weight"
    for x, message in (
        (np.ones((32, 32), np.float32), r"has shape \[32, 32\]; expected three axes"),
        (np.ones((5, 32, 32), np.float32), "1 without a use: model.*experts.4.w3.weight"),
        (np.ones((3, 32, 32), np.float32), "1 missing: model.*experts.3.w3.weight"),
    ):
        file = write(tmp_path / "m.gguf", "mixtral", extra={name: x})
        with pytest.raises(InputError, match=message):
            jq.load_model(file)


def test_layers_of_gemma_3():
    """Five local layers, then a global one, unless the file says otherwise."""
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
    assert "attn_q_norm" not in known["qwen2"].names
    file = write(tmp_path / "m.gguf", "qwen3")
    data = file.read_bytes().replace(b"qwen3", b"qwen2")
    file.write_bytes(data)
    with pytest.raises(InputError, match="'blk.0.attn_.*_norm.weight' is not one of a qwen2 model"):
        read_gguf(file)


def test_what_a_file_says_of_a_family_or_cannot():
    """`model_metadata` reads back what it says, and refuses what is lost."""
    phi, gemma, qwen = (read_config(MODELS / x)[0] for x in ("phi3", "gemma2", "qwen3_moe"))
    windowed = dataclasses.replace(phi, sliding_window=9)
    assert model_metadata(windowed)["phi3.attention.sliding_window"] == 9
    assert model_metadata(phi)["phi3.attention.sliding_window"] == 0
    metadata = model_metadata(qwen)
    assert metadata["qwen3moe.expert_feed_forward_length"] == 24
    assert metadata["qwen3moe.feed_forward_length"] == 3 * 24
    alternate = tuple(i % 2 == 0 for i in range(46))
    large = dataclasses.replace(gemma, n_layers=46, local_layers=alternate)
    model_metadata(dataclasses.replace(large, query_pre_attn_scalar=64 / 4))  # as that of 27B
    small = dataclasses.replace(gemma, query_pre_attn_scalar=32.0)
    model_metadata(small)
    for config, changes, message in (
        (large, {"query_pre_attn_scalar": 32.0}, "a gemma2 model cannot say query_pre_attn_scalar"),
        (small, {"tied": False}, "cannot say tied = False"),
        (small, {"attention_softcap": None}, "cannot say attention_softcap = None"),
        (small, {"local_layers": (False, True, False)}, "all do but each second; .* found .False"),
        (phi, {"head_dim": 8}, "cannot say head_dim = 8"),
        (qwen, {"normalize_routing": False}, "cannot say normalize_routing = False"),
        (qwen, {"sliding_window": 4}, "cannot say sliding_window = 4"),
    ):
        with pytest.raises(InputError, match=message):
            model_metadata(dataclasses.replace(config, **changes))
