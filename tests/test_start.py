# SPDX-License-Identifier: Apache-2.0
"""Runs that start from the weights: what is trained, what is written, and reading it back."""

import dataclasses
import io
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jax_qlora as jq
from jax_qlora import checkpoint
from jax_qlora.cli.loading import Source, complete, load
from jax_qlora.config import from_table, to_toml
from jax_qlora.errors import InputError
from jax_qlora.interop.peft import load_adapter
from jax_qlora.interop.peft_config import read_config
from jax_qlora.interop.peft_select import Beside, select_beside
from jax_qlora.optim import make_paging
from jax_qlora.report import Display
from jax_qlora.train import init_state, recipe, train
from jax_qlora.train.examples import load_data, read_description
from jax_qlora.train.outcome import _export
from jax_qlora.train.recipe import run_shapes
from jax_qlora.train.start import find_decoder_targets, load_start
from jax_qlora.train.step import form_of, make_optimizer

from .helpers import GOLDEN, assert_trees_close, needs_host, normal

LLAMA = GOLDEN / "models" / "llama"
PEFT = {
    "adapter": str(GOLDEN / "adapters" / "qv_r4"),
    "targets": ["q_proj", "v_proj"],
    "rank": 4,
    "alpha": 8,
}
TOKENS = jnp.array([[5, 7, 11, 13]])


def settings(output: Path, method: str, **lora: Any) -> Any:
    table = {
        "method": method,
        "model": str(LLAMA),
        "output": str(output),
        "lora": {"rank": 4, "alpha": 8, **lora},
        "data": {"source": str(GOLDEN / "shout.jsonl"), "max_length": 64},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 1, "batch_size": 2, "compute_dtype": "float32"},
        "eval": {"examples": 1, "answers": 0},
    }
    return from_table(table)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method": "lora"},
        {"method": "full"},
        {"lora": {"init": "pissa_niter_4"}},
        {"lora": {"dora": True}},
        {"quant": {"embeddings": True}},
        {"lora": PEFT | {"dropout": 0.1}},
        pytest.param({"quant": {"streamed": True, "double_quant": False}}, marks=needs_host),
        {
            "lora": {"modules_to_save": ["norm", "o_proj", "lm_head"]},
            "data": {"new_tokens": ["<x>"]},
        },
        pytest.param({"optim": {"placement": "host"}}, marks=needs_host),
        {"prompt": {"kind": "prefix", "tokens": 4}},
        {"optim": {"state": "8bit"}, "train": {"accumulate": 2, "compute_dtype": "float16"}},
    ],
    ids=str,
)
def test_what_is_compiled_before_weights_are_read_is_what_a_run_has(tmp_path, change):
    """Otherwise it would be compiled twice: the first time in vain."""
    table = tomllib.loads(to_toml(settings(tmp_path, "qlora")))
    for key, value in change.items():
        table[key] = table[key] | value if isinstance(value, dict) else value
    config = from_table(table)
    decoder, tokenizer, numbers = read_description(config.model, config.data.new_tokens)
    data = load_data(config, tokenizer, context=decoder.max_length)
    paging = make_paging(config.optim.placement)
    targets, beside = find_decoder_targets(decoder, config), Beside()
    if config.method != "full":
        beside = select_beside(config.lora, decoder, targets, new_tokens=numbers)
    shapes = run_shapes(config, decoder, data, paging, targets, beside)
    with Display(Console(file=io.StringIO())) as show:
        model, trainable, frozen = recipe.load(config, targets, beside, show)
    optimizer, _ = make_optimizer(config.optim, config.train.steps)
    half = model.compute_dtype == jnp.float16
    state = init_state(trainable, optimizer, half=half, paging=paging)
    batch = data.batch(0, length=data.longest)
    assert form_of((shapes.state, shapes.frozen, shapes.batch)) == form_of((state, frozen, batch))


