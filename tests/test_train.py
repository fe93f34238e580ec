# SPDX-License-Identifier: Apache-2.0
import dataclasses
import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jax_qlora as jq
from jax_qlora import checkpoint
from jax_qlora.config import Config, from_table, load_config
from jax_qlora.data.batches import make_batch
from jax_qlora.data.encode import Encoded
from jax_qlora.errors import InputError
from jax_qlora.models import Model
from jax_qlora.optim import adamw, make_paging
from jax_qlora.report import Display, Metrics, read_metrics
from jax_qlora.train import init_state, make_step, recipe, train
from jax_qlora.train.examples import load_data
from jax_qlora.train.step import CompiledSteps, check_finite, make_optimizer
from jax_qlora.train.stop import interrupts, stop_requests
from jax_qlora.tree import nbytes

from .helpers import GOLDEN, ROOT, assert_trees_close, golden, needs_host

pytestmark = pytest.mark.usefixtures("standard_promotion")
LLAMA = GOLDEN / "models" / "llama"


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def settings(output: Path, **tables: Any) -> Config:
    """The smoke run, elsewhere, with other settings."""
    config = load_config(ROOT / "configs" / "smoke.toml")
    data = dataclasses.replace(config.data, source=str(GOLDEN / "shout.jsonl"))
    config = dataclasses.replace(config, model=str(LLAMA), data=data, output=str(output))
    for name, values in tables.items():
        old = getattr(config, name)
        new = dataclasses.replace(old, **values) if isinstance(values, dict) else values
        config = dataclasses.replace(config, **{name: new})
    return config


def run(config: Config) -> tuple[recipe.Result, str]:
    text = io.StringIO()
    result = train(config, console=Console(file=text, width=100))
    return result, text.getvalue()


def steps_of(path: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(path / "metrics.jsonl") if "loss" in r]


def final_state(config: Config) -> bytes:
    """Every bit of the arrays of the last checkpoint."""
    directory = Path(config.output) / "checkpoints"
    step = checkpoint.saved_steps(directory)[-1]
    path = directory.absolute() / f"step-{step:06d}"
    described = json.loads((path / "meta" / "metadata").read_text())["arrays"]
    arrays = checkpoint._read(path, described, dict.fromkeys(described))
    return b"".join(np.asarray(arrays[name]).tobytes() for name in sorted(arrays))


# --- the step ---------------------------------------------------------------------------------


def example(length: int, answer: int, seed: int) -> Encoded:
    tokens = np.random.default_rng(seed).integers(3, 300, length).astype(np.int32)
    return Encoded(tokens=tokens, loss_mask=np.arange(length) >= length - answer)


EXAMPLES = [example(9, 2, 0), example(12, 7, 1), example(5, 1, 2), example(11, 4, 3)]


