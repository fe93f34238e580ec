# SPDX-License-Identifier: Apache-2.0
"""Whole modules, biases and rows of tokens from the settings: trained, resumed, written, read."""

import dataclasses
import functools
import io
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jax_qlora as jq
from jax_qlora.cli.main import main
from jax_qlora.config import Config, from_table
from jax_qlora.costs.formula import estimate
from jax_qlora.evaluate import answer_loss
from jax_qlora.interop.hf_write import save_hf
from jax_qlora.interop.peft_config import read_config
from jax_qlora.interop.peft_select import Beside
from jax_qlora.interop.tokenizer import load_tokenizer
from jax_qlora.models import Model, decoder_functions, init_params
from jax_qlora.models.presets import TINY
from jax_qlora.optim import adamw, decay_mask, lora_b_mask
from jax_qlora.quant import QuantizedArray
from jax_qlora.report import Metrics, read_metrics
from jax_qlora.train import train
from jax_qlora.train.shapes import abstract_run
from jax_qlora.train.start import find_decoder_targets, load_start, make_adapter
from jax_qlora.tree import flatten_paths, nbytes

from .helpers import GOLDEN, assert_trees_close, needs_host, normal
from .test_train import final_state
from .tiny import tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")
EMBEDDING, HEAD = "embed_tokens/embedding", "lm_head/kernel"
NORMS = {"norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"}
BIASES = {f"layers/self_attn/{name}_proj/bias" for name in "qkv"}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of random models with biases and a chat template, untied and tied."""
    tokenizer = load_tokenizer(GOLDEN / "models" / "llama")
    found = {}
    for tied in (False, True):
        config = dataclasses.replace(
            TINY, family="qwen2", qkv_bias=True, vocab_size=len(tokenizer), d_model=64, d_ff=96,
            head_dim=16, tied=tied, max_length=128, eos_token_ids=(tokenizer.eos_token_id,),
        )  # fmt: skip
        params = init_params(jax.random.key(3), config)
        params = jax.tree.map(lambda x: x + 0.02 * normal(x.shape, x.size), params)
        found[tied] = tmp_path_factory.mktemp("model") / "m"
        save_hf(found[tied], params, config, tokenizer=tokenizer)
    return found


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats whose answers begin with a token that the tokenizer lacks."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = []
    for word in ("alpha", "beta", "gamma", "delta", "eta", "iota", "kappa", "mu"):
        asked = {"role": "user", "content": word}
        answer = {"role": "assistant", "content": f"<tool>{word.upper()}"}
        lines.append(json.dumps({"messages": [asked, answer]}) + "\n")
    file.write_text("".join(lines))
    return file


def settings(model: Path, chats: Path, output: Path, **tables: Any) -> Config:
    table: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]},
        "data": {"source": str(chats), "max_length": 96, "new_tokens": ["<tool>"]},
        "optim": {"learning_rate": 5e-3, "warmup_steps": 0},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "compute_dtype": "float32"},
        "eval": {"every": 4, "examples": 2, "answers": 0, "samples": 0, "max_new_tokens": 6},
    }
    for name, values in tables.items():
        if isinstance(values, dict):
            table[name] = table.get(name, {}) | values
        else:
            table[name] = values
    return from_table(table)


def run(config: Config) -> str:
    text = io.StringIO()
    train(config, console=Console(file=text, width=120))
    return text.getvalue()


EVERYTHING: dict[str, Any] = {
    "quant": {"embeddings": True},
    "lora": {
        "rank": 2,
        "alpha": 4,
        "targets": ["q_proj", "down_proj"],
        "modules_to_save": ["norm", "up_proj"],
        "bias": "all",
        "trainable_token_indices": [5, 7],
    },
    "optim": {
        "learning_rate": 5e-3, "warmup_steps": 0, "weight_decay": 0.01, "lora_plus_ratio": 4.0,
        "state": "8bit", "placement": "host" if jax.__version_info__ >= (0, 12) else "device",
    },
    "eval": {"every": 4, "examples": 2, "answers": 1, "samples": 0, "max_new_tokens": 6},
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(checkpoint_of: Any, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run that trains one of each, and what it printed."""
    output = tmp_path_factory.mktemp("beside") / "run"
    config = settings(checkpoint_of[False], chats, output, **EVERYTHING)
    with jax.numpy_dtype_promotion("standard"):
        return config, run(config)


