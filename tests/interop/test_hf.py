# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest

from jax_qlora.errors import InputError
from jax_qlora.interop.hf import tensor_names, tensor_shape
from jax_qlora.interop.hf_config import config_from_hf, config_to_hf, read_config
from jax_qlora.interop.safetensors import read_directory
from jax_qlora.models import RopeScaling, abstract_params
from jax_qlora.models.presets import PRESETS
from jax_qlora.tree import flatten_paths
from tests.helpers import GOLDEN
from tests.tiny import tiny_model

MODELS = GOLDEN / "models"
FIXTURES = [
    "llama", "llama_rope3_tied", "mistral_sharded", "qwen2", "qwen3", "phi3", "gemma2",
    "gemma3_text",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model()


def raw(**changes: Any) -> dict[str, Any]:
    content = json.loads((MODELS / "llama" / "config.json").read_text())
    return {k: v for k, v in (content | changes).items() if v != "absent"}


@pytest.mark.parametrize("name", FIXTURES)
def test_both_spellings_say_the_same(name: str):
    spellings = [
        config_from_hf(json.loads((MODELS / name / file).read_text()))
        for file in ("config.json", "config.v4.json")
    ]
    assert spellings[0] == spellings[1]
    written = json.loads(json.dumps(config_to_hf(spellings[0], dtype="float32")))
    assert config_from_hf(written) == spellings[0]


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
        ({"rope_theta": 10**400, "rope_parameters": "absent"}, "rope_theta is 10+; expected a num"),
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


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is .* for each of 2 layers"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True, which is not implemented"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop is 0.1"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "other.py"}}, "auto_map is"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None; expected a whole number"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear"}}, "'full_attention' and"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "stretch 'sliding_attention'",
        ),
        (
            "gemma3_text",
            {"layer_types": "absent", "sliding_window_pattern": 0},
            "sliding_window_pattern is 0",
        ),
        ("mistral_sharded", {"layer_types": ["full_attention"] * 3}, "key 'layer_types'"),
    ],
)
def test_what_families_have_and_is_not_implemented(name: str, changes: dict, message: str):
    content = json.loads((MODELS / name / "config.json").read_text()) | changes
    with pytest.raises(InputError, match=message):
        config_from_hf({k: v for k, v in content.items() if v != "absent"})


def test_windows_of_qwen():
    """Local are the layers from max_window_layers on, if windows are used; layer_types say more."""
    content = json.loads((MODELS / "qwen2" / "config.json").read_text())
    content |= {"sliding_window": 6, "max_window_layers": 1}
    del content["layer_types"]
    assert config_from_hf(content).windows == (None, None)
    content["use_sliding_window"] = True
    assert config_from_hf(content).windows == (None, 6)
    written = config_to_hf(config_from_hf(content), dtype="float32")
    assert written["layer_types"] == ["full_attention", "sliding_attention"]
    content["layer_types"] = ["sliding_attention", "full_attention"]
    assert config_from_hf(content).windows == (6, None)


def test_a_null_is_not_a_missing_key():
    content = json.loads((MODELS / "gemma2" / "config.json").read_text())
    del content["attn_logit_softcapping"]
    content["final_logit_softcapping"] = None
    config = config_from_hf(content)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, None)
    content = json.loads((MODELS / "mistral_sharded" / "config.json").read_text())
    del content["sliding_window"]
    assert config_from_hf(content).sliding_window == 4096
    assert config_from_hf(content | {"sliding_window": None}).sliding_window is None


def test_config_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match="No config.json in"):
        read_config(tmp_path)
    for text, message in [
        ("{", "cannot be read as JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("name", FIXTURES)
def test_names_and_shapes_are_those_of_the_checkpoint(name: str):
    config, _ = read_config(MODELS / name)
    names = {
        tensor: tensor_shape(path, config)
        for path in flatten_paths(abstract_params(config))
        for tensor in tensor_names(path, config)
    }
    assert names == {tensor: x.shape for tensor, x in read_directory(MODELS / name).items()}