def parts(accumulate: int) -> dict[str, np.ndarray]:
    batch = make_batch(EXAMPLES, 12)
    return {k: x.reshape(accumulate, len(EXAMPLES) // accumulate, 12) for k, x in batch.items()}


@pytest.fixture(scope="module")
def llama() -> Model:
    return jq.load_model(LLAMA, quantization=None)


@pytest.fixture(scope="module")
def targets(llama):
    return jq.find_targets(llama.apply, llama.params, jnp.ones((1, 4), jnp.int32))


@pytest.mark.parametrize("base", ["fp32", "nf4", "dora"])
def test_five_steps_of_peft(base):
    """Losses, gradient norms and adapters of PEFT with torch's AdamW, dense and in 4 bits."""
    data = golden("training_step.npz")
    source = {"fp32": "llama", "nf4": "llama_bnb4", "dora": "llama"}[base]
    model = jq.load_model(GOLDEN / "models" / source, quantization=None)

    def adapter(stage: str) -> dict[str, jq.LoraPair]:
        pairs = jq.init_adapter(jax.random.key(0), targets, rank=8, alpha=16)
        for path, pair in pairs.items():
            module = path.removeprefix("layers/").removesuffix("/kernel").replace("/", ".")
            parts = {"a": "lora_A.weight", "b": "lora_B.weight"}
            parts |= {"magnitude": "lora_magnitude_vector"} if base == "dora" else {}
            stacks = {
                part: jnp.stack([
                    data[f"{base}/{stage}/base_model.model.model.layers.{i}.{module}.{name}"]
                    for i in range(2)
                ])
                for part, name in parts.items()
            }  # fmt: skip
            pairs[path] = dataclasses.replace(pair, **stacks)
        return pairs

    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    batch = {
        "tokens": data["input_ids"].astype(np.int32),
        "loss_mask": data["labels"] != -100,
        "attention_mask": data["attention_mask"].astype(bool),
    }
    # torch's decays everything; ours leaves magnitudes out
    make = optax.adamw if base == "dora" else adamw
    optimizer = make(1e-3, weight_decay=0.01)
    step = jax.jit(make_step(model, optimizer, Config(), width=23))
    state = init_state(adapter("init"), optimizer)
    losses, norms, before = [], [], state
    for i in range(6):
        before = state
        if i == 1:  # after one step the first moment is a tenth of the gradient
            grads = jax.tree.map(lambda x: x / 0.1, optax.tree.get(state.optimizer, "mu"))
            assert_trees_close(grads, adapter("grad"), atol=1e-5)
        state, values = step(state, model.params, {k: x[None] for k, x in batch.items()})
        losses.append(float(values["loss"]))
        norms.append(float(values["grad_norm"]))
    np.testing.assert_allclose(losses, data[f"{base}/losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms[:5], data[f"{base}/grad_norms"], rtol=1e-4)
    assert_trees_close(before.trainable, adapter("final"), atol=1e-4)


def test_accumulated_parts_make_the_same_step(llama, targets):
    """The mean is over the answer tokens of all parts, not the mean of their means."""
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2)
    optimizer, results = optax.sgd(0.1), []
    for accumulate in (1, 2):
        config = from_table({"train": {"accumulate": accumulate}})
        step = jax.jit(make_step(llama, optimizer, config, width=7))
        state, first = step(init_state(adapter, optimizer), llama.params, parts(accumulate))
        state, second = step(state, llama.params, parts(accumulate))
        results.append((state.trainable, first, second))
    assert_trees_close(results[1], results[0], atol=1e-6, rtol=1e-4)


def test_dropout_follows_seed_and_step(llama, targets):
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, dropout=0.5)
    adapter = jax.tree.map(lambda x: x + 0.02, adapter)
    optimizer = optax.sgd(0.0)
    losses = []
    for seed in (0, 1):
        config = from_table({"seed": seed, "lora": {"dropout": 0.5}})
        step = jax.jit(make_step(llama, optimizer, config, width=7))
        start = init_state(adapter, optimizer)
        state, first = step(start, llama.params, parts(1))
        _, again = step(start, llama.params, parts(1))
        _, second = step(state, llama.params, parts(1))
        assert float(first["loss"]) == float(again["loss"]) != float(second["loss"])
        losses.append(float(first["loss"]))
    assert losses[0] != losses[1]


def test_float16_scales_the_loss_and_skips_overflow(targets):
    model = jq.load_model(LLAMA, quantization=None, compute_dtype="float16")
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2)
    adapter = jax.tree.map(lambda x: x + 0.01, adapter)
    optimizer = adamw(1e-2)
    step = jax.jit(make_step(model, optimizer, Config(), width=7, half=True))
    state = init_state(adapter, optimizer, half=True)
    assert float(state.loss_scale) == 2.0**15
    state = state._replace(loss_scale=jnp.float32(2.0**30))
    before = jax.tree.map(jnp.copy, state)
    state, values = step(state, model.params, parts(1))
    assert not np.isfinite(float(values["grad_norm"])) and np.isfinite(float(values["loss"]))
    assert_trees_close(state.trainable, before.trainable)
    assert_trees_close(state.optimizer, before.optimizer)
    assert float(state.loss_scale) == 2.0**29 and int(state.step) == 1
    check_finite(1, values, state, Config())  # expected now and then: no error

    state = state._replace(loss_scale=jnp.float32(2.0**10), good_steps=jnp.int32(199))
    first = float(values["loss"])
    for _ in range(8):
        state, values = step(state, model.params, parts(1))
    assert np.isfinite(float(values["grad_norm"])) and float(values["loss"]) < first - 0.05
    assert float(state.loss_scale) == 2.0**11 and int(state.good_steps) == 6


@needs_host
def test_a_skipped_step_leaves_paged_moments_alone(targets):
    model = jq.load_model(LLAMA, quantization=None, compute_dtype="float16")
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2)
    optimizer, paging = adamw(1e-2), make_paging("host")
    start = init_state(adapter, optimizer, half=True, paging=paging)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(start.optimizer) if x.ndim} == {
        "pinned_host"
    }
    with Display(Console(file=io.StringIO())) as show:
        step = make_step(model, optimizer, Config(), width=7, half=True, paging=paging)
        steps = CompiledSteps(step, Config(), show)
        state, _ = steps(jax.tree.map(jnp.copy, start), model.params, parts(1))
        moved = jax.tree.map(np.asarray, state)
        assert np.any(moved.trainable["layers/self_attn/q_proj/kernel"].b)
        state = state._replace(loss_scale=jnp.float32(2.0**40))
        state, values = steps(state, model.params, parts(1))
    assert not np.isfinite(float(values["grad_norm"]))
    assert_trees_close(state.optimizer, moved.optimizer)
    places = [[x.sharding for x in jax.tree.leaves(tree)] for tree in (state, start)]
    assert places[0] == places[1]