def loaded(config: Config) -> tuple[Model, Any]:
    model = jq.load_model(
        config.model, embeddings=config.quant.embeddings, new_tokens=config.data.new_tokens
    )
    return model, jq.load_adapter(Path(config.output) / "adapter", model)


def test_a_run_trains_what_its_settings_name(everything: Any):
    config, text = everything
    model, adapter = loaded(config)
    up = "layers/mlp/up_proj/kernel"
    assert set(adapter) == {
        "layers/self_attn/q_proj/kernel", "layers/mlp/down_proj/kernel", EMBEDDING, HEAD, up,
        *NORMS, *BIASES,
    }  # fmt: skip
    assert adapter[EMBEDDING].indices == (5, 7, model.config.vocab_size - 1)
    assert adapter[HEAD].indices == (model.config.vocab_size - 1,)
    dense = jq.load_model(config.model, quantization=None, new_tokens=config.data.new_tokens)
    start = flatten_paths(dense.params)
    for path in (up, *NORMS, *BIASES):
        moved = np.abs(np.asarray(adapter[path]) - np.asarray(start[path]))
        # four steps of Adam: no further than its rate allows from the weights before 4 bits
        assert 0 < moved.max() < 4 * 5e-3 * 1.5, path
    assert "trainable" in text and up in text
    written = read_config(Path(config.output) / "adapter")
    assert (written.bias, written.tokens["lm_head"]) == ("all", adapter[HEAD].indices)


def test_it_resumes_to_the_same_bits(everything: Any, tmp_path: Path, monkeypatch: Any):
    whole, _ = everything
    observed = dataclasses.replace(whole.eval, answers=0)
    config = dataclasses.replace(whole, output=str(tmp_path / "cut"), eval=observed)
    add = Metrics.add

    def add_and_interrupt(self: Metrics, **values: Any) -> Any:
        if values["step"] == 2 and "loss" in values:
            os.kill(os.getpid(), signal.SIGINT)
        return add(self, **values)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "add", add_and_interrupt)
        assert "Stopped after step 2 of 4" in run(config)
    assert "Resuming after step 2 of 4" in run(config)
    assert final_state(config) == final_state(whole)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (Path(whole.output) / name).read_bytes()


def test_other_settings_are_another_run(everything: Any):
    config, _ = everything
    other = dataclasses.replace(config, lora=dataclasses.replace(config.lora, bias="none"))
    with pytest.raises(jq.InputError, match="lora.bias was all, is none. Restore"):
        run(other)


