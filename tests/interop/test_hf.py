# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.hf import save_hf, tensor_names, tensor_shape
from jax_qlora.interop.hf_config import config_from_hf, config_to_hf, read_config
from jax_qlora.models import RopeScaling, abstract_params
from jax_qlora.models.presets import PRESETS, TINY
from jax_qlora.tree import flatten_paths
from tests.helpers import GOLDEN, assert_trees_close
from tests.tiny import quantized, tiny_model

MODELS = GOLDEN / "models"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model()


def raw(**changes: Any) -> dict[str, Any]:
    content = json.loads((MODELS / "llama" / "config.json").read_text())
    return {k: v for k, v in (content | changes).items() if v != "absent"}


@pytest.mark.parametrize("name", ["llama", "llama_rope3_tied"])
def test_both_spellings_say_the_same(name: str):
    spellings = [
        config_from_hf(json.loads((MODELS / name / file).read_text()))
        for file in ("config.json", "config.v4.json")
    ]
    assert spellings[0] == spellings[1]


def test_a_config_is_read_whole():
    config = config_from_hf(json.loads((MODELS / "llama_rope3_tied" / "config.json").read_text()))
    assert config.tied and config.max_length == 512 and config.d_ff == 128
    assert config.rope_theta == 500_000 and config.eos_token_ids == (2,)
    assert config.rope_scaling == RopeScaling(
        kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_length=64
    )


@pytest.mark.parametrize("name", PRESETS)
def test_writing_and_reading_a_config_is_identity(name: str):
    written = config_to_hf(PRESETS[name], dtype="bfloat16")
    assert config_from_hf(json.loads(json.dumps(written))) == PRESETS[name]
    assert "rope_parameters" not in written  # transformers 4 would ignore it


def test_what_checkpoints_leave_out_has_the_defaults_of_transformers():
    content = raw()
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "mlp_bias",
                "tie_word_embeddings", "attention_bias", "max_position_embeddings"):  # fmt: skip
        del content[key]
    config = config_from_hf(content)
    assert (config.head_dim, config.n_kv_heads, config.norm_eps) == (16, 4, 1e-6)
    assert (config.rope_theta, config.max_length, config.tied) == (10_000, 2048, False)


def test_several_end_tokens():
    config = config_from_hf(raw(eos_token_id=[2, 5]))
    assert config.eos_token_ids == (2, 5)
    assert config_to_hf(config, dtype="float32")["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_linear_rope_scaling(spelling: str):
    scaling = {spelling: "linear", "factor": 4.0}
    config = config_from_hf(raw(rope_parameters="absent", rope_scaling=scaling))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "falcon"}, "model_type is 'falcon', which is not implemented"),
        ({"model_type": "absent"}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"logit_scale": 0.5}, r"key 'logit_scale' \(= 0.5\) is not known"),
        ({"sliding_window": 6}, "key 'sliding_window'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not implemented; expected 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, which is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map is"),
        ({"hidden_size": "absent"}, "hidden_size is None; expected a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"num_key_value_heads": 3}, r"config.json: .*n_heads \(4\) is not a multiple"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None; expected a number"),
        ({"rope_parameters": {"rope_type": "default", "beta": 3}}, "rope settings: key 'beta'"),
        ({"rope_parameters": [1]}, "expected an object or null"),
    ],
)
def test_what_would_change_results_is_refused_by_name(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        config_from_hf(raw(**changes))


def test_config_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match="No config.json in"):
        read_config(tmp_path)
    for text, message in [("{", "cannot be read as JSON"), ("[]", "expected a JSON object")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama_rope3_tied"])
def test_names_and_shapes_are_those_of_the_checkpoint(name: str):
    config, _ = read_config(MODELS / name)
    names = {
        tensor: tensor_shape(path, config)
        for path in flatten_paths(abstract_params(config))
        for tensor in tensor_names(path, config)
    }
    stored = load_file(MODELS / name / "model.safetensors")
    assert names == {tensor: x.shape for tensor, x in stored.items()}


def test_export_is_the_inverse_of_import(tmp_path: Path):
    model = jq.load_model(MODELS / "llama", quantization=None)
    out = save_hf(tmp_path / "out", model.params, model.config, tokenizer=model.tokenizer)
    want = load_file(MODELS / "llama" / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert got.keys() == want.keys()
    for tensor, x in want.items():
        np.testing.assert_array_equal(got[tensor], x, err_msg=tensor)
    again = jq.load_model(out, quantization=None)
    assert again.config == model.config
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_export_merges_layer_by_layer(tmp_path: Path):
    """A quantized base with an adapter is written as `merge` would make it, sharded and in bf16."""
    model = tiny_model(tied=True)
    base, adapter = quantized(model)
    out = save_hf(
        tmp_path / "merged",
        jq.attach(base, adapter),
        model.config,
        dtype=jnp.bfloat16,
        max_shard_bytes=30_000,
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = jq.load_model(out, quantization=None)
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jq.merge(base, adapter))
    assert_trees_close(again.params, want, rtol=2**-8)
    assert again.config == model.config


def test_export_refuses_to_overwrite(tmp_path: Path, tiny: Any):
    model = tiny
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is in use: expected a new or an empty directory"):
        save_hf(tmp_path, model.params, model.config)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", model.params, model.config)


def test_export_of_weights_that_overflow_leaves_nothing(tmp_path: Path, tiny: Any):
    model = tiny
    params = jax.tree.map(lambda x: x * 1e30, model.params)
    with pytest.raises(InputError, match="'.*' has values that are not finite in float16"):
        save_hf(tmp_path / "out", params, model.config, dtype=jnp.float16)
    assert list(tmp_path.iterdir()) == []


def test_export_of_other_parameters(tmp_path: Path, tiny: Any):
    model = tiny
    other = dataclasses.replace(model.config, d_ff=32)
    with pytest.raises(
        InputError, match=r"at 'layers/mlp/down_proj/kernel' expected \(3, 32, 32\)"
    ):
        save_hf(tmp_path / "out", model.params, other)
    extra = model.params | {"value_head": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(InputError, match="at 'value_head/kernel' expected no such parameter"):
        save_hf(tmp_path / "out", extra, model.config)
    biased = dataclasses.replace(TINY, qkv_bias=True)
    with pytest.raises(InputError, match="qkv_bias and out_bias to be equal"):
        config_to_hf(biased, dtype="float32")


def test_export_into_a_place_that_cannot_be(tmp_path: Path, tiny: Any):
    model = tiny
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        save_hf(tmp_path / "file" / "out", model.params, model.config)