@pytest.mark.parametrize(
    ("form", "placement"),
    [
        ("bfloat16", "device"),
        ("8bit", "device"),
        pytest.param("8bit", "host", marks=needs_host),
        pytest.param("bfloat16", "host", marks=[needs_host, pytest.mark.slow]),
    ],
)
def test_every_form_of_the_optimizer_learns_and_resumes(llama, targets, tmp_path, form, placement):
    """Through a checkpoint, to the same bits, and the moments come back to where they live."""
    config = from_table({"optim": {"state": form, "placement": placement, "learning_rate": 2e-3}})
    optimizer, _ = make_optimizer(config.optim, 100)
    paging = make_paging(config.optim.placement)
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=64)  # large enough for 8 bits
    state = init_state(adapter, optimizer, paging=paging)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    losses = []
    with Display(Console(file=io.StringIO())) as show:
        step = make_step(llama, optimizer, config, width=7, paging=paging)
        steps = CompiledSteps(step, config, show)
        for i in range(6):
            if i == 3:
                checkpoint.save(tmp_path, i, state, identity={})
            state, values = steps(state, llama.params, parts(1))
            losses.append(float(values["loss"]))
        found = checkpoint.restore(tmp_path, shapes, identity={})
        assert found is not None
        again = found[1]
        for i in range(3, 6):
            again, values = steps(again, llama.params, parts(1))
            assert float(values["loss"]) == losses[i]
    assert losses[5] < losses[0] - 0.2
    assert_trees_close(again, state)
    moments = [x for x in jax.tree.leaves(again.optimizer) if x.ndim]
    assert {x.dtype for x in moments} >= {jnp.dtype({"8bit": "uint8"}.get(form, form))}
    kind = {"host": "pinned_host"}.get(placement, placement)
    assert {x.sharding.memory_kind for x in moments} == {kind}


def test_a_loss_that_is_no_number_stops_with_advice():
    state = init_state({}, optax.sgd(0.1))
    fine = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
    check_finite(3, fine, state, Config())
    with pytest.raises(
        InputError, match="Step 3: the loss is nan, .* optim.learning_rate .now 0.0"
    ):
        check_finite(3, fine | {"loss": jnp.float32(jnp.nan)}, state, Config())
    with pytest.raises(InputError, match="Step 3: the gradient norm is inf"):
        check_finite(3, fine | {"grad_norm": jnp.float32(jnp.inf)}, state, Config())


# --- the recipe -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, its result and what it printed."""
    config = settings(tmp_path_factory.mktemp("run") / "whole")
    with jax.numpy_dtype_promotion("standard"):
        return config, *run(config)


def test_a_run_leaves_what_it_says(finished):
    config, result, text = finished
    directory = Path(config.output)
    assert {path.name for path in directory.iterdir()} == {
        "adapter", "answers-before.json", "checkpoints", "config.toml", "loss.png",
        "metrics.jsonl", "report.html", "run.json", "samples.jsonl",
    }  # fmt: skip
    assert load_config(directory / "config.toml") == config
    assert result.figures == json.loads((directory / "run.json").read_text())
    assert result.step == result.figures["steps"] == 12
    assert result.figures["held_out_loss_after"] < result.figures["held_out_loss_before"] - 0.5
    assert result.figures["system_prompt"] == "Shout."
    records = read_metrics(directory / "metrics.jsonl")
    assert [r["step"] for r in records if "held_out_loss" in r] == [0, 6, 12]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        "step", "loss", "grad_norm", "learning_rate", "tokens", "flops", "seconds",
    }  # fmt: skip
    total = sum(r["flops"] for r in steps) / sum(r["seconds"] for r in steps)
    assert result.figures["model_flops_per_second"] == pytest.approx(total)
    assert result.figures["model_flops_utilization"] is None  # no peak is known of a CPU
    assert "GFLOP/s" in text and "GFLOP/s" in (directory / "report.html").read_text()
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert samples[0]["prompt"] == "tau" and samples[0]["reference"] == "TAU"
    assert samples[0]["base"] != samples[0]["tuned"]
    assert checkpoint.saved_steps(directory / "checkpoints") == [8, 12]
    assert "layers/self_attn/q_proj/kernel" in text and "nf4" in text
    assert "Held-out loss after 12 steps" in text and "report.html" in text