def test_it_answers_merges_and_is_exported(everything: Any, tmp_path: Path, capsys: Any):
    config, _ = everything
    output = config.output
    sample = json.loads((Path(output) / "samples.jsonl").read_text().splitlines()[0])
    assert main(["generate", "--run", output, sample["prompt"], "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out.strip() == sample["tuned"]

    def figures(command: str) -> dict[str, Any]:
        assert main(shlex.split(command)) == 0
        return json.loads(capsys.readouterr().out)

    merged = figures(f"merge {tmp_path}/hf --run {output} --json")
    assert merged["logit_difference"] < 1e-3
    model, adapter = loaded(config)
    tokens = jnp.array([[5, 9, model.config.vocab_size - 1, 7]])
    want = model.apply(jq.attach(model.params, adapter), tokens)
    hf = jq.load_model(tmp_path / "hf", quantization=None)
    np.testing.assert_allclose(hf.apply(hf.params, tokens), want, atol=2e-4)
    assert hf.tokenizer.convert_tokens_to_ids("<tool>") == hf.config.vocab_size - 1
    gguf = f"export {tmp_path}/m.gguf --run {output} --format gguf --gguf_type f32 --json"
    assert figures(gguf)["logit_difference"] < 1e-3
    from_gguf = jq.load_model(tmp_path / "m.gguf", quantization=None)
    assert from_gguf.tokenizer("<tool>")["input_ids"] == [hf.config.vocab_size - 1]
    assert figures(f"export {tmp_path}/bnb --run {output} --format bnb --json")["updates"] > 0
    bnb = jq.load_model(tmp_path / "bnb")
    assert bnb.config.vocab_size == hf.config.vocab_size
    figures(f"export {tmp_path}/peft --run {output} --format peft --json")
    assert_trees_close(jq.load_adapter(tmp_path / "peft", model), adapter)
    assert (tmp_path / "peft" / "tokenizer.json").exists()
    command = f"export {tmp_path}/a.gguf --run {output} --format gguf-lora"
    assert main(shlex.split(command)) == 2
    assert "is no plain LoRA, which is all that GGUF adapters can say" in capsys.readouterr().err
    alone = f"generate --model {config.model} --adapter {output}/adapter --max_new_tokens 6"
    assert main([*shlex.split(alone), sample["prompt"]]) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tied_embedding_trains_in_both_its_uses(
    checkpoint_of: Any, chats: Path, tmp_path: Path, method: str
):
    lora = {"modules_to_save": ["embed_tokens"]} if method == "lora" else {}
    run(settings(checkpoint_of[True], chats, tmp_path / "run", method=method, lora=lora))
    plain = jq.load_model(checkpoint_of[True], quantization=None, new_tokens=["<tool>"])
    if method == "full":
        model = jq.load_model(tmp_path / "run" / "model", quantization=None)
        assert model.config == plain.config and model.tokenizer.convert_tokens_to_ids("<tool>")
        table = model.params["embed_tokens"]["embedding"]
    else:
        assert read_config(tmp_path / "run" / "adapter").tied
        table = jq.load_adapter(tmp_path / "run" / "adapter", plain)[EMBEDDING]
    moved = jnp.abs(table - plain.params["embed_tokens"]["embedding"]).max(axis=-1)
    # the head moves every row, the look-up those of the tokens that were seen
    assert table.shape == (plain.config.vocab_size, 64) and float(moved.min()) > 0


@pytest.mark.parametrize("tied", [False, True])
def test_an_update_of_embedding_and_head_from_the_settings(tied: bool):
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = from_table({"lora": {"targets": names}})
    model = tiny_model(tied=tied)
    targets = find_decoder_targets(model.config, config)
    assert set(targets) == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    assert set(make_adapter(config, targets, model.params)) == set(targets)


# --- gradients --------------------------------------------------------------------------------


@functools.cache
def of_each() -> tuple[Model, Any, Any]:
    """A model in 4 bits, and an adapter that has one of each kind of entry."""
    model = tiny_model(n_layers=2, max_length=512, qkv_bias=True, family="qwen2")
    config = from_table({"lora": {"targets": ["q_proj", "down_proj"], "rank": 2}})
    targets = find_decoder_targets(model.config, config)
    every = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    base = jq.quantize(model.params, every, block_size=32)
    beside = Beside(
        whole=(*sorted(NORMS | BIASES), "layers/mlp/up_proj/kernel"),
        tokens={EMBEDDING: (3, 4, 5), HEAD: (4,)},
    )
    adapter = make_adapter(config, targets, base, beside)
    return model, base, jax.tree.map(lambda x: x + 0.02, adapter)


@functools.cache
def gradients(**how: Any) -> dict[str, Any]:
    """Of the loss of 300 tokens, some of which are padding."""
    model, base, adapter = of_each()
    tokens = jax.random.randint(jax.random.key(2), (1, 300), 3, 9)
    batch = {
        "tokens": tokens,
        "loss_mask": jnp.ones_like(tokens, jnp.bool_),
        "attention_mask": jnp.arange(300)[None] < 290,
    }
    functions = decoder_functions(model.config, transform=jq.lift, **how)
    run = dataclasses.replace(model, functions=functions)

    def loss(adapter: Any) -> jax.Array:
        params = jq.attach(base, adapter)
        return answer_loss(run, params, batch, width=299, chunk=256, scale=1 / 299)[0]

    return flatten_paths(jax.jit(jax.grad(loss))(adapter))


@pytest.mark.parametrize(
    "remat", ["full", pytest.param("offload", marks=[needs_host, pytest.mark.slow])]
)
def test_the_loop_over_layers_gives_all_of_them_their_gradients(remat: str):
    """Two chunks of a layer, of which the second is mostly empty."""
    want, got = gradients(), gradients(remat=remat, layer_chunk=256)
    for path, w in want.items():
        size = float(jnp.linalg.norm(w))
        assert size > 1e-6, path
        assert float(jnp.linalg.norm(got[path] - w)) <= 1e-4 * size, path


def test_masks_of_the_optimizer():
    _, _, adapter = of_each()
    decay, b = flatten_paths(decay_mask(adapter)), flatten_paths(lora_b_mask(adapter))
    assert {path for path, on in decay.items() if not on} == NORMS | BIASES
    assert {path for path, on in b.items() if on} == {
        "layers/self_attn/q_proj/kernel/b", "layers/mlp/down_proj/kernel/b",
    }  # fmt: skip
    # a first step of Adam is the rate, whatever the gradient; decay adds a part of the weight
    optimizer = adamw(1e-2, weight_decay=0.5, lora_plus_ratio=4.0)
    grads = jax.tree.map(jnp.ones_like, adapter)
    updates, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
    was, moved = flatten_paths(adapter), flatten_paths(updates)
    for path, on in decay.items():
        ratio = 4.0 if b[path] else 1.0
        want = -1e-2 * ratio * (1 + 0.5 * on * np.asarray(was[path]))
        np.testing.assert_allclose(moved[path], want, atol=1e-6, err_msg=path)


# --- what is held -----------------------------------------------------------------------------


def test_a_whole_module_is_held_dense_and_starts_unrounded(checkpoint_of: Any, chats: Path):
    config = settings(
        checkpoint_of[False], chats, Path("unused"), quant={"embeddings": True},
        lora={"modules_to_save": ["lm_head", "k_proj"]}, data={"new_tokens": []},
    )  # fmt: skip
    plain = jq.load_model(checkpoint_of[False], quantization=None)
    targets = find_decoder_targets(plain.config, config)
    whole = (HEAD, "layers/self_attn/k_proj/kernel")
    model, adapter = load_start(config, targets, Beside(whole=whole))
    base, dense = flatten_paths(model.params), flatten_paths(plain.params)
    for path in whole:
        np.testing.assert_array_equal(adapter[path], dense[path])
        np.testing.assert_array_equal(base[path], dense[path])
        assert adapter[path] is not base[path]
    assert isinstance(model.params["embed_tokens"]["embedding"], QuantizedArray)


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_planner_counts_them(checkpoint_of: Any, chats: Path, embeddings: bool):
    """By the formula and by the step's own shapes: the parameters of a loaded run, to the byte."""
    plain = jq.load_model(checkpoint_of[False], quantization=None, new_tokens=["<tool>"])
    lora = {**EVERYTHING["lora"], "modules_to_save": ["lm_head", "norm"]}
    config = settings(
        checkpoint_of[False], chats, Path("unused"), lora=lora, quant={"embeddings": embeddings}
    )
    shapes = abstract_run(plain.config, config, seq=64)
    targets = find_decoder_targets(plain.config, config)
    planned = estimate(plain.config, config, targets, seq=64)
    assert planned.trainable == nbytes(shapes.state.trainable)
    moments = optax.tree.get(shapes.state.optimizer, "mu")
    assert planned.optimizer == 2 * nbytes(moments)
    assert planned.base + planned.constants == pytest.approx(nbytes(shapes.frozen), rel=2e-3)
    _, adapter = load_start(
        config,
        targets,
        Beside(whole=tuple(p for p, x in shapes.state.trainable.items() if hasattr(x, "dtype"))),
    )
    for path, x in adapter.items():
        assert nbytes(x) == nbytes(shapes.state.trainable[path]), path


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"lora": {"modules_to_save": ["q_prj"]}}, "found 'q_prj', which is none. Did you mean"),
        ({"lora": {"targets": ["lm_head"]}}, "found 'lm_head': its output head is the embedding"),
        ({"lora": {"modules_to_save": ["_proj"]}}, "found that all train as a whole"),
        ({"lora": {"targets": ["embed_tokens"], "dora": True}}, "lora.dora: expected linears"),
        (
            {"lora": {"targets": ["embed_tokens"], "init": "loftq"}},
            "lora.init: expected targets in 4 bits",
        ),
        ({"lora": {"trainable_token_indices": [4000]}}, "found 4000"),
        ({"data": {"new_tokens": ["a"]}}, "expected tokens that the tokenizer lacks, found 'a'"),
    ],
)
def test_what_cannot_train_is_said_before_anything_is_read(
    checkpoint_of: Any, chats: Path, tmp_path: Path, tables: Any, message: str
):
    with pytest.raises(jq.InputError, match=message):
        run(settings(checkpoint_of[True], chats, tmp_path / "run", **tables))
    assert not (tmp_path / "run").exists()


def test_losses_fall_and_new_tokens_are_learned(everything: Any):
    config, _ = everything
    records = read_metrics(Path(config.output) / "metrics.jsonl")
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert held_out[-1] < held_out[0] - 0.05
