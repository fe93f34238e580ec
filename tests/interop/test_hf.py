# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from jax_qlora.errors import InputError
from jax_qlora.interop.hf import tensor_names, tensor_shape
from jax_qlora.interop.hf_config import config_from_hf, config_to_hf, read_config
from jax_qlora.models import RopeScaling, abstract_params
from jax_qlora.models.presets import PRESETS
from jax_qlora.tree import flatten_paths
from tests.helpers import GOLDEN
from tests.tiny import tiny_model

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
