# SPDX-License-Identifier: Apache-2.0
"""The recipe: fine-tune a decoder with LoRA on a 4-bit base, from settings to adapter.

Read `train` from top to bottom. What trains (the adapter) and what does not (the base) are two
trees from the start; gradients, optimizer state and checkpoints know only the first.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from rich.console import Console

from .. import checkpoint
from ..config import Config, check_config, run_identity, to_toml
from ..errors import InputError
from ..evaluate import Batch, answer_loss, assemble, held_out_batches, held_out_loss
from ..interop.load import load_model, stored_dtypes, training_compute_dtype
from ..interop.peft_select import Beside, select_beside
from ..lora import Targets, split_virtual, summary
from ..lora.inits import PLAIN_INITS
from ..models import DecoderConfig, Model
from ..models.cudnn_attention import check_device
from ..models.layer_loop import check_whole_rows
from ..optim import Paging, make_paging
from ..quant.streaming import check_host_memory, streaming_memory
from ..report import Display, Metrics, write_text
from ..tree import nbytes
from ..typing import Array, PyTree
from .answers import Answers, held_out_prompts, system_prompt
from .continued import check_adapter, check_form
from .examples import Data, load_data, read_description
from .memory import MemoryCheck, on_shortage
from .outcome import finish
from .prompt import prompt_shapes
from .shapes import Run, abstract_run, place_run
from .speed import batch_flops, describe_speed, speed_figures
from .start import find_decoder_targets, load_start
from .step import CompiledSteps, TrainState, check_finite, init_state, make_optimizer
from .stop import interrupts, stop_requests


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
        step: Optimizer steps done.
        interrupted: Number of the signal that stopped it early, or 0.
        figures: What was measured; empty when it was interrupted.
    """

    step: int
    interrupted: int
    figures: dict[str, Any]


