# SPDX-License-Identifier: Apache-2.0
"""What trains beside updates: written and read back, and what cannot be said in PEFT's format."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.interop.peft import load_adapter, save_adapter
from jax_qlora.interop.peft_config import read_config
from tests.helpers import assert_trees_close, normal
from tests.tiny import tiny_model

TOKENS = jnp.ones((1, 4), jnp.int32)
EMBEDDING = "embed_tokens/embedding"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model()


def changed(adapter: Any) -> Any:
    return jax.tree.map(lambda x: x + 0.1 * normal(x.shape, x.size), adapter)


def adapter_of(model: Any, match: Any, **options: Any) -> Any:
    targets = jq.find_targets(model.apply, model.params, TOKENS, match=match)
    return jq.init_adapter(jax.random.key(0), targets, rank=2, alpha=4, **options)


def four_bits_everywhere(model: Any) -> Any:
    targets = jq.find_targets(model.apply, model.params, TOKENS, match=["embed_tokens"])
    return jq.quantize(model.params, targets, block_size=32)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.parametrize("tied", [False, True])
def test_an_update_of_the_embedding(tmp_path: Path, tied: bool):
    model = tiny_model(tied=tied)
    adapter = changed(adapter_of(model, ["embed_tokens", "q_proj"]))
    save_adapter(tmp_path / "a", adapter, model)
    assert_trees_close(load_adapter(tmp_path / "a", model), adapter)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    np.testing.assert_array_equal(tensors[name + "A"].T, adapter[EMBEDDING].b)
    np.testing.assert_array_equal(tensors[name + "B"].T, adapter[EMBEDDING].a)
    assert config_of(tmp_path / "a")["ensure_weight_tying"] is tied
    assert ("base_model.model.lm_head.lora_A.weight" in tensors) is tied
    if tied:
        config = config_of(tmp_path / "a") | {"ensure_weight_tying": False}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(jq.InputError, match="changes the tied embedding without ensure_weight"):
            load_adapter(tmp_path / "a", model)


def test_an_embedding_saved_beside_its_update(tiny: Any, tmp_path: Path):
    adapter = changed(adapter_of(tiny, ["embed_tokens"]))
    save_adapter(tmp_path / "a", adapter, tiny)
    file = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    own = np.asarray(tiny.params["embed_tokens"]["embedding"])
    save_file(load_file(file) | {key: own}, file)
    assert_trees_close(load_adapter(tmp_path / "a", tiny), adapter)
    save_file(load_file(file) | {key: own + 1}, file)
    for params in (jax.eval_shape(lambda: tiny.params), four_bits_everywhere(tiny)):
        model = replace(tiny, params=params)
        assert_trees_close(load_adapter(tmp_path / "a", model), adapter)
    with pytest.raises(jq.InputError, match="carries a weight .* that is not the model's"):
        load_adapter(tmp_path / "a", tiny)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules(tmp_path: Path, tied: bool):
    model = tiny_model(tied=tied)
    paths = ["layers/input_layernorm/scale", "norm/scale", EMBEDDING]
    paths += [] if tied else ["lm_head/kernel"]
    adapter = adapter_of(model, ["q_proj"]) | changed(jq.train_whole(model.params, paths))
    save_adapter(tmp_path / "a", adapter, model)
    config = read_config(tmp_path / "a")
    assert config.tied is tied
    assert ("lm_head" in config.modules_to_save) is not tied
    assert "model.layers.1.input_layernorm" in config.modules_to_save
    assert_trees_close(load_adapter(tmp_path / "a", model), adapter)


def test_a_layer_that_is_left_out_keeps_the_bases_weight(tiny: Any, tmp_path: Path):
    path = "layers/input_layernorm/scale"
    adapter = adapter_of(tiny, ["q_proj"]) | changed(jq.train_whole(tiny.params, [path]))
    save_adapter(tmp_path / "a", adapter, tiny)
    config, file = config_of(tmp_path / "a"), tmp_path / "a" / "adapter_model.safetensors"
    config["modules_to_save"] = ["model.layers.1.input_layernorm"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(file)
    for i in (0, 2):
        del tensors[f"base_model.model.model.layers.{i}.input_layernorm.weight"]
    save_file(tensors, file)
    got = load_adapter(tmp_path / "a", tiny)[path]
    np.testing.assert_array_equal(got[1], adapter[path][1])
    np.testing.assert_array_equal(got[0], tiny.params["layers"]["input_layernorm"]["scale"][0])
    shapes = replace(tiny, params=jax.eval_shape(lambda: tiny.params))
    with pytest.raises(jq.InputError, match=r"input_layernorm/scale'.* found shapes alone"):
        load_adapter(tmp_path / "a", shapes)


def test_magnitudes_of_some_layers_need_the_weights(tiny: Any, tmp_path: Path):
    adapter = jq.add_magnitudes(tiny.params, adapter_of(tiny, ["q_proj"]))
    save_adapter(tmp_path / "a", adapter, tiny)
    config, file = config_of(tmp_path / "a"), tmp_path / "a" / "adapter_model.safetensors"
    config["target_modules"] = ["model.layers.1.self_attn.q_proj"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: x for k, x in load_file(file).items() if ".layers.1." in k}, file)
    path = "layers/self_attn/q_proj/kernel"
    got = load_adapter(tmp_path / "a", tiny)[path].magnitude
    np.testing.assert_allclose(got, adapter[path].magnitude, rtol=1e-6)
    shapes = replace(tiny, params=jax.eval_shape(lambda: tiny.params))
    with pytest.raises(jq.InputError, match=r"q_proj/kernel'.* found shapes alone"):
        load_adapter(tmp_path / "a", shapes)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases(tmp_path: Path, bias: str):
    model = tiny_model(qkv_bias=True)
    names = {"all": ["q_proj", "k_proj", "v_proj"], "lora_only": ["q_proj", "v_proj"]}[bias]
    paths = [f"layers/self_attn/{name}/bias" for name in names]
    adapter = changed(adapter_of(model, ["q_proj", "v_proj"]))
    adapter |= changed(jq.train_whole(model.params, paths))
    save_adapter(tmp_path / "a", adapter, model)
    assert read_config(tmp_path / "a").bias == bias
    assert_trees_close(load_adapter(tmp_path / "a", model), adapter)
    del adapter[paths[0]]
    with pytest.raises(jq.InputError, match=r"trains \d of \d biases: expected all, or those of"):
        save_adapter(tmp_path / "b", adapter, model)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens(tmp_path: Path, tied: bool):
    model = tiny_model(tied=tied)
    match = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    targets = jq.find_targets(model.apply, model.params, TOKENS, match=match)
    rows = {p: jq.train_tokens(model.params, t, [3, 95, 7]) for p, t in targets.items()}
    base = model.apply(model.params, TOKENS)
    np.testing.assert_allclose(model.apply(jq.attach(model.params, rows), TOKENS), base, atol=1e-5)
    adapter = adapter_of(model, ["q_proj"]) | changed(rows)
    save_adapter(tmp_path / "a", adapter, model)
    assert read_config(tmp_path / "a").tokens[match[0]] == (3, 95, 7)
    assert_trees_close(load_adapter(tmp_path / "a", model), adapter)
    merged = jq.merge(model.params, adapter)
    tokens = jnp.array([[3, 1, 95]])
    want = model.apply(jq.attach(model.params, adapter), tokens)
    np.testing.assert_allclose(model.apply(merged, tokens), want, atol=1e-4)
    assert float(jnp.abs(want - model.apply(model.params, tokens)).max()) > 0.01


def test_what_cannot_be_said(tiny: Any, tmp_path: Path):
    adapter = adapter_of(tiny, ["q_proj"])
    model = tiny_model(qkv_bias=True)
    kernel = jq.train_whole(model.params, ["layers/self_attn/k_proj/kernel"])
    with pytest.raises(jq.InputError, match="expected all weights of a module"):
        save_adapter(tmp_path / "a", adapter | kernel, model)
    bad = {"norm/scale": tiny.params["norm"]["scale"].at[0].set(jnp.inf)}
    with pytest.raises(jq.InputError, match="norm.weight have values that are not finite"):
        save_adapter(tmp_path / "a", adapter | bad, tiny)
    magnitudes = jq.add_magnitudes(tiny.params, adapter_of(tiny, ["embed_tokens"]))
    with pytest.raises(jq.InputError, match="DoRA adapter of the embedding"):
        save_adapter(tmp_path / "a", magnitudes, tiny)
    targets = jq.find_targets(tiny.apply, tiny.params, TOKENS, match=["embed_tokens"])
    for indices in ([1, 1], [96], [-1]):
        with pytest.raises(jq.InputError, match=r"expected distinct numbers in \[0, 96\)"):
            jq.train_tokens(tiny.params, targets[EMBEDDING], indices)
    with pytest.raises(jq.InputError, match="not in the parameters: norm/weight"):
        jq.train_whole(tiny.params, ["norm/weight"])
    wrong = {"norm/scale": jnp.ones(7)}
    with pytest.raises(jq.InputError, match="is for a kernel of shape"):
        jq.attach(tiny.params, wrong)
    with pytest.raises(jq.InputError, match="was replaced by a trained weight"):
        jq.unmerge(tiny.params, {"norm/scale": tiny.params["norm"]["scale"]})
    with pytest.raises(jq.InputError, match="has no update beside norm/scale: PEFT's format"):
        save_adapter(tmp_path / "a", {"norm/scale": tiny.params["norm"]["scale"]}, tiny)
    assert not any(tmp_path.iterdir())


def test_whole_experts_keep_their_layer_and_number(tmp_path: Path):
    model = tiny_model(family="mixtral", n_experts=2, experts_per_token=1)
    path = "layers/mlp/experts/gate_proj/kernel"
    adapter = adapter_of(model, ["q_proj"]) | changed(jq.train_whole(model.params, [path]))
    save_adapter(tmp_path / "a", adapter, model)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.w1"
    np.testing.assert_array_equal(tensors[stem.format(2, 1) + ".weight"].T, adapter[path][2, 1])
    assert_trees_close(load_adapter(tmp_path / "a", model), adapter)
    # only some are saved: the others keep the base's
    config, kept = config_of(tmp_path / "a"), [(1, 0), (2, 0), (2, 1)]
    names = [stem.format(*index).removeprefix("base_model.model.") for index in kept]
    config["modules_to_save"] = names
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    names = [f"base_model.model.{name}.weight" for name in names]
    tensors = {k: x for k, x in tensors.items() if ".experts." not in k or k in names}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    want = np.array(model.params["layers"]["mlp"]["experts"]["gate_proj"]["kernel"])
    for index in kept:
        want[index] = adapter[path][index]
    np.testing.assert_array_equal(load_adapter(tmp_path / "a", model)[path], want)