def test_the_adapter_is_that_of_the_last_step(finished):
    config, result, _ = finished
    model = jq.load_model(config.model, quantization="nf4")
    adapter = jq.load_adapter(Path(config.output) / "adapter", model)
    tokens = jnp.asarray(np.arange(3, 40)[None])
    base = model.apply(model.params, tokens)
    assert float(jnp.abs(model.apply(jq.attach(model.params, adapter), tokens) - base).max()) > 0.1
    state = final_state(config)
    assert all(np.asarray(pair.b[0]).tobytes() in state for pair in adapter.values())


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    config, result, _ = finished
    monkeypatch.setattr(recipe, "CompiledSteps", None)
    again, text = run(config)
    assert again == result
    assert "is complete: 12 steps" in text


def test_other_settings_in_the_same_directory_are_refused(finished):
    config, _, _ = finished
    before = (Path(config.output) / "config.toml").read_bytes()
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e-3))
    with pytest.raises(InputError, match="optim.learning_rate was 0.005, is 0.001. Restore"):
        run(other)
    assert (Path(config.output) / "config.toml").read_bytes() == before


@pytest.mark.parametrize(("when", "number"), [(5, signal.SIGINT), (6, signal.SIGTERM)])
def test_an_interrupted_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch, when, number):
    """Every loss, every weight and every moment equal those of the run that was never stopped."""
    whole, _, _ = finished
    config = dataclasses.replace(whole, output=str(tmp_path / "cut"))
    add = Metrics.add

    def add_and_interrupt(self, **values):
        if values["step"] == when and "loss" in values:
            os.kill(os.getpid(), number)
        return add(self, **values)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "add", add_and_interrupt)
        result, text = run(config)
    assert (result.step, result.interrupted, result.figures) == (when, number, {})
    assert f"Stopped after step {when} of 12" in text and "same command resumes" in text
    assert not (Path(config.output) / "run.json").exists()

    result, text = run(config)
    assert f"Resuming after step {when} of 12" in text
    assert result.step == 12 and result.interrupted == 0
    assert steps_of(Path(config.output)) == steps_of(Path(whole.output))
    assert final_state(config) == final_state(whole)
    for name in ("samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (Path(config.output) / name).read_bytes() == (Path(whole.output) / name).read_bytes()


@needs_host
def test_a_run_with_streamed_weights_is_the_same_run(finished, tmp_path):
    """The 4-bit weights stay in host memory; every bit of what is learned is the same."""
    whole, _, _ = finished
    quant = dataclasses.replace(whole.quant, streamed=True)
    config = dataclasses.replace(whole, output=str(tmp_path / "streamed"), quant=quant)
    _, text = run(config)
    assert steps_of(Path(config.output)) == steps_of(Path(whole.output))
    assert final_state(config) == final_state(whole)


def test_a_run_with_8bit_moments_resumes_wherever_they_live(tmp_path, monkeypatch):
    """`optim.placement` moves no bit, so a run that was begun with one goes on with the other."""
    config = settings(
        tmp_path / "run",
        method="lora",
        lora={"rank": 64},
        optim={"state": "8bit", "learning_rate": 2e-3, "warmup_steps": 0},
        train={"steps": 4},
        eval={"every": 4, "answers": 0, "samples": 0},
    )
    add = Metrics.add

    def add_and_interrupt(self, **values):
        if values["step"] == 2 and "loss" in values:
            os.kill(os.getpid(), signal.SIGINT)
        return add(self, **values)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "add", add_and_interrupt)
        assert run(config)[0].step == 2
    if jax.__version_info__ >= (0, 12):  # before, a CPU has no host memory
        optim = dataclasses.replace(config.optim, placement="host")
        config = dataclasses.replace(config, optim=optim)
    result, text = run(config)
    assert "Resuming after step 2" in text
    assert result.figures["held_out_loss_after"] < result.figures["held_out_loss_before"] - 0.02


def test_a_run_cut_while_answering_is_finished_later(finished, tmp_path, monkeypatch):
    whole, _, _ = finished
    config = dataclasses.replace(whole, output=str(tmp_path / "cut"))
    answer_after = recipe.Answers.answer_after

    def interrupt(self, params, show, stop):
        os.kill(os.getpid(), signal.SIGINT)
        answer_after(self, params, show, stop)

    with monkeypatch.context() as patched:
        patched.setattr(recipe.Answers, "answer_after", interrupt)
        assert run(config)[0].interrupted == signal.SIGINT
    result, text = run(config)
    assert result.interrupted == 0 and "Compiled" not in text
    assert result.figures["chrf_tuned"] == finished[1].figures["chrf_tuned"]


