# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.bnb_write import save_bnb
from jax_qlora.interop.gguf_write import save_gguf
from jax_qlora.interop.hf_config import config_to_hf
from jax_qlora.interop.hf_write import save_hf
from jax_qlora.interop.load_params import Encoding
from jax_qlora.interop.model_card import Origin, model_card
from jax_qlora.interop.output import new_file
from jax_qlora.interop.probe import compare_logits, probe_fits
from jax_qlora.models.presets import TINY
from tests.helpers import GOLDEN, assert_trees_close, golden
from tests.tiny import quantized, tiny_model

MODELS = GOLDEN / "models"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model()


def test_export_is_the_inverse_of_import(tmp_path: Path):
    model = jq.load_model(MODELS / "llama", quantization=None)
    saved = save_hf(tmp_path / "out", model.params, model.config, tokenizer=model.tokenizer)
    out = saved.path
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
    assert (saved.tensors, saved.updates) == (len(want), 0)
    assert saved.nbytes == sum(x.nbytes for x in want.values())
    assert saved.files == {"model.safetensors": (out / "model.safetensors").stat().st_size}


def test_export_merges_layer_by_layer(tmp_path: Path):
    """A quantized base with an adapter is written as `merge` would make it, sharded and in bf16."""
    model = tiny_model(tied=True)
    base, adapter = quantized(model)
    calls: list[tuple[int, int]] = []
    saved = save_hf(
        tmp_path / "merged",
        jq.attach(base, adapter),
        model.config,
        dtype=jnp.bfloat16,
        max_shard_bytes=30_000,
        progress=lambda done, total: calls.append((done, total)),
    )
    out = saved.path
    assert saved.updates == 7 * model.config.n_layers
    assert calls == [(i, saved.tensors) for i in range(1, saved.tensors + 1)]
    assert len(saved.files) > 1 and max(saved.files.values()) < 30_000 + 2_000  # and a header
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = jq.load_model(out, quantization=None)
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jq.merge(base, adapter))
    assert_trees_close(again.params, want, rtol=2**-8)
    assert again.config == model.config


def test_export_refuses_to_overwrite(tmp_path: Path, tiny: Any):
    model = tiny
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is in use: expected a new or an empty place"):
        save_hf(tmp_path, model.params, model.config)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="is not overwritten: expected a model's directory"):
        save_hf(tmp_path, model.params, model.config, overwrite=True)
    (tmp_path / "empty").mkdir()
    out = save_hf(tmp_path / "empty", model.params, model.config).path
    first = load_file(out / "model.safetensors")["model.norm.weight"]
    (out / "notes.txt").write_text("of the old one")
    params = model.params | {"norm": {"scale": 2 * model.params["norm"]["scale"]}}
    with pytest.raises(InputError, match="say --overwrite"):
        save_hf(out, params, model.config)
    broken = params | {"norm": {"scale": params["norm"]["scale"] * jnp.inf}}
    with pytest.raises(InputError, match="not finite"):
        save_hf(out, broken, model.config, overwrite=True)
    assert (out / "notes.txt").exists()  # what was there is as it was
    save_hf(out, params, model.config, overwrite=True)
    np.testing.assert_array_equal(
        load_file(out / "model.safetensors")["model.norm.weight"], 2 * first
    )
    assert not (out / "notes.txt").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "notes.txt"]
    with pytest.raises(InputError, match="is a file: expected a directory"):
        save_hf(tmp_path / "notes.txt", params, model.config, overwrite=True)


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
    with pytest.raises(InputError, match="llama config.json cannot say out_bias = False"):
        config_to_hf(biased, dtype="float32")


def test_export_into_a_place_that_cannot_be(tmp_path: Path, tiny: Any):
    model = tiny
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        save_hf(tmp_path / "file" / "out", model.params, model.config)