def train(config: Config, *, console: Console | None = None) -> Result:
    """Fine-tune as `config` says, and write everything about the run under `config.output`.

    The same settings with the same directory resume from the last checkpoint, to the same bits as
    a run that was never stopped. Ctrl-C or SIGTERM finish the step, save a checkpoint and return.

    Args:
        config: From `load_config`, or built in Python.
        console: Where to print; standard output by default.

    Returns:
        The step reached, whether it was interrupted, and what was measured.

    Raises:
        InputError: Bad settings, model or data; a directory that holds another run; too little
            memory or disk; or a loss that is no longer finite.
    """
    check_config(config)
    total, run = config.train.steps, Path(config.output)
    saved = run / "checkpoints"
    with (
        Display(console or Console()) as show,
        interrupts() as check_interrupt,
        contextlib.ExitStack() as stack,
    ):
        # Whatever can be wrong is looked at before the weights are read.
        checkpoint.check_identity(saved, run_identity(config))
        trained = checkpoint.saved_steps(saved)[-1:] == [total]
        if trained and (run / "run.json").exists():
            show.print(
                f"'{run}' is complete: {total} steps, report in '{run}/report.html'. For another "
                "run choose another --output; to measure again delete run.json."
            )
            figures = json.loads((run / "run.json").read_text("utf-8"))
            return Result(step=total, interrupted=0, figures=figures)
        paging = make_paging(config.optim.placement)
        check_host_memory(streamed=config.quant.streamed, remat=config.train.remat)
        decoder, tokenizer, new_tokens = read_description(config.model, config.data.new_tokens)
        check_adapter(config)
        if config.train.attention == "cudnn":
            check_device(decoder, _compute_dtype(config))
        targets = find_decoder_targets(decoder, config)
        beside = Beside()
        if config.method != "full":
            beside = select_beside(config.lora, decoder, targets, new_tokens=new_tokens)
        prompt_shapes(config, decoder)  # too many virtual tokens for the model show here
        data = load_data(config, tokenizer, context=decoder.max_length)
        check_rows(config, data)
        memory = MemoryCheck(decoder, config, targets, seq=data.longest)
        stack.enter_context(on_shortage(memory.explain))  # from here on it can run out

        # Compile for the longest batch there can be, so that too little memory shows now.
        shapes = run_shapes(config, decoder, data, paging, targets, beside)
        check_form(config, decoder, shapes.state.trainable)
        check_room(run, shapes.state, keep=config.train.keep_checkpoints)
        steps = CompiledSteps(shapes.step, config, show, memory)
        if not trained:
            steps.compile(shapes.state, shapes.frozen, shapes.batch)

        # What trains, and what is frozen.
        model, trainable, frozen = load(config, targets, beside, show)
        # The start is written off the adapter in the end, where it came out of the weights.
        from_weights = frozen is not None and config.lora.init not in PLAIN_INITS
        start = jax.device_get(split_virtual(trainable)[0]) if from_weights else None
        rows = config.train.batch_size * config.train.accumulate
        show.print(
            f"{len(data.train):,} examples to learn, {len(data.held_out)} held out; "
            f"{total} steps of {rows} x {data.longest} tokens at most"
        )

        # The optimizer sees the trainable tree alone.
        check_interrupt()
        optimizer, schedule = make_optimizer(config.optim, total)
        half = jnp.dtype(model.compute_dtype) == jnp.float16
        state = init_state(trainable, optimizer, half=half, paging=paging)

        # Resume, if this very run has been here before.
        identity = run_identity(config) | {
            "weights": checkpoint.fingerprint((trainable, frozen)),
            "compute_dtype": jnp.dtype(model.compute_dtype).name,
            "examples": checkpoint.fingerprint([example.tokens for example in data.train]),
        }
        if found := checkpoint.restore(saved, state, identity=identity):
            state = found[1]
            show.print(f"Resuming after step {found[0]} of {total}.")
        write_text(run / "config.toml", to_toml(config))
        first = int(state.step)
        metrics = Metrics(run / "metrics.jsonl", resume_step=first)

        if first < total:  # compiles again where the weights came in another form
            steps.compile(state, frozen, data.batch(first, length=data.longest))

        @jax.jit
        def loss_of(trainable: PyTree, frozen: PyTree, batch: Batch) -> tuple[Array, Array]:
            params = assemble(trainable, frozen)
            return answer_loss(
                model, params, batch, width=data.width, chunk=config.train.loss_chunk
            )

        held_out = held_out_batches(
            data.held_out,
            batch_size=config.train.batch_size,
            length_multiple=config.data.length_multiple,
        )

        def due(step: int) -> bool:
            return step % config.eval.every == 0 or step == total

        def save(state: TrainState) -> None:
            keep = config.train.keep_checkpoints
            checkpoint.save(saved, int(state.step), state, identity=identity, keep=keep)

        check_interrupt()
        with stop_requests(show.print) as stop:

            def measure(state: TrainState) -> None:
                # before the first step virtual tokens are not the base yet, so they are left out
                now = state.trainable if int(state.step) else split_virtual(state.trainable)[0]
                loss = functools.partial(loss_of, now, frozen)
                with show.phase("Held-out loss", len(held_out), brief=True) as phase:
                    mean = held_out_loss(loss, held_out, on_batch=phase.update, stop=stop)
                if not stop():
                    metrics.add(step=int(state.step), held_out_loss=mean)
                    show.print(f"Held-out loss after {int(state.step)} steps: {mean:.4f}")

            # Before: a resumed run has measured and answered already, unless it was cut short.
            if due(first) and not any(
                r["step"] == first and "held_out_loss" in r for r in metrics.records
            ):
                measure(state)
            prompts = held_out_prompts(data, model, config.eval.answers)
            answers = Answers(prompts, model, config, run)
            if first == 0 or not answers.recall_before():
                answers.answer_before(assemble(split_virtual(trainable)[0], frozen), show, stop)
            del trainable  # the first step donates it

            # During.
            began, tokens_seen = time.monotonic(), 0
            with show.phase("Training", total, done=first) as phase:
                for step in range(first + 1, total + 1):
                    if stop():
                        break
                    started = time.monotonic()
                    batch = data.batch(step - 1)
                    state, values = steps(state, frozen, batch)
                    check_finite(step, values, state, config)
                    tokens = int(batch["attention_mask"].sum())
                    record = metrics.add(
                        step=step,
                        loss=float(values["loss"]),
                        grad_norm=float(values["grad_norm"]),
                        learning_rate=float(np.asarray(schedule(step - 1))),
                        tokens=tokens,
                        flops=batch_flops(decoder, batch, full=config.method == "full"),
                        seconds=round(time.monotonic() - started, 4),
                    )
                    tokens_seen += tokens
                    rate = tokens_seen / (time.monotonic() - began)
                    speed = describe_speed(speed_figures([record]))
                    phase.update(step, f"loss {record['loss']:.3f}  {rate:,.0f} tokens/s  {speed}")
                    if step % config.train.checkpoint_every == 0 or step == total:
                        save(state)
                    if due(step) and not stop():
                        measure(state)

            # After.
            if not stop():
                answers.answer_after(assemble(state.trainable, frozen), show, stop)
            if number := stop():
                save(state)
                show.print(
                    f"Stopped after step {int(state.step)} of {total}; everything is saved in "
                    f"'{saved}'. The same command resumes from there."
                )
                return Result(step=int(state.step), interrupted=number, figures={})
        about = {
            "system_prompt": system_prompt(data),
            "compute_dtype": jnp.dtype(model.compute_dtype).name,
        }
        figures = finish(
            config, model, state.trainable, start, metrics.records, answers, about, show
        )
        return Result(step=total, interrupted=0, figures=figures)