@pytest.mark.parametrize("init", ["olora", "pissa_niter_4"])
def test_on_a_dense_base_the_written_adapter_is_the_trained_model(tmp_path, init):
    config = settings(tmp_path, "lora", init=init)
    original = jq.load_model(LLAMA, quantization=None)
    targets = find_decoder_targets(original.config, config)
    model, start = load_start(config, targets)
    trained = jax.tree.map(lambda x: x + 0.02 * normal(x.shape, x.size), start)
    want = model.apply(jq.attach(model.params, trained), TOKENS)
    fresh = model.apply(jq.attach(model.params, start), TOKENS)
    np.testing.assert_allclose(fresh, original.apply(original.params, TOKENS), atol=1e-4)
    written = _export(config, model, trained, start, tmp_path)
    plain = load_adapter(written, original)
    got = original.apply(jq.attach(original.params, plain), TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert float(jnp.abs(want - fresh).max()) > 0.01


def test_a_run_from_what_quantization_lost(tmp_path):
    """LoftQ and DoRA together, through the trainer, and back through the command line."""
    config = settings(tmp_path / "run", "qlora", init="loftq", dora=True)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        train(config)
    peft = read_config(tmp_path / "run" / "adapter")
    assert (peft.rank, peft.dora) == (8, True)
    model, adapter = load(*complete(Source(run=str(tmp_path / "run"))))
    assert adapter is not None
    path = tmp_path / "run" / "checkpoints" / "step-000001"
    described = json.loads((path / "meta" / "metadata").read_text())["arrays"]
    arrays = checkpoint._read(path.absolute(), described, dict.fromkeys(described))
    trained = {
        path: dataclasses.replace(
            pair, **{f: arrays[f"trainable/{path}/{f}"] for f in ("a", "b", "magnitude")}
        )
        for path, pair in adapter.items()
    }
    assert_trees_close(adapter, trained, atol=1e-6)
    again, _ = load_start(config, find_decoder_targets(model.config, config))
    assert_trees_close(model.params, again.params)
    plain = jq.load_model(LLAMA)  # another base: what LoftQ quantizes is not the weights alone
    differ = [
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(plain.params), jax.tree.leaves(again.params), strict=True)
    ]
    assert any(differ)


@pytest.mark.parametrize(
    ("lora", "method", "message"),
    [
        ({"init": "loftq"}, "lora", "lora.init: init 'loftq' makes up for what quantization loses"),
        ({"init": "pissa_niter"}, "qlora", "lora.init: init 'pissa_niter': expected 'pissa'"),
    ],
)
def test_impossible_starts(tmp_path, lora, method, message):
    with pytest.raises(InputError, match=message):
        settings(tmp_path, method, **lora)


def test_a_run_goes_on_from_an_adapter_of_peft(tmp_path):
    config = settings(tmp_path, "qlora", **PEFT, dropout=0.1)
    text = io.StringIO()
    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        assert train(config, console=Console(file=text, width=200)).step == 1
    model = jq.load_model(LLAMA)
    theirs = load_adapter(PEFT["adapter"], model)
    _, start = load_start(config, find_decoder_targets(model.config, config))
    assert {pair.dropout for pair in start.values()} == {0.1}
    for path, pair in theirs.items():
        np.testing.assert_array_equal(start[path].a, pair.a)
        np.testing.assert_array_equal(start[path].b, pair.b)
    trained = load_adapter(tmp_path / "adapter", model)
    moved = [float(jnp.abs(trained[path].b - pair.b).max()) for path, pair in theirs.items()]
    assert 0 < min(moved) and max(moved) < 1e-3  # one step of AdamW from there, not from zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, r"rank 4 and scale 2 there and an update of rank 8 and scale 1 here"),
        ({"targets": ["q_proj"]}, r"v_proj/kernel' has an update .* there and nothing that trains"),
        ({"adapter": "/nowhere"}, r"nothing at '/nowhere'"),
        ({"init": "pissa"}, r"lora.init: expected it left out beside lora.adapter.* found 'pissa'"),
    ],
)
def test_an_adapter_that_does_not_suit_the_settings(tmp_path, change, message, monkeypatch):
    """It is said before anything is compiled or a weight is read."""
    monkeypatch.setattr(recipe, "CompiledSteps", None)
    monkeypatch.setattr("jax_qlora.interop.load.load_params", None)
    with pytest.raises(InputError, match=message), jax.numpy_dtype_promotion("standard"):
        config = settings(tmp_path, "qlora", **(PEFT | change))
        train(config, console=Console(file=io.StringIO()))


def test_a_damaged_adapter_is_found_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_qlora.interop.load.load_params", None)
    shutil.copytree(PEFT["adapter"], tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    config = settings(tmp_path / "run", "qlora", **(PEFT | {"adapter": str(tmp_path / "a")}))
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        with jax.numpy_dtype_promotion("standard"):
            train(config, console=Console(file=io.StringIO()))