def test_export_holds_less_than_two_files(tmp_path: Path):
    """Of a model of 20 files, in float32 and in this process's NumPy; one layer is dense in jax.

    Files are large enough (720 kB) that Python's own objects, some 100 kB of them, do not decide.
    """
    model = tiny_model(d_model=256, d_ff=512, n_layers=8)
    base, adapter = quantized(model)
    params = jq.attach(base, adapter)
    shard = 800_000
    save_hf(tmp_path / "warm", params, model.config)  # compiles
    tracemalloc.start()
    saved = save_hf(tmp_path / "out", params, model.config, max_shard_bytes=shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(saved.files) >= 20 and saved.nbytes > 15 * shard
    assert peak < 2 * max(saved.files.values())


@pytest.mark.parametrize("format", ["bnb", "gguf-f32", "gguf-q8_0"])
def test_other_formats_hold_less_than_two_such_files_either(tmp_path: Path, format: str):
    """Of NumPy's memory, while tensors are written; a GGUF file is one, of many times the size."""
    tokenizer = jq.load_model(MODELS / "llama").tokenizer
    model = tiny_model(d_model=128, d_ff=256, n_layers=8, vocab_size=320)
    base, adapter = quantized(model)
    params = jq.attach(base, adapter)
    shard, held = 60_000, []
    numpy = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)

    def progress(done: int, total: int) -> None:
        if done % (total // 10) == 0:
            traces = tracemalloc.take_snapshot().filter_traces([numpy]).statistics("filename")
            held.append(sum(trace.size for trace in traces))

    tracemalloc.start()
    ballast = np.ones(1000)  # so that something is seen
    if format == "bnb":
        saved = save_bnb(
            tmp_path / "out",
            params,
            model.config,
            encoding=Encoding("nf4", 64, True),
            max_shard_bytes=shard,
            progress=progress,
        )
    else:
        saved = save_gguf(
            tmp_path / "out.gguf",
            params,
            model.config,
            kind=format.removeprefix("gguf-"),
            tokenizer=tokenizer,
            progress=progress,
        )
    tracemalloc.stop()
    assert saved.nbytes > 8 * shard and len(held) >= 10
    assert ballast.nbytes <= min(held) and max(held) < 2 * shard


def test_updates_that_are_zero_are_not_counted(tmp_path: Path):
    model = tiny_model()
    base, adapter = quantized(model)
    path = "layers/mlp/up_proj/kernel"
    pair = dataclasses.replace(adapter[path], b=adapter[path].b.at[1].set(0.0))
    params = jq.attach(base, {path: pair})
    assert save_hf(tmp_path / "out", params, model.config).updates == model.config.n_layers - 1


def test_a_merged_model_is_compared_with_the_one_it_was_made_of(tmp_path: Path):
    model = jq.load_model(MODELS / "llama")
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, alpha=4)
    params = jq.attach(model.params, jax.tree.map(lambda x: x + 0.05, adapter))
    out = save_hf(tmp_path / "out", params, model.config).path
    probe = compare_logits(model, params, out)
    assert probe.difference < 1e-4 * probe.largest
    assert compare_logits(model, model.params, out).difference > 0.1  # without the adapter
    assert probe_fits(model, 4) and not probe_fits(model, 10**12)


@pytest.mark.parametrize("name", ["all_linear_rslora", "dora"])
def test_merged_logits_are_those_of_peft(tmp_path: Path, name: str):
    model = jq.load_model(MODELS / "llama", quantization=None)
    params = jq.attach(model.params, jq.load_adapter(GOLDEN / "adapters" / name, model))
    saved = save_hf(tmp_path / "out", params, model.config)
    stored = load_file(GOLDEN / "adapters" / name / "adapter_model.safetensors")
    assert saved.updates == sum(key.endswith("lora_A.weight") for key in stored)
    merged = jq.load_model(saved.path, quantization=None)
    outputs = golden("adapter_outputs.npz")
    mask = outputs["attention_mask"]
    tokens = jnp.asarray(outputs["input_ids"], jnp.int32)
    got = merged.apply(merged.params, tokens, attention_mask=jnp.asarray(mask))
    want = outputs[f"{name}/merged_logits"]
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=2e-4)
    assert np.abs(want - outputs["base/logits"])[mask == 1].max() > 0.1


def test_the_card_takes_no_directory_for_a_hub_id(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    origin = Origin(base_model="runs/model", adapter="a")
    assert "base_model: runs/model" in model_card(origin, weights="float32", parameters=1)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    text = model_card(origin, weights="float32", parameters=1)
    assert "base_model:" not in text and "`a`, folded into `runs/model`" in text


def test_the_card_says_what_is_known(tmp_path: Path):
    model = tiny_model()
    origin = Origin(base_model="someone/model", adapter="runs/a/adapter", quantization="nf4")
    out = save_hf(tmp_path / "out", model.params, model.config, origin=origin).path
    text = (out / "README.md").read_text()
    assert (
        text.startswith("---\nlibrary_name: transformers") and "base_model: someone/model" in text
    )
    assert "`runs/a/adapter`" in text and "held in nf4" in text and "stored as float32" in text
    assert "B @ A" not in text and "LoRA" not in text  # it may be DoRA, or replace weights
    local = model_card(Origin(base_model="/data/model"), weights="bfloat16", parameters=1234)
    assert "base_model:" not in local and "`/data/model`" in local and "1,234" in local
    assert "no adapter was folded in" in local and "not quantized" in local
    assert "was not named" in model_card(Origin(), weights="float32", parameters=1)


def test_files_are_not_overwritten_either(tmp_path: Path):
    file = tmp_path / "x" / "model.gguf"
    with new_file(file) as partial:
        partial.write_text("one")
    with pytest.raises(InputError, match="is in use"), new_file(file):
        pass
    with pytest.raises(ZeroDivisionError), new_file(file, overwrite=True) as partial:
        partial.write_text("half")
        _ = 1 / 0
    assert file.read_text() == "one"
    with new_file(file, overwrite=True) as partial:
        partial.write_text("two")
    assert file.read_text() == "two" and [f.name for f in file.parent.iterdir()] == [file.name]
    with pytest.raises(InputError, match="is in use"), new_file(tmp_path, overwrite=True):
        pass