def test_lora_on_a_dense_base_leaves_the_base_alone(tmp_path):
    config = settings(tmp_path / "lora", method="lora", eval={"answers": 0, "samples": 0})
    result, text = run(config)
    assert "nf4" not in text and result.figures["held_out_loss_after"] < 5.5
    assert "None were answered" in (tmp_path / "lora" / "report.html").read_text()


def test_every_weight_can_train(tmp_path):
    config = settings(
        tmp_path / "full",
        method="full",
        train={"steps": 4},
        optim={"learning_rate": 1e-3},
        eval={"answers": 2},
    )
    run(config)
    model = jq.load_model(tmp_path / "full" / "model", quantization=None)
    before = jq.load_model(LLAMA, quantization=None)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), model.params, before.params)
    assert all(jax.tree.leaves(moved))


def test_lengths_are_compiled_longest_first(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "a " * n}, {"role": "assistant", "content": "b"}]}
        for n in [1, 2, 3, 4, 5, 6, 7, 40, 2, 3]
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = settings(
        tmp_path / "run",
        method="lora",
        data={"source": str(source), "length_multiple": 16, "max_length": 128},
        train={"batch_size": 1, "steps": 6},
        eval={"examples": 2, "answers": 0},
    )
    text = run(config)[1]
    compiled = [line for line in text.splitlines() if line.startswith("Compiled the step")]
    assert len(compiled) == 2
    assert int(compiled[0].split()[6]) > int(compiled[1].split()[6])


def test_nothing_is_saved_of_a_step_that_is_no_number(tmp_path):
    config = settings(
        tmp_path / "nan",
        method="lora",
        optim={"learning_rate": 1e38, "warmup_steps": 0, "clip_norm": 0.0},
        train={"checkpoint_every": 1},
        eval={"answers": 0},
    )
    with pytest.raises(InputError, match="Step 2: the loss is nan"):
        run(config)
    assert checkpoint.saved_steps(tmp_path / "nan" / "checkpoints") == [1]


def test_bad_settings_stop_before_anything_is_written(tmp_path):
    config = settings(tmp_path / "run", data={"max_length": 4096})
    with pytest.raises(InputError, match="data.max_length: expected at most 128, the context of"):
        run(config)
    config = settings(tmp_path / "run", lora={"targets": ("q_prj",)})
    with pytest.raises(InputError, match="'q_prj' matches no kernel .*q_proj"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"train": {"remat": "offload"}}, 'Use remat "full"'),
        ({"optim": {"placement": "host"}}, 'Use placement "device"'),
        ({"quant": {"streamed": True}}, "quant.streamed = false"),
    ],
)
def test_a_device_without_host_memory_is_refused_first(tmp_path, monkeypatch, changes, way_out):
    """Before the model is looked for, in a run as in `load_model`."""

    class Bare:
        platform, device_kind = "npu", "Bare 1"

        def addressable_memories(self) -> list[Any]:
            return []

    monkeypatch.setattr(jax, "devices", lambda: [Bare()])
    config = dataclasses.replace(settings(tmp_path / "run", **changes), model="no such model")
    with pytest.raises(InputError, match=f"npu .*{way_out}"):
        run(config)
    assert not (tmp_path / "run").exists()
    if "optim" not in changes:
        with pytest.raises(InputError, match=f"npu .*{way_out}"):
            jq.load_model(
                "no such model",
                remat=config.train.remat,
                streamed=config.quant.streamed,
            )


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(InputError, match="has no tokenizer.json, so text cannot"):
        load_data(Config(), None, context=128)


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch):
    state = init_state({"a": jnp.zeros(1000)}, optax.adam(1.0))
    monkeypatch.setattr(
        recipe.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 20_000_000})
    )
    with pytest.raises(InputError, match="expected 20 MB of free disk space .*, found 20 MB. Make"):
        recipe.check_room(tmp_path / "run", state, keep=2)
    monkeypatch.undo()
    recipe.check_room(tmp_path / "run", state, keep=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output: cannot make the directory"):
        recipe.check_room(tmp_path / "file" / "run", state, keep=2)
    assert nbytes(state) > 12_000


# --- stopping ---------------------------------------------------------------------------------


def test_a_ctrl_c_that_python_drops_is_not_lost():
    # a shell's background job starts with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts() as check:
            check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                check()  # as where the exception was raised in a callback, and ignored
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_stops_at_once():
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with stop_requests(said.append) as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGINT and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    answers: list[int] = []

    def body():
        with stop_requests(print) as stop:
            answers.append(stop())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert answers == [0]