def load(
    config: Config, targets: Targets, beside: Beside, show: Display
) -> tuple[Model, PyTree, PyTree | None]:
    """Return the model, what trains, and the frozen base.

    Args:
        config: Settings.
        targets: Kernels to adapt; with method "full" every weight trains, and nothing is frozen.
        beside: What else trains.
        show: Prints the table of what is frozen and what trains.

    Raises:
        InputError: The model cannot be read.
    """
    options: dict[str, Any] = dict(
        compute_dtype=_compute_dtype(config),
        remat=config.train.remat,
        attention=config.train.attention,
        layer_chunk=config.train.layer_chunk,
        streamed=config.quant.streamed,
    )
    if config.method == "full":
        model = load_model(
            config.model, quantization=None, new_tokens=config.data.new_tokens, **options
        )
        show.print(summary(model.params))
        params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
        return dataclasses.replace(model, params=None), params, None
    model, adapter = load_start(config, targets, beside, **options)
    show.print(summary(model.params, adapter))
    return model, adapter, model.params


def _compute_dtype(config: Config) -> Any:
    dtype = config.train.compute_dtype
    return jnp.dtype(training_compute_dtype() if dtype == "auto" else dtype)


def run_shapes(
    config: Config,
    decoder: DecoderConfig,
    data: Data,
    paging: Paging,
    targets: Targets,
    beside: Beside,
) -> Run:
    """Return the step on the longest batch as shapes, and where its arguments will live.

    Args:
        config: Settings.
        decoder: The model's shape.
        data: The examples.
        paging: How the optimizer's state moves.
        targets: Kernels to adapt.
        beside: What else trains.

    Raises:
        InputError: The files of the model do not hold its weights.
    """
    quantization = config.quant.format if config.method == "qlora" else None
    run = abstract_run(
        decoder,
        config,
        seq=data.longest,
        compute_dtype=_compute_dtype(config),
        width=data.width,
        paging=paging,
        stored=stored_dtypes(
            config.model, quantization=quantization, new_tokens=config.data.new_tokens
        ),
        targets=targets,
        beside=beside,
    )
    device = SingleDeviceSharding(jax.devices()[0])
    waits = config.quant.streamed or config.optim.placement == "host"
    return place_run(run, config, device=device, host=streaming_memory() if waits else device)


def check_rows(config: Config, data: Data) -> None:
    """Check that cuDNN's attention, where it is asked for, meets rows as a whole.

    Args:
        config: Settings.
        data: The examples.

    Raises:
        InputError: A chunk of a layer is shorter.
    """
    if config.train.attention == "cudnn" and config.train.remat in ("full", "offload"):
        longest = max(data.longest, data.longest_held_out) + config.virtual_tokens
        check_whole_rows(config.train.batch_size, longest, config.train.layer_chunk)


def check_room(run: Path, state: TrainState, *, keep: int) -> None:
    """Check that the disk has room for all that a run will write.

    Args:
        run: The run's directory; made when missing.
        state: What checkpoints hold.
        keep: Checkpoints kept; one more exists while it is written.

    Raises:
        InputError: Too little room, or the directory cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: cannot make the directory '{run}': {error}.") from error
    needed = (keep + 1) * nbytes(state) + nbytes(state.trainable) + 20_000_000
    free = shutil.disk_usage(run).free
    if free < needed:
        raise InputError(
            f"'{run}': expected {needed / 1e6:,.0f} MB of free disk space for checkpoints and "
            f"results, found {free / 1e6:,.0f} MB. Make room or choose another --output."
        )
