# SPDX-License-Identifier: Apache-2.0
import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.interop import adapter_files
from jax_qlora.interop.peft import load_adapter, save_adapter
from jax_qlora.interop.peft_config import PeftConfig, make_config, read_config
from jax_qlora.lora import LoraPair
from tests.helpers import GOLDEN, assert_trees_close, golden
from tests.tiny import quantized, tiny_model

LOADABLE = ["qv_r4", "all_linear_rslora", "patterns", "dora", "modules_to_save"]
KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"


@pytest.fixture(scope="module")
def llama() -> Any:
    return jq.load_model(GOLDEN / "models" / "llama", quantization=None)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def adapter(tiny: Any) -> dict[str, LoraPair]:
    return quantized(tiny)[1]


def copy(name: str, to: Path, **changes: Any) -> Path:
    """A golden adapter with some fields of its configuration changed."""
    shutil.copytree(GOLDEN / "adapters" / name, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | changes))
    return to


def edit(directory: Path, change: Any) -> None:
    """Changes the tensors of an adapter."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def deltas(adapter: dict[str, LoraPair]) -> dict[str, jax.Array]:
    return {path: pair.delta() for path, pair in adapter.items() if isinstance(pair, LoraPair)}


# --- PEFT's own adapters ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADABLE)
def test_an_adapter_of_peft_gives_the_logits_of_peft(llama: Any, name: str):
    want = golden("adapter_outputs.npz")
    adapter = load_adapter(GOLDEN / "adapters" / name, llama)
    tokens, mask = jnp.asarray(want["input_ids"], jnp.int32), want["attention_mask"].astype(bool)
    params = jq.attach(llama.params, adapter)
    got = llama.apply(params, tokens, attention_mask=jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(got)[mask], want[f"{name}/logits"][mask], atol=1e-4)
    assert np.abs(want[f"{name}/logits"] - want["base/logits"])[mask].max() > 0.1


@pytest.mark.parametrize("name", LOADABLE)
def test_a_merged_adapter_of_peft_gives_the_logits_of_peft(llama: Any, name: str):
    want = golden("adapter_outputs.npz")
    adapter = load_adapter(GOLDEN / "adapters" / name, llama)
    tokens, mask = jnp.asarray(want["input_ids"], jnp.int32), want["attention_mask"].astype(bool)
    params = jq.merge(llama.params, adapter)
    got = llama.apply(params, tokens, attention_mask=jnp.asarray(mask))
    np.testing.assert_allclose(
        np.asarray(got)[mask], want[f"{name}/merged_logits"][mask], atol=1e-4
    )
    for key, kernel in want.items():
        prefix, _, parameter = key.partition("/merged/model.layers.")
        if prefix == name and parameter:
            layer, _, path = parameter.removesuffix(".weight").partition(".")
            leaf = params["layers"]
            for part in path.split("."):
                leaf = leaf[part]
            np.testing.assert_allclose(leaf["kernel"][int(layer)].T, kernel, atol=1e-6)


@pytest.mark.parametrize("name", LOADABLE)
def test_an_adapter_of_peft_survives_saving(llama: Any, tmp_path: Path, name: str):
    source = GOLDEN / "adapters" / name
    adapter = load_adapter(source, llama)
    saved = save_adapter(tmp_path / "again", adapter, llama)
    each, beside = (3 if name == "dora" else 2), int(name == "modules_to_save")
    assert saved.modules * each + beside == len(load_file(source / "adapter_model.safetensors"))
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {k: x.shape for k, x in after.items()} == {k: x.shape for k, x in before.items()}
    again = load_adapter(tmp_path / "again", llama)
    assert_trees_close(deltas(again), deltas(adapter), rtol=1e-6, atol=1e-9)
    rest = [{p: getattr(x, "magnitude", x) for p, x in a.items()} for a in (again, adapter)]
    assert_trees_close(*rest)


def test_layers_of_different_rank_share_a_stack(llama: Any):
    adapter = load_adapter(GOLDEN / "adapters" / "patterns", llama)
    tensors = load_file(GOLDEN / "adapters" / "patterns" / "adapter_model.safetensors")
    down = adapter["layers/mlp/down_proj/kernel"]
    assert down.rank == 12
    assert not np.any(down.a[0, 8:]) and not np.any(down.b[0, :, 8:])
    for layer, rank in ((0, 8), (1, 12)):
        a, b = (tensors[KEY.format(layer, "mlp.down_proj", f)] for f in "AB")
        np.testing.assert_allclose(down.delta()[layer].T, 16 / rank * b @ a, rtol=1e-5, atol=1e-6)
    assert adapter["layers/self_attn/q_proj/kernel"].scale == 32 / 2
    assert adapter["layers/mlp/up_proj/kernel"].scale == 4 / 8


# --- our own adapters ------------------------------------------------------------------------


def test_a_saved_adapter_is_read_back_bit_for_bit(tiny: Any, adapter: Any, tmp_path: Path):
    saved = save_adapter(tmp_path / "a", adapter, tiny, base_model="some/model")
    assert_trees_close(load_adapter(tmp_path / "a", tiny), adapter)
    layers = tiny.config.n_layers
    assert saved.modules == 7 * layers and saved.path == tmp_path / "a"
    assert saved.nbytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    norm = math.sqrt(sum(float(jnp.sum(jnp.square(p.b))) for p in adapter.values()))
    assert math.isclose(saved.b_norm, norm, rel_tol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]  # nothing left beside it


def test_the_files_are_those_of_peft(tiny: Any, adapter: Any, tmp_path: Path):
    save_adapter(tmp_path / "a", adapter, tiny, base_model="some/model")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    q = adapter["layers/self_attn/q_proj/kernel"]
    np.testing.assert_array_equal(tensors[KEY.format(1, "self_attn.q_proj", "A")], q.a[1])
    np.testing.assert_array_equal(tensors[KEY.format(1, "self_attn.q_proj", "B")], q.b[1])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 4, False)
    assert config["base_model_name_or_path"] == "some/model"


def test_a_fresh_adapter_can_be_saved(tiny: Any, key: jax.Array, tmp_path: Path):
    targets = jq.find_targets(tiny.apply, tiny.params, jnp.ones((1, 4), jnp.int32))
    fresh = jq.init_adapter(key, targets, rank=3, alpha=5, dropout=0.1)
    assert save_adapter(tmp_path / "a", fresh, tiny).b_norm == 0
    assert_trees_close(load_adapter(tmp_path / "a", tiny), fresh)
    assert read_config(tmp_path / "a").dropout == 0.1


def test_patterns_and_rank_stabilized_scaling_are_written(
    tiny: Any, key: jax.Array, tmp_path: Path
):
    targets = jq.find_targets(tiny.apply, tiny.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(
        key,
        targets,
        rank=3,
        alpha=16,
        rslora=True,
        rank_pattern={"mlp.up_proj": 5},
        alpha_pattern={"q_proj": 7},
    )
    save_adapter(tmp_path / "a", adapter, tiny)
    config = read_config(tmp_path / "a")
    assert config.rslora and (config.rank, config.alpha) == (3, 16)
    assert config.rank_pattern == {r"mlp\.up_proj": 5}
    assert config.alpha_pattern == {r"self_attn\.q_proj": 7}
    assert_trees_close(load_adapter(tmp_path / "a", tiny), adapter)


def test_the_output_head_is_a_module_like_others(tiny: Any, key: jax.Array, tmp_path: Path):
    tokens = jnp.ones((1, 4), jnp.int32)
    targets = jq.find_targets(tiny.apply, tiny.params, tokens, match=["lm_head", "v_proj"])
    adapter = jq.init_adapter(key, targets, rank=2)
    save_adapter(tmp_path / "a", adapter, tiny)
    assert read_config(tmp_path / "a").target_modules == ("lm_head", "v_proj")
    assert_trees_close(load_adapter(tmp_path / "a", tiny), adapter)


def test_layers_without_an_update_are_left_out(tiny: Any, adapter: Any, tmp_path: Path):
    q = adapter["layers/self_attn/q_proj/kernel"]
    only_last = jax.tree.map(lambda x: x.at[:-1].set(0.0), q)
    save_adapter(tmp_path / "a", {"layers/self_attn/q_proj/kernel": only_last}, tiny)
    last = tiny.config.n_layers - 1
    names = (f"model.layers.{last}.self_attn.q_proj",)
    assert read_config(tmp_path / "a").target_modules == names
    assert_trees_close(
        load_adapter(tmp_path / "a", tiny), {"layers/self_attn/q_proj/kernel": only_last}
    )


def test_layers_that_a_dora_adapter_leaves_out(llama: Any, tmp_path: Path):
    whole = load_adapter(GOLDEN / "adapters" / "dora", llama)
    one = copy("dora", tmp_path / "one", layers_to_transform=[1])

    def keep_layer_1(tensors: dict[str, Any]) -> None:
        for name in [k for k in tensors if ".layers.0." in k]:
            del tensors[name]

    edit(one, keep_layer_1)
    part = load_adapter(one, llama)
    merged, both = jq.merge(llama.params, part), jq.merge(llama.params, whole)
    for layer, want in ((0, llama.params), (1, both)):
        kernels = [t["layers"]["mlp"]["down_proj"]["kernel"][layer] for t in (merged, want)]
        np.testing.assert_allclose(*kernels, atol=1e-6)
    path = "layers/mlp/down_proj/kernel"
    with pytest.raises(jq.InputError, match=r"magnitudes \(DoRA\) for some updates and none"):
        plain = dataclasses.replace(whole[path], magnitude=None)
        save_adapter(tmp_path / "mixed", {**whole, path: plain}, llama)


def test_a_quantized_base_takes_the_same_adapter(tiny: Any, adapter: Any, tmp_path: Path):
    model = dataclasses.replace(tiny, params=quantized(tiny)[0])
    save_adapter(tmp_path / "a", adapter, model)
    assert_trees_close(load_adapter(tmp_path / "a", model), adapter)


# --- trees of other libraries ----------------------------------------------------------------


def test_any_tree_saves_under_its_paths(key: jax.Array, tmp_path: Path):
    params = {
        "encoder": {"w": jnp.ones((3, 8, 6)), "kernel": jnp.ones((6, 2, 4))},
        "kernel": jnp.ones((8, 5)),
    }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x[..., : w.shape[0]] @ w @ w.T), None

        x, _ = jax.lax.scan(layer, x, params["encoder"]["w"])
        heads = jnp.einsum("bi,ihd->bhd", x[:, :6], params["encoder"]["kernel"])
        return heads.reshape(2, 8) @ params["kernel"]

    targets = jq.find_targets(apply, params, jnp.ones((2, 8)), match="encoder.*")
    adapter = jq.init_adapter(key, targets, rank=2, rank_pattern={"kernel": 1})
    saved = save_adapter(tmp_path / "a", adapter, targets)
    assert saved.modules == 2
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["encoder.kernel", "encoder.w"]
    assert config["task_type"] is None
    assert_trees_close(load_adapter(tmp_path / "a", targets), adapter)


def test_a_pattern_never_reaches_a_longer_name():
    ranks = {"b.kernel": 2, "a.b.kernel": 3, "c.kernel": 3, "d.kernel": 3}
    config = make_config(ranks, dict.fromkeys(ranks, 1.0), ranks, dropout=0.0)
    assert {m: config.rank_of(m) for m in ranks} == ranks
    assert all(config.scale_of(m) == 1.0 for m in ranks)


# --- which modules a configuration names -----------------------------------------------------

Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
EXPERT = "model.layers.1.experts.0.up"
SELECTIONS = [
    (dict(target_modules=("q_proj",)), Q0, True),
    (dict(target_modules=("self_attn.q_proj",)), Q0, True),
    (dict(target_modules=("proj",)), Q0, False),
    (dict(target_modules=(Q0,)), Q0, True),
    (dict(target_modules=(Q0,)), Q1, False),
    (dict(target_modules=r".*\.q_proj"), Q0, True),
    (dict(target_modules="q_proj"), Q0, False),
    (dict(target_modules="all-linear"), Q0, True),
    (dict(target_modules="all-linear"), "lm_head", False),
    (dict(target_modules=("lm_head",)), "lm_head", True),
    (dict(target_modules=("q_proj",), exclude_modules=("q_proj",)), Q0, False),
    (dict(target_modules=("q_proj",), exclude_modules=r".*\.0\..*"), Q0, False),
    (dict(target_modules=("q_proj",), exclude_modules=r".*\.0\..*"), Q1, True),
    (dict(target_modules=("q_proj",), layers=(1,)), Q0, False),
    (dict(target_modules=("q_proj",), layers=(1,)), Q1, True),
    (dict(target_modules=(Q0,), layers=(1,)), Q0, True),
    (dict(target_modules=("up",), layers=(1,)), EXPERT, True),
    (dict(target_modules=("up",), layers=(0,), layers_pattern=("experts",)), EXPERT, True),
    (dict(target_modules=("up",), layers=(0,), layers_pattern=("h",)), EXPERT, False),
    (dict(target_modules=("q",), layers=(0,)), "layers.0.q", False),
]


@pytest.mark.parametrize(("fields", "name", "expected"), SELECTIONS)
def test_targets_are_chosen_as_peft_does(fields: dict[str, Any], name: str, expected: bool):
    config = PeftConfig(rank=1, alpha=1, **fields)
    assert config.is_target(name, head=name == "lm_head") is expected


def test_targets_by_regex_layers_and_exclusion_load(llama: Any, tmp_path: Path):
    source = GOLDEN / "adapters" / "qv_r4"
    whole = load_adapter(source, llama)
    regex = copy("qv_r4", tmp_path / "regex", target_modules=r".*self_attn\.(q|v)_proj")
    assert_trees_close(load_adapter(regex, llama), whole)
    excluded = copy(
        "qv_r4",
        tmp_path / "excluded",
        target_modules=["q_proj", "k_proj", "v_proj"],
        exclude_modules=["k_proj"],
    )
    assert_trees_close(load_adapter(excluded, llama), whole)
    one = copy("qv_r4", tmp_path / "one", layers_to_transform=[1])

    def keep_layer_1(tensors: dict[str, Any]) -> None:
        for name in [k for k in tensors if ".layers.0." in k]:
            del tensors[name]

    edit(one, keep_layer_1)
    got = load_adapter(one, llama)
    for path, pair in whole.items():
        want = pair.delta().at[0].set(0.0)
        np.testing.assert_array_equal(got[path].delta(), want)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"bias": "some"}, "bias is 'some', expected none, all or lora_only"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [-3]}, r"trainable_token_indices is .*expected token"),
        ({"target_parameters": ["w"]}, "target_parameters 'w', which is no parameter of the model"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"a_field_of_the_future": 1}, "a_field_of_the_future is 1: this field is not known"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which replaces the base"),
        ({"r": 0}, "r gives 0, expected a whole number"),
        ({"r": "8"}, "r is '8', expected int"),
        ({"r": True}, "r is True, expected int"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern gives 2.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha gives nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10+, expected a number that a float can be"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern gives 10+, expected a finite"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern gives 'x'"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": "(q"}, r"'\(q' is no regular expression"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": 0},
            "layers_to_transform with target_modules",
        ),
        ({"target_modules": ["w_1"]}, "not in the model or not a target"),
    ],
)
def test_fields_that_change_the_result(
    llama: Any, tmp_path: Path, changes: dict[str, Any], match: str
):
    with pytest.raises(jq.InputError, match=match):
        load_adapter(copy("qv_r4", tmp_path / "a", **changes), llama)


def test_an_adapter_without_targets(llama: Any, tmp_path: Path):
    path = copy("qv_r4", tmp_path / "a", target_modules=["w_1"])
    edit(path, lambda tensors: tensors.clear())
    with pytest.raises(jq.InputError, match=r"has no target in the model: target_modules \('w_1'"):
        load_adapter(path, llama)


def test_an_adapter_of_another_model_lists_the_differences(tiny: Any, llama: Any, tmp_path: Path):
    with pytest.raises(
        jq.InputError, match=r"of another shape \(8\): model.layers.0.self_attn.q_p"
    ):
        load_adapter(GOLDEN / "adapters" / "qv_r4", tiny)
    source = copy("qv_r4", tmp_path / "a")
    renamed = KEY.format(7, "self_attn.q_proj", "A")

    def rename(tensors: dict[str, Any]) -> None:
        tensors[renamed] = tensors.pop(KEY.format(0, "self_attn.q_proj", "A"))

    edit(source, rename)
    with pytest.raises(
        jq.InputError,
        match=r"missing \(1\): .*layers.0.self_attn.q_proj.*not in the model.*\(1\): .*layers.7",
    ):
        load_adapter(source, llama)


def test_missing_and_damaged_files(llama: Any, tmp_path: Path):
    with pytest.raises(jq.InputError, match="found no such directory"):
        load_adapter(tmp_path / "none", llama)
    (tmp_path / "empty").mkdir()
    with pytest.raises(jq.InputError, match="found a directory without it"):
        load_adapter(tmp_path / "empty", llama)

    path = copy("qv_r4", tmp_path / "json")
    (path / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(jq.InputError, match=r"adapter_config.json is not JSON: .*line 1"):
        load_adapter(path, llama)
    (path / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(jq.InputError, match=r"adapter_config.json is not JSON"):
        load_adapter(path, llama)
    (path / "adapter_config.json").write_text("[1]")
    with pytest.raises(jq.InputError, match="holds a list: expected a JSON object"):
        load_adapter(path, llama)

    path = copy("qv_r4", tmp_path / "pickle")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(jq.InputError, match="found adapter_model.bin, pickles that are not read"):
        load_adapter(path, llama)

    path = copy("qv_r4", tmp_path / "truncated")
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(jq.InputError, match="not a complete safetensors file"):
        load_adapter(path, llama)


def test_values_that_are_no_numbers(llama: Any, tmp_path: Path):
    name = KEY.format(1, "self_attn.v_proj", "B")
    path = copy("qv_r4", tmp_path / "nan")
    edit(path, lambda tensors: tensors[name].__setitem__((0, 0), np.nan))
    with pytest.raises(jq.InputError, match=f"{name} have values that are not finite"):
        load_adapter(path, llama)
    edit(path, lambda tensors: tensors.update({name: np.ones((4, 4), np.int32)}))
    with pytest.raises(jq.InputError, match=f"'{name}' is int32, expected floating point"):
        load_adapter(path, llama)


def test_half_precision_files_are_widened(llama: Any, tmp_path: Path):
    path = copy("qv_r4", tmp_path / "a")

    def round_to(tensors: dict[str, Any]) -> None:
        for name, x in tensors.items():
            tensors[name] = np.asarray(x, jnp.bfloat16)

    edit(path, round_to)
    got = load_adapter(path, llama)
    want = load_adapter(GOLDEN / "adapters" / "qv_r4", llama)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert_trees_close(got, want, rtol=2**-8)


def test_an_adapter_that_cannot_be_saved(tiny: Any, llama: Any, adapter: Any, tmp_path: Path):
    path = tmp_path / "a"
    with pytest.raises(jq.InputError, match="is for a kernel .*the model's is"):
        save_adapter(path, adapter, llama)
    pair = adapter["layers/self_attn/q_proj/kernel"]
    with pytest.raises(jq.InputError, match="updates of layers/mlp/up/kernel, which are no lin"):
        save_adapter(path, {"layers/mlp/up/kernel": pair}, tiny)
    zero = jax.tree.map(jnp.zeros_like, pair)
    with pytest.raises(jq.InputError, match="changes nothing"):
        save_adapter(path, {"layers/self_attn/q_proj/kernel": zero}, tiny)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), pair)
    with pytest.raises(jq.InputError, match="layers.0.self_attn.q_proj' has values that are not"):
        save_adapter(path, {"layers/self_attn/q_proj/kernel": bad}, tiny)
    assert not any(tmp_path.iterdir())


# --- nothing on disk is damaged --------------------------------------------------------------


def test_an_adapter_is_replaced_and_other_files_stay(tiny: Any, adapter: Any, tmp_path: Path):
    path = tmp_path / "a"
    save_adapter(path, adapter, tiny)
    (path / "README.md").write_text("mine")
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    save_adapter(path, doubled, tiny)
    assert_trees_close(load_adapter(path, tiny), doubled)
    assert (path / "README.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_full_disk_leaves_the_old_adapter(
    tiny: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    save_adapter(path, adapter, tiny)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(jq.InputError, match="cannot be written: No space left"):
        save_adapter(path, jax.tree.map(lambda x: 2 * x, adapter), tiny)
    assert_trees_close(load_adapter(path, tiny), adapter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_file_that_reads_back_differently(
    tiny: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def flip(file: Path, tensors: Any, metadata: Any) -> None:
        save_file({name: x.make() + 1 for name, x in tensors.items()}, file)

    monkeypatch.setattr(adapter_files, "write_file", flip)
    with pytest.raises(jq.InputError, match="what was read back differs"):
        save_adapter(tmp_path / "a", adapter, tiny)
    assert not any(tmp_path.iterdir())


def test_a_swap_that_fails_halfway(
    tiny: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    save_adapter(path, adapter, tiny)
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(jq.InputError, match="Input/output error"):
        save_adapter(path, jax.tree.map(lambda x: 2 * x, adapter), tiny)
    assert_trees_close(load_adapter(path, tiny), adapter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_other_files_are_kept_before_the_swap(
    tiny: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is moved one by one after it, which could fail halfway."""
    path = tmp_path / "a"
    save_adapter(path, adapter, tiny)
    (path / "notes").mkdir()
    (path / "notes" / "a.txt").write_text("mine")
    (path / "link").symlink_to("notes")
    rename = os.rename

    def directories_only(source: Any, target: Any) -> None:
        if Path(target).parent == path:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", directories_only)
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    save_adapter(path, doubled, tiny)
    assert_trees_close(load_adapter(path, tiny), doubled)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_files.shutil, "copy2", full)
    with pytest.raises(jq.InputError, match="No space left"):
        save_adapter(path, adapter, tiny)
    assert_trees_close(load_adapter(path, tiny), doubled)
    assert (path / "notes" / "a.txt").read_text() == "mine" and (path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_file_where_the_directory_should_be(tiny: Any, adapter: Any, tmp_path: Path):
    (tmp_path / "a").write_text("something")
    with pytest.raises(jq.InputError, match="is a file: expected a directory"):
        save_adapter(tmp_path / "a", adapter, tiny)
    assert (tmp_path / "a").read_text() == "something"
