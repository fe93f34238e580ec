# SPDX-License-Identifier: Apache-2.0
"""A run against the memory of its device: the check before step 1, and what is said at its end."""

import io
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import jax_qlora as jq
from jax_qlora.cli.main import main
from jax_qlora.config import Config, from_table, load_config, replaced
from jax_qlora.costs.gpus import GIB
from jax_qlora.costs.held import held
from jax_qlora.errors import InputError
from jax_qlora.models.presets import LLAMA_2_7B
from jax_qlora.report import read_metrics
from jax_qlora.train import answers, memory, recipe, train
from jax_qlora.train.memory import MemoryCheck, device_memory, on_shortage
from jax_qlora.train.start import find_decoder_targets

from .helpers import ROOT

CONFIG = from_table({"train": {"batch_size": 8}})
TARGETS = find_decoder_targets(LLAMA_2_7B, CONFIG)


def check(config: Config = CONFIG) -> MemoryCheck:
    return MemoryCheck(LLAMA_2_7B, config, TARGETS, seq=512)


def compiled(temporaries: int, argument: int = 0) -> Any:
    """What a compiler would say of a step."""
    names = [f"{side}{x}_size_in_bytes" for side in ("", "host_")
             for x in ("argument", "output", "alias", "temp")]  # fmt: skip
    sizes = dict.fromkeys(names, 0)
    sizes |= {"temp_size_in_bytes": temporaries, "argument_size_in_bytes": argument}
    stats = types.SimpleNamespace(**sizes)
    return types.SimpleNamespace(memory_analysis=lambda: stats)


STATE: Any = types.SimpleNamespace(trainable={"a": jnp.zeros(256)}, optimizer={"m": jnp.zeros(512)})
FROZEN = {"w": jq.quantize_array(jnp.ones((2, 64, 64))), "norm": jnp.ones(128)}


def test_the_words_are_those_of_the_planner(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 8 * GIB)
    assert (
        check().measure(compiled(7 * GIB), STATE, FROZEN) == "it needs 7.00 GiB of 8.00 GiB: fits"
    )
    tight = check().measure(compiled(15 * GIB // 2), STATE, FROZEN)
    assert tight == "it needs 7.50 GiB of 8.00 GiB: tight (less than 1.00 GiB to spare)"
    with pytest.raises(InputError, match="8 x 512 tokens: the step needs 9.00 GiB; the device has"):
        check().measure(compiled(9 * GIB), STATE, FROZEN)
    monkeypatch.setattr(memory, "device_memory", lambda: None)
    assert check().measure(compiled(9 * GIB), STATE, FROZEN) == "it needs 9.00 GiB"
    nothing = types.SimpleNamespace(memory_analysis=lambda: None)
    assert "does not say" in check().measure(nothing, STATE, FROZEN)


def test_the_breakdown_is_what_is_held_and_the_rest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda: None)
    found = check()
    found.measure(compiled(temporaries=1000, argument=20_000), STATE, FROZEN)
    parts = held(STATE.trainable, STATE.optimizer, FROZEN, paged=False)
    assert (parts.trainable, parts.optimizer, parts.host) == (1024, 2048, 0)
    assert parts.base == 2 * 64 * 64 // 2 + 512 and parts.constants == 2 * 64 + 2 * 8
    assert found.planned.device == 21_000
    assert found.planned.temporaries == 21_000 - parts.device


def test_running_out_is_explained_with_three_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 10 * GIB)
    text = str(check().explain("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    first, *lines = text.splitlines()
    assert first == (
        "Not enough memory for batches of 8 x 512 tokens: RESOURCE_EXHAUSTED: Out of memory "
        "allocating 9 bytes; the device has 10.00 GiB."
    )
    assert lines[0] == "A step of this run (estimated):"
    parts = ["base", "constants of its blocks", "what trains", "optimizer"]
    assert [line.split(maxsplit=2)[2] for line in lines[1:6]] == [
        *parts, "activations and temporaries",
    ]  # fmt: skip
    assert lines[6] == "Changes that would fit, the cheapest first (estimates):"
    *changes, last = lines[7:]
    assert 1 <= len(changes) <= 3 and changes[0].startswith("  train.batch_size = ")
    assert "make another run" in last
    for line in changes:
        needs, less = line.partition(": ")[2].split(" GiB ", 1)
        assert float(needs) <= 9 and less.startswith("(-")


def test_changes_are_shifted_by_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    """The formula alone would say that half of it suffices."""
    monkeypatch.setattr(memory, "device_memory", lambda: 20 * GIB)
    config = replaced(CONFIG, {"train.remat": "full"})
    guess, told = check(config), check(config)
    measured = 30 * GIB
    with pytest.raises(InputError, match="as compiled"):
        told.measure(compiled(measured), STATE, FROZEN)
    assert told.planned.device == measured
    half = replaced(config, {"train.batch_size": 4, "train.accumulate": 2})
    ratio = guess._need(half, 512).temporaries / guess.planned.temporaries
    assert told._need(half, 512).temporaries == pytest.approx(ratio * told.planned.temporaries)


def test_what_nothing_helps_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda: GIB // 8)
    assert "No change of settings would make it fit: take a smaller" in str(check().explain("x"))


def test_a_gpu_of_which_jax_takes_a_part(monkeypatch: pytest.MonkeyPatch):
    class Card:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 10 * GIB}

    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    assert device_memory() == 10 * GIB
    text = str(check().explain("x"))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in text and 'placement = "host"' not in text
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert "FRACTION" not in str(check().explain("x"))


def test_a_cpu_has_the_memory_of_the_machine():
    found = device_memory()
    assert found is not None and GIB // 4 < found < 1 << 50


def test_other_errors_pass():
    def explain(why: str) -> InputError:
        return InputError(f"because {why}")

    for error, words in [
        (MemoryError(), "because the host's memory is full"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no.\nmore"), "RESOURCE_EXHAUSTED: no$"),
    ]:
        with pytest.raises(InputError, match=words), on_shortage(explain):
            raise error
    with pytest.raises(jax.errors.JaxRuntimeError), on_shortage(explain):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


# --- in a run ---------------------------------------------------------------------------------


def smoke(output: Path, *options: str) -> list[str]:
    return ["train", str(ROOT / "configs" / "smoke.toml"), "--output", str(output), *options]


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch):
    """Where the paths of the smoke run begin; optax itself mixes integers and floats."""
    monkeypatch.chdir(ROOT)
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_step_that_does_not_fit_is_never_run(at_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_memory", lambda: 1_000_000)
    assert main(smoke(tmp_path / "run", "--method", "lora")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Not enough memory for batches of 4 x ")
    assert "as compiled" in error and "Changes that would fit" in error
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("where", ["load", "init_state"])
def test_running_out_anywhere_is_explained_once(at_root, tmp_path, monkeypatch, capsys, where):
    def full(*args: Any, **kwargs: Any):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes.")

    monkeypatch.setattr(recipe, where, full)
    assert main(smoke(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.count("Not enough memory") == 1 and "Traceback" not in error
    assert "Out of memory allocating 64 bytes; the device has" in error


def test_running_out_while_answering_has_its_own_advice(at_root, tmp_path, monkeypatch):
    def full(*args: Any, **kwargs: Any):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

    monkeypatch.setattr(answers, "answer", full)
    config = replaced(
        load_config(ROOT / "configs" / "smoke.toml"),
        {"output": str(tmp_path / "run"), "method": "lora"},
    )
    with pytest.raises(InputError, match="to answer 16 prompts at once: .*eval.answer_batch"):
        train(config, console=Console(file=io.StringIO()))
