# SPDX-License-Identifier: Apache-2.0
"""Runs that train a prompt or a prefix: what they leave, resuming, and the commands over them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jax_qlora as jq
from jax_qlora import checkpoint
from jax_qlora.cli.main import main
from jax_qlora.config import Config, describe_adapter, from_table, to_toml
from jax_qlora.costs.formula import estimate
from jax_qlora.errors import InputError
from jax_qlora.models.presets import LLAMA_2_7B
from jax_qlora.report import read_metrics
from jax_qlora.train import train
from jax_qlora.train.examples import load_data, read_description
from jax_qlora.train.prompt import prompt_shapes, start_prompt

from .helpers import GOLDEN

LLAMA = GOLDEN / "models" / "llama"


def settings(output: Path, prompt: dict[str, Any], **tables: Any) -> Config:
    table = {
        "model": str(LLAMA),
        "output": str(output),
        "prompt": {"tokens": 4, **prompt},
        "data": {"source": str(GOLDEN / "shout.jsonl"), "max_length": 64},
        "optim": {"warmup_steps": 0, "learning_rate": 0.01},
        "train": {
            "steps": 4, "batch_size": 2, "compute_dtype": "float32", "checkpoint_every": 2,
            "remat": "full",
        },
        "eval": {"examples": 2, "answers": 2, "max_new_tokens": 4},
    }  # fmt: skip
    return from_table(table | tables)


def run(config: Config) -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
        train(config, console=Console(file=io.StringIO(), width=100))


def loss_of_the_base(config: Config, model: Any) -> float:
    """On the held-out examples, from all logits of all tokens."""
    _, tokenizer, _ = read_description(config.model)
    data = load_data(config, tokenizer, context=model.config.max_length)
    losses = []
    for example in data.held_out:
        tokens = jnp.asarray(example.tokens)[None]
        scores = jax.nn.log_softmax(model.apply(model.params, tokens)[0, :-1])
        chosen = np.asarray(example.loss_mask)[1:]
        losses += [
            -float(row[t]) for row, t in zip(scores[chosen], tokens[0, 1:][chosen], strict=True)
        ]
    return float(np.mean(losses))


def last_state(config: Config) -> dict[str, np.ndarray]:
    """The arrays of the last checkpoint."""
    directory = Path(config.output) / "checkpoints"
    path = directory.absolute() / f"step-{checkpoint.saved_steps(directory)[-1]:06d}"
    described = json.loads((path / "meta" / "metadata").read_text())["arrays"]
    arrays = checkpoint._read(path, described, dict.fromkeys(described))
    return {name: np.asarray(x) for name, x in arrays.items()}


@pytest.fixture(scope="module")
def model() -> Any:
    return jq.load_model(LLAMA)


def test_a_prefix_beside_lora(tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "run"
    config = settings(output, {"kind": "prefix", "init": "random"}, lora={"rank": 2})
    run(config)
    state = last_state(config)
    found = jq.load_adapter(output / "prompt", model)
    for path, entry in found.items():
        np.testing.assert_array_equal(entry.values, state[f"trainable/{path}/values"])
    start = start_prompt(config, model)
    assert found.keys() == start.keys()
    for path, entry in start.items():
        assert np.abs(np.asarray(found[path].values - entry.values)).max() > 1e-3
    lora = jq.load_adapter(output / "adapter", model)
    assert all(pair.rank == 2 for pair in lora.values())
    # what is measured before is the base, without virtual tokens that mean nothing yet
    before, *_, after = (
        r["held_out_loss"] for r in read_metrics(output / "metrics.jsonl") if "held_out_loss" in r
    )
    assert before == pytest.approx(loss_of_the_base(config, model), rel=1e-4) and after < before

    # from the checkpoint of step 2 to the same bits
    shutil.rmtree(output / "checkpoints" / "step-000004")
    (output / "run.json").unlink()
    run(config)
    again = last_state(config)
    assert again.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)

    capsys.readouterr()
    sample = json.loads((output / "samples.jsonl").read_text().splitlines()[0])
    args = ["--run", str(output), "--max_new_tokens", "4", sample["prompt"]]
    assert main(["generate", *args]) == 0
    assert capsys.readouterr().out.strip() == sample["tuned"]
    for command in (
        ["merge", str(tmp_path / "merged")],
        ["export", str(tmp_path / "x"), "--format", "peft"],
    ):
        assert main([*command, "--run", str(output)]) == 2
        assert "virtual tokens in" in capsys.readouterr().err
    alone = ["--run", str(output), "--adapter", str(output / "adapter"), "--format", "peft"]
    assert main(["export", str(tmp_path / "lora"), *alone]) == 0
    assert jq.load_adapter(tmp_path / "lora", model).keys() == lora.keys()


def test_a_prompt_alone_from_a_text(tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "run"
    prompt = {"kind": "prompt", "init_text": "Shout what you hear."}
    config = settings(output, prompt, lora={"rank": 0})
    start = start_prompt(config, model)["prompt"].values
    ids = model.tokenizer("Shout what you hear.")["input_ids"][:4]
    table = np.asarray(model.params["embed_tokens"]["embedding"], np.float32)
    np.testing.assert_array_equal(start, table[np.asarray(ids)])
    run(config)
    assert not (output / "adapter").exists()
    assert list(jq.load_adapter(output / "prompt", model)) == ["prompt"]
    state = last_state(config)
    assert sum("trainable" in name for name in state) == 1
    capsys.readouterr()
    assert main(["inspect", str(output / "prompt")]) == 0
    assert "4 virtual tokens" in capsys.readouterr().out
    for command in (
        ["merge", str(tmp_path / "m")],
        ["export", str(tmp_path / "g"), "--format", "gguf-lora"],
    ):
        assert main([*command, "--run", str(output)]) == 2
        assert "holds virtual tokens" in capsys.readouterr().err
    copy = ["export", str(tmp_path / "copy"), "--run", str(output), "--format", "peft"]
    assert main(copy) == 0
    assert "Wrote" in capsys.readouterr().out
    back = jq.load_adapter(tmp_path / "copy", model)["prompt"].values
    np.testing.assert_array_equal(back, state["trainable/prompt/values"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lora": {"rank": 0}}, "lora.rank: expected at least 1 where nothing else trains"),
    (
        {"lora": {"rank": 0, "dora": True}, "prompt": {"kind": "prompt"}},
        "lora.dora: expected no setting of LoRA beside lora.rank = 0",
    ),
    ({"method": "full", "prompt": {"kind": "prefix"}}, 'prompt.kind: expected method "qlora"'),
    (
        {"lora": {"rank": 0}, "prompt": {"kind": "prompt"}, "data": {"new_tokens": ["<a>"]}},
        "data.new_tokens: expected lora.rank above 0",
    ),
    ({"prompt": {"kind": "prompt", "init_text": " "}}, "prompt.init_text: expected some words"),
    ({"prompt": {"kind": "suffix"}}, "prompt.kind: expected one of"),
]


@pytest.mark.parametrize(("table", "message"), BAD)
def test_settings_that_contradict_each_other(table: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        from_table(table)


def test_more_virtual_tokens_than_the_context_stop_before_the_weights_are_read(tmp_path: Path):
    config = settings(tmp_path / "run", {"kind": "prompt", "tokens": 5000})
    with pytest.raises(InputError, match="5000 virtual tokens: expected 1 to"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_plans_count_them(kind: str):
    """Shapes without weights, and the formula: parameters, moments, and longer rows."""
    config = from_table({"prompt": {"kind": kind, "tokens": 8}, "lora": {"rank": 0}})
    assert describe_adapter(config) == f"{kind} of 8 tokens" and "[prompt]" in to_toml(config)
    shapes = prompt_shapes(config, LLAMA_2_7B)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    assert size == {"prompt": 8 * 4096, "prefix": 2 * 32 * 8 * 4096}[kind]
    plain = estimate(LLAMA_2_7B, Config(), None, seq=512)
    found = estimate(LLAMA_2_7B, config, None, seq=504)
    assert (found.trainable, found.optimizer) == (4 * size, 8 * size)
    assert found.base == plain.base
