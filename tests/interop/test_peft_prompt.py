# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens in PEFT's files; that PEFT computes the same is in tests/reference."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.hf import tensor_names
from tests.tiny import quantized, tiny_model

STARTS = {"PROMPT_TUNING": jq.init_prompt, "PREFIX_TUNING": jq.init_prefix}
WIDTHS = {"PROMPT_TUNING": 32, "PREFIX_TUNING": 2 * 2 * 2 * 8}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(n_layers=2)


def virtual_of(kind: str, model: Any) -> Any:
    return STARTS[kind](jax.random.key(0), model, tokens=4, init="random")


def changed(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", STARTS)
def test_what_is_written_is_read_back(model: Any, tmp_path: Path, kind: str):
    virtual = virtual_of(kind, model)
    saved = jq.save_adapter(tmp_path / "a", virtual, model, base_model="some/model")
    assert (saved.virtual_tokens, saved.modules) == (4, 0)
    document = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert document["peft_type"] == kind and document["num_virtual_tokens"] == 4
    matrix = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: x.shape for name, x in matrix.items()} == {"prompt_embeddings": (4, WIDTHS[kind])}
    back = jq.load_adapter(tmp_path / "a", model)
    assert back.keys() == virtual.keys()
    for path, entry in virtual.items():
        np.testing.assert_array_equal(back[path].values, entry.values)


def test_a_row_of_a_prefix_is_key_then_value_of_each_layer(model: Any, tmp_path: Path):
    prefix = virtual_of("PREFIX_TUNING", model)
    jq.save_adapter(tmp_path / "a", prefix, model)
    row = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"][3]
    k, v = (np.asarray(prefix[f"layers/self_attn/prefix/{x}"].values)[:, 3] for x in "kv")
    want = np.concatenate([k[0].ravel(), v[0].ravel(), k[1].ravel(), v[1].ravel()])
    np.testing.assert_array_equal(row, want)


def test_beside_lora_they_are_an_adapter_of_their_own(model: Any, tmp_path: Path):
    _, lora = quantized(model)
    prompt = virtual_of("PROMPT_TUNING", model)
    with pytest.raises(InputError, match="expected one of the two, as PEFT has them"):
        jq.save_adapter(tmp_path / "a", lora | prompt, model)
    jq.save_adapter(tmp_path / "lora", lora, model)
    jq.save_adapter(tmp_path / "prompt", prompt, model)
    both = jq.load_adapter(tmp_path / "lora", model) | jq.load_adapter(tmp_path / "prompt", model)
    assert both.keys() == lora.keys() | prompt.keys()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another width": (dict(token_dim=64), "token_dim is 64, the model's is 32"),
    "another depth": (dict(num_layers=3), "num_layers is 3, the model's is 2"),
    "no count": (dict(num_virtual_tokens=None), "num_virtual_tokens is None, expected a whole"),
    "another count": (dict(num_virtual_tokens=5), r"expected one tensor, .*\(5, 32\), found"),
    "two models": (dict(num_transformer_submodules=2), "num_transformer_submodules is 2, expected"),
    "more that trains": (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "another kind": (dict(peft_type="CPT"), "peft_type is 'CPT', expected 'LORA'"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(model: Any, tmp_path: Path, what: str):
    fields, message = BAD[what]
    jq.save_adapter(tmp_path / "a", virtual_of("PROMPT_TUNING", model), model)
    changed(tmp_path / "a", **fields)
    with pytest.raises(InputError, match=message):
        jq.load_adapter(tmp_path / "a", model)


def test_values_that_are_not_finite_are_neither_written_nor_read(model: Any, tmp_path: Path):
    prompt = virtual_of("PROMPT_TUNING", model)
    broken = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), prompt)
    with pytest.raises(InputError, match="training diverged"):
        jq.save_adapter(tmp_path / "a", broken, model)
    assert not (tmp_path / "a").exists()
    jq.save_adapter(tmp_path / "a", prompt, model)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": np.asarray(broken["prompt"].values)}, file)
    with pytest.raises(InputError, match="not finite"):
        jq.load_adapter(tmp_path / "a", model)


@pytest.mark.parametrize("path", ["prompt", "layers/self_attn/prefix/k"])
def test_no_file_of_weights_has_a_place_for_them(model: Any, path: str):
    with pytest.raises(InputError, match="virtual tokens have no place among the weights"):
        tensor_names(path, model.config)


def test_another_tree_has_no_virtual_tokens(model: Any, tmp_path: Path):
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    prompt = virtual_of("PROMPT_TUNING", model)
    with pytest.raises(InputError, match="expected the Model that they are for"):
        jq.save_adapter(tmp_path / "a", prompt, targets)
    jq.save_adapter(tmp_path / "a", prompt, model)
    with pytest.raises(InputError, match="expected the Model that they are for"):
        jq.load_adapter(tmp_path / "a", targets)
