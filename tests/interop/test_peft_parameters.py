# SPDX-License-Identifier: Apache-2.0
"""Updates of experts and routers in PEFT's format: parameters of transformers 5, modules of 4."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.interop.combine import combine_adapter_files
from jax_qlora.interop.peft_config import read_config
from jax_qlora.lora.combine_factors import Settings
from tests.helpers import GOLDEN, assert_trees_close, golden
from tests.lift.cases import random_adapter
from tests.tiny import tiny_model

PREFIX = "base_model.model.model.layers."
GATE, UP, DOWN = (f"layers/mlp/experts/{p}_proj/kernel" for p in ("gate", "up", "down"))
EXPERTS = 3


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def model(request: Any) -> Any:
    return tiny_model(family=request.param, n_experts=EXPERTS, experts_per_token=2)


@pytest.fixture(scope="module")
def targets(model: Any) -> Any:
    return jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))


def tensors_of(path: Path) -> dict[str, Any]:
    return load_file(path / "adapter_model.safetensors")


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


def write(path: Path, tensors: dict[str, Any], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def peft_delta(tensors: dict[str, Any], stem: str, scale: float) -> np.ndarray:
    """`ParamWrapper.get_delta_weight`: the update `[experts, out, in]`."""
    a, b = (tensors[f"{stem}.lora_{f}.weight"] for f in "AB")
    a = a.reshape(EXPERTS, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, EXPERTS)
    return scale * np.einsum("ore,eri->eoi", b, a)


def test_experts_are_parameters_and_come_back_to_the_bit(model: Any, targets: Any, tmp_path: Path):
    adapter = random_adapter(targets, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 2})
    saved = jq.save_adapter(tmp_path / "a", adapter, model)
    layers = model.config.n_layers
    assert saved.modules == 6 * layers  # four of attention, two parameters
    tensors, config = tensors_of(tmp_path / "a"), read_config(tmp_path / "a")
    d, ff = model.config.d_model, model.config.d_ff
    inner, outer = f"{PREFIX}1.mlp.experts.base_layer", f"{PREFIX}1.mlp.experts"
    assert tensors[f"{inner}.lora_A.weight"].shape == (EXPERTS * 5, d)
    assert tensors[f"{inner}.lora_B.weight"].shape == (2 * ff, 5 * EXPERTS)
    assert tensors[f"{outer}.lora_A.weight"].shape == (EXPERTS * 3, ff)
    assert tensors[f"{outer}.lora_B.weight"].shape == (d, 3 * EXPERTS)
    assert config.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert config.target_parameters == ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert (config.rank_of(name), config.rank_of("model.layers.1.self_attn.q_proj")) == (5, 3)
    delta = peft_delta(tensors, inner, config.scale_of(name))
    want = [np.swapaxes(adapter[p].delta()[1], -1, -2) for p in (GATE, UP)]
    np.testing.assert_allclose(delta, np.concatenate(want, 1), atol=1e-6)
    assert_trees_close(jq.load_adapter(tmp_path / "a", model), adapter)


@pytest.mark.parametrize("paths", [[GATE], [UP], [DOWN], [UP, DOWN]])
def test_some_projections_of_some_layers(model: Any, targets: Any, paths: Any, tmp_path: Path):
    whole = random_adapter(targets, dropout=0.1)
    adapter = {p: jax.tree.map(lambda x: x.at[0].set(0.0), whole[p]) for p in paths}
    # an expert without an update, and one of a lower rank
    adapter = jax.tree.map(lambda x: x.at[1, 0].set(0.0), adapter)
    adapter = {
        p: dataclasses.replace(x, a=x.a.at[1, 1, 2:].set(0.0), b=x.b.at[1, 1, :, 2:].set(0.0))
        for p, x in adapter.items()
    }
    jq.save_adapter(tmp_path / "a", adapter, model)
    config = read_config(tmp_path / "a")
    assert config.target_modules == () and config.dropout == 0  # PEFT has none for parameters
    assert all(name.startswith("model.layers.") for name in config.target_parameters)
    stems = {k.partition(".lora_")[0] for k in tensors_of(tmp_path / "a")}
    assert f"{PREFIX}0.mlp.experts" not in stems
    assert (f"{PREFIX}1.mlp.experts.base_layer" in stems) == (len(paths) == 2)
    back = jq.load_adapter(tmp_path / "a", model)
    assert_trees_close(back, {p: dataclasses.replace(x, dropout=0.0) for p, x in adapter.items()})


def test_scales_that_differ_and_a_router(model: Any, targets: Any, tmp_path: Path):
    chosen = targets.select(["gate", "gate_proj", "up_proj"])
    router = "layers/mlp/gate/kernel"
    assert router in chosen
    adapter = random_adapter(chosen, alpha_pattern={"up_proj": 6, "gate_proj": 3})
    jq.save_adapter(tmp_path / "a", adapter, model)
    assert config_of(tmp_path / "a")["target_parameters"] == [
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    ]
    a = tensors_of(tmp_path / "a")[f"{PREFIX}2.mlp.gate.lora_A.weight"]
    np.testing.assert_array_equal(a, adapter[router].a[2])
    back = jq.load_adapter(tmp_path / "a", model)
    assert back.keys() == adapter.keys()
    for path, pair in back.items():
        np.testing.assert_allclose(pair.delta(), adapter[path].delta(), atol=1e-6)


def test_an_update_without_blocks_becomes_two(model: Any, tmp_path: Path):
    layers, d, ff = (getattr(model.config, f) for f in ("n_layers", "d_model", "d_ff"))
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(layers):
        stem = f"{PREFIX}{i}.mlp.experts"
        tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((EXPERTS * 2, d)).astype("f")
        tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((2 * ff, 2 * EXPERTS)).astype("f")
    write(tmp_path / "a", tensors, target_modules=[], target_parameters=["gate_up_proj"])
    adapter = jq.load_adapter(tmp_path / "a", model)
    assert sorted(adapter) == sorted([GATE, UP]) and adapter[GATE].rank == adapter[UP].rank == 2
    for i in range(layers):
        want = peft_delta(tensors, f"{PREFIX}{i}.mlp.experts", 2.0)
        for path, part in zip((GATE, UP), np.split(want, 2, 1), strict=True):
            got = np.swapaxes(adapter[path].delta()[i], -1, -2)
            np.testing.assert_allclose(got, part, atol=1e-5)
    # an untrained one keeps its rank
    for name in tensors:
        tensors[name] *= "lora_A" in name
    write(tmp_path / "b", tensors, target_modules=[], target_parameters=["gate_up_proj"])
    assert jq.load_adapter(tmp_path / "b", model)[UP].rank == 2


def test_dora_of_experts_has_the_names_of_transformers_4(model: Any, targets: Any, tmp_path: Path):
    adapter = jq.add_magnitudes(model.params, random_adapter(targets))
    jq.save_adapter(tmp_path / "a", adapter, model)
    names = {
        "mixtral": "block_sparse_moe.experts.2.w2",
        "qwen3_moe": "mlp.experts.2.down_proj",
    }
    key = f"{PREFIX}1.{names[model.config.family]}.lora_magnitude_vector"
    np.testing.assert_array_equal(tensors_of(tmp_path / "a")[key], adapter[DOWN].magnitude[1, 2])
    assert config_of(tmp_path / "a")["target_parameters"] is None
    assert_trees_close(jq.load_adapter(tmp_path / "a", model), adapter)


def test_the_names_of_transformers_4_are_read(model: Any, targets: Any, tmp_path: Path):
    """A router, and the experts one by one."""
    adapter = random_adapter(targets.select(["gate", "gate_proj", "up_proj", "down_proj"]))
    mixtral = model.config.family == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    names = dict(zip((GATE, UP, DOWN), ("w1", "w3", "w2"), strict=True)) if mixtral else {}
    tensors = {}
    for path, pair in adapter.items():
        own = names.get(path, path.split("/")[-2])
        for index in np.ndindex(*pair.lead):
            middle = f"experts.{index[1]}.{own}" if len(index) == 2 else own
            stem = f"{PREFIX}{index[0]}.{block}.{middle}"
            tensors[f"{stem}.lora_A.weight"] = np.asarray(pair.a[index])
            tensors[f"{stem}.lora_B.weight"] = np.asarray(pair.b[index])
    modules = ["gate", *(names.get(p, p.split("/")[-2]) for p in (GATE, UP, DOWN))]
    write(tmp_path / "a", tensors, r=3, lora_alpha=3, target_modules=modules)
    assert_trees_close(jq.load_adapter(tmp_path / "a", model), adapter)


@pytest.mark.parametrize("name", ["mixtral_experts", "qwen3_moe_experts"])
def test_an_adapter_of_peft_gives_the_logits_of_peft(name: str, tmp_path: Path):
    base = name.removesuffix("_experts")
    model = jq.load_model(GOLDEN / "models" / base, quantization=None)
    adapter = jq.load_adapter(GOLDEN / "adapters" / name, model)
    known = golden("family_outputs.npz")
    ids = jnp.asarray(known[f"{base}/input_ids"], jnp.int32)
    want = golden("expert_outputs.npz")[name]
    got = np.asarray(model.apply(jq.attach(model.params, adapter), ids))
    np.testing.assert_allclose(got, want, atol=2e-4)
    plain = np.asarray(model.apply(model.params, ids))
    assert np.abs(want - plain).max() > 0.1
    # and saved here it is the same adapter
    jq.save_adapter(tmp_path / "a", adapter, model)
    back = jq.load_adapter(tmp_path / "a", model)
    for path, pair in back.items():
        np.testing.assert_allclose(pair.delta(), adapter[path].delta(), atol=1e-6)


def test_parameters_that_cannot_be_read(model: Any, targets: Any, tmp_path: Path):
    adapter = random_adapter(targets.select(["down_proj"]))
    jq.save_adapter(tmp_path / "a", adapter, model)
    tensors, config = tensors_of(tmp_path / "a"), config_of(tmp_path / "a")
    cases = [
        ({"target_parameters": ["experts.up_proj"]}, "'experts.up_proj', which is no parameter of"),
        ({"use_dora": True}, "target_parameters and use_dora: expected one of the two"),
        ({"r": 4}, r"of another shape \(6\): .*expected \(12, \d+\), found \(9, \d+\)"),
        ({"target_parameters": ["gate.weight"]}, "missing"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj', expected list"),
    ]
    for i, (changes, match) in enumerate(cases):
        path = write(tmp_path / str(i), tensors, **{**config, **changes})
        with pytest.raises(jq.InputError, match=match):
            jq.load_adapter(path, model)
    paths = [tmp_path / "a", write(tmp_path / "other", tensors, **config)]
    with pytest.raises(jq.InputError, match="has updates of parameters .*PEFT combines no others"):
        combine_adapter_files(tmp_path / "c", paths, [1.0, 1.0], Settings(method="linear"))
