# SPDX-License-Identifier: Apache-2.0
"""GPT-2: its checkpoints' names and layout, its configuration, and what is written of it.

Its logits and continuations are among those of `test_load.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.cli.main import main
from jax_qlora.config import from_table
from jax_qlora.errors import InputError
from jax_qlora.interop import load_params as module
from jax_qlora.interop.bnb import STATE
from jax_qlora.interop.bnb_write import save_bnb
from jax_qlora.interop.hf import stored_shape, tensor_names
from jax_qlora.interop.hf_config import config_from_hf, config_to_hf, read_config
from jax_qlora.interop.hf_write import save_hf
from jax_qlora.interop.inspect import inspect
from jax_qlora.interop.load_params import Encoding
from jax_qlora.interop.quantize_checkpoint import quantize_checkpoint
from jax_qlora.models import abstract_params
from jax_qlora.train import start
from jax_qlora.train.start import find_decoder_targets, load_start
from jax_qlora.tree import flatten_paths, nbytes
from tests.helpers import GOLDEN, assert_trees_close

PATH = GOLDEN / "models" / "gpt2"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 96, (2, 12), dtype=np.int32))
C_ATTN = "layers/self_attn/qkv_proj/kernel"


@pytest.fixture(scope="module")
def model() -> Any:
    return jq.load_model(PATH, quantization=None)


@pytest.fixture(scope="module")
def targets(model: Any) -> jq.Targets:
    return jq.find_targets(model.apply, model.params, TOKENS, parts=model.config.parts)


def raw(**changes: Any) -> dict[str, Any]:
    content = json.loads((PATH / "config.json").read_text()) | changes
    return {k: v for k, v in content.items() if v != "absent"}


def trained(key: jax.Array, targets: jq.Targets) -> Any:
    adapter = jq.init_adapter(key, targets, rank=2, alpha=3)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapter)


# --- checkpoints --------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_checkpoint():
    config, _ = read_config(PATH)
    names = {
        tensor: stored_shape(path, config)
        for path in flatten_paths(abstract_params(config))
        for tensor in tensor_names(path, config)
    }
    assert names == {k: x.shape for k, x in load_file(PATH / "model.safetensors").items()}


def test_a_checkpoint_as_the_first_ones_are(model: Any, tmp_path: Path):
    """Without the prefix, and with the buffers of the causal mask."""
    shutil.copytree(PATH, tmp_path / "m")
    tensors = load_file(PATH / "model.safetensors")
    old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
        old[f"h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    save_file(old, tmp_path / "m" / "model.safetensors")
    loaded = jq.load_model(tmp_path / "m", quantization=None)
    assert_trees_close(loaded.params, model.params)
    tied = old | {"lm_head.weight": old["wte.weight"]}
    save_file(tied, tmp_path / "m" / "model.safetensors")
    assert_trees_close(jq.load_model(tmp_path / "m", quantization=None).params, model.params)
    save_file(old | {"lm_head.weight": old["wte.weight"] + 1}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match="differs from 'transformer.wte.weight'"):
        jq.load_model(tmp_path / "m")
    del old["h.1.mlp.c_fc.bias"]
    save_file(old, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: transformer.h.1.mlp.c_fc.bias"):
        jq.load_model(tmp_path / "m")


@pytest.mark.parametrize("chunk", [1 << 19, 500])
def test_quantizing_on_the_way_is_quantizing_afterwards(
    model: Any, targets: jq.Targets, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    want = jq.quantize(model.params, targets, block_size=32)
    got = jq.load_model(PATH, block_size=32).params
    assert_trees_close(got, want, rtol=1e-6)  # the mean of absmax, by an ulp or two
    assert nbytes(got) < nbytes(model.params)


def test_inspect(capsys: pytest.CaptureFixture[str]):
    found = inspect(PATH)
    assert found["family"] == "gpt2" and found["shape"]["max_length"] == 64
    assert {"name": "self_attn.qkv_proj", "shape": [96, 32], "count": 2,
            "formats": {"float32": 2}} in found["linears"]  # fmt: skip
    params = jq.load_model(PATH, dtype=jnp.bfloat16).params
    assert found["memory"]["nf4"] == nbytes(params)
    assert main(["inspect", str(PATH)]) == 0
    assert "a gpt2 model" in capsys.readouterr().out


# --- configuration ------------------------------------------------------------------------------


def test_a_config_is_read_whole_and_written_as_transformers_has_it():
    config = config_from_hf(raw())
    assert (config.d_model, config.d_ff, config.n_heads, config.max_length) == (32, 64, 4, 64)
    assert config.tied and config.learned_positions and config.layer_norm and not config.gated
    written = json.loads(json.dumps(config_to_hf(config, dtype="float32")))
    assert config_from_hf(written) == config
    assert written["n_embd"] == 32 and written["activation_function"] == "gelu_new"
    assert not {"hidden_size", "rope_theta", "head_dim", "hidden_act"} & written.keys()


def test_what_a_config_leaves_out():
    config = config_from_hf({"model_type": "gpt2"})
    assert (config.vocab_size, config.d_model, config.d_ff, config.n_layers) == (
        50_257, 768, 3072, 12,
    )  # fmt: skip
    assert config.eos_token_ids == (50_256,) and config.norm_eps == 1e-5
    assert config_from_hf(raw(n_inner=None)).d_ff == 128


def test_scores_that_are_not_scaled():
    config = config_from_hf(raw(scale_attn_weights=False))
    assert config.query_pre_attn_scalar == 1.0
    written = config_to_hf(config, dtype="float32")
    assert written["scale_attn_weights"] is False and config_from_hf(written) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"activation_function": "relu"}, "activation_function is 'relu', which is not implement"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_embd": "32"}, "n_embd is '32'; expected a whole number"),
        ({"n_embd": 30}, "n_embd is 30; expected a multiple of the 4 heads"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None; expected a number"),
        ({"rotary_dim": 8}, r"key 'rotary_dim' \(= 8\) is not known"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
    ],
)
def test_what_would_change_results_is_refused_by_name(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        config_from_hf(raw(**changes))


def test_more_tokens_than_positions(model: Any):
    long = jnp.ones((1, 65), jnp.int32)
    with pytest.raises(InputError, match="65 tokens: expected at most 64, the model's context"):
        model.apply(model.params, long)
    with pytest.raises(InputError, match="A cache of 65 tokens: expected at most 64"):
        model.init_cache(1, 65)
    positions = jnp.full((1, 4), 64, jnp.int32)  # a position that has no vector is no other one
    assert jnp.isnan(model.apply(model.params, long[:, :4], positions=positions)).all()


# --- targets ------------------------------------------------------------------------------------


def settings(**lora: Any) -> Any:
    return from_table({"method": "lora", "model": str(PATH), "lora": {"rank": 2, **lora}})


def test_targets_of_a_run_answer_to_the_checkpoints_names(model: Any):
    config = settings(targets=["c_attn[q,v]", "mlp.c_proj"], rank_pattern={"c_attn": 3})
    targets = find_decoder_targets(model.config, config)
    assert list(targets) == ["layers/mlp/down_proj/kernel", C_ATTN]
    assert targets[C_ATTN].chosen_rows == ((0, 32), (64, 96))
    loaded, adapter = load_start(config, targets, compute_dtype=jnp.float32)
    assert adapter[C_ATTN].b.shape == (2, 64, 3)
    fresh = loaded.apply(jq.attach(loaded.params, adapter), TOKENS)
    np.testing.assert_array_equal(fresh, loaded.apply(loaded.params, TOKENS))
    same = find_decoder_targets(model.config, settings(targets=["qkv_proj[q,v]", "down_proj"]))
    assert list(same) == list(targets)
    with pytest.raises(InputError, match=r"has no part 'query'; expected some of q, k, v"):
        find_decoder_targets(model.config, settings(targets=["c_attn[query]"]))


@pytest.mark.parametrize("lora", [{"dora": True}, {"init": "olora"}])
def test_what_takes_whole_kernels_is_refused_before_weights_are_read(
    model: Any, lora: dict, monkeypatch: pytest.MonkeyPatch
):
    config = settings(targets=["c_attn[q]"], **lora)
    monkeypatch.setattr(start, "load_model", None)
    with pytest.raises(InputError, match=f"with parts of '{C_ATTN}' as targets: expected whole"):
        load_start(config, find_decoder_targets(model.config, config))


# --- what is written ----------------------------------------------------------------------------


def test_a_written_directory_holds_what_was_read(model: Any, tmp_path: Path):
    save_hf(tmp_path / "m", model.params, model.config)
    got, want = (load_file(d / "model.safetensors") for d in (tmp_path / "m", PATH))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_a_merged_directory(model: Any, targets: jq.Targets, key: jax.Array, tmp_path: Path):
    base = jq.quantize(model.params, targets, block_size=32)
    adapter = trained(key, targets.select(["qkv_proj[q,v]", "down_proj"]))
    tree = jq.attach(base, adapter)
    save_hf(tmp_path / "m", tree, model.config, dtype=jnp.float32)
    again = jq.load_model(tmp_path / "m", quantization=None)
    want = model.apply(tree, TOKENS)
    np.testing.assert_allclose(again.apply(again.params, TOKENS), want, atol=1e-4)


def test_an_adapter_of_parts_in_the_format_of_peft(
    model: Any, targets: jq.Targets, key: jax.Array, tmp_path: Path
):
    """PEFT has no parts: `a` of all of them, `b` block-diagonal, and alpha for the whole rank."""
    adapter = trained(key, targets.select(["qkv_proj[q,v]"]))
    saved = jq.save_adapter(tmp_path / "a", adapter, model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved.modules == 2 and config["fan_in_fan_out"] is True
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["c_attn"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    b = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    assert b.shape == (96, 4) and not b[:32, 2:].any() and not b[32:, :2].any()
    assert not b[32:64].any() and b[:32, :2].all() and b[64:, 2:].all()
    again: Any = jq.load_adapter(tmp_path / "a", model)
    np.testing.assert_allclose(again[C_ATTN].delta(), adapter[C_ATTN].delta(), atol=1e-6)
    got, want = (model.apply(jq.attach(model.params, x), TOKENS) for x in (again, adapter))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_whole_modules_and_biases_in_the_format_of_peft(
    model: Any, targets: jq.Targets, key: jax.Array, tmp_path: Path
):
    whole = ["layers/mlp/up_proj/kernel", "layers/mlp/up_proj/bias", "embed_tokens/embedding"]
    adapter = trained(key, targets.select(["qkv_proj"])) | {
        path: x + 0.1 for path, x in jq.train_whole(model.params, whole).items()
    }
    jq.save_adapter(tmp_path / "a", adapter, model)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors["base_model.model.transformer.h.0.mlp.c_fc.weight"].shape == (32, 64)
    again = jq.load_adapter(tmp_path / "a", model)
    assert set(again) == set(adapter)
    for path in whole:
        np.testing.assert_array_equal(again[path], adapter[path])


def test_in_4_bits_its_linears_are_like_any_other(model: Any, tmp_path: Path):
    """Written of a checkpoint and of a loaded model, `[out, in]` in their states; read back."""
    four = Encoding("nf4", 32, True)
    quantize_checkpoint(PATH, tmp_path / "a", encoding=four)
    want = jq.load_model(PATH, block_size=32)
    save_bnb(tmp_path / "b", want.params, want.config, encoding=four)
    for directory in (tmp_path / "a", tmp_path / "b"):
        state = load_file(directory / "model.safetensors")[
            f"transformer.h.1.attn.c_attn.weight{STATE}nf4"
        ]
        assert json.loads(state.tobytes())["shape"] == [96, 32]
        again = jq.load_model(directory)
        assert inspect(directory)["formats"]["nf4"]["tensors"] == 8
        got, exact = (m.apply(m.params, TOKENS) for m in (again, want))
        np.testing.assert_allclose(got, exact, atol=1e-4)


def test_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(tmp_path / "m.gguf"), "--model", str(PATH), "--format", "gguf"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "A gpt2 model cannot be written to GGUF here: expected one of" in message
    assert not list(tmp_path.iterdir())
