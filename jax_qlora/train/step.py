# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: its state, how it is computed, and compiling it before it is needed."""

import ctypes
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..config import Config, OptimConfig
from ..errors import InputError
from ..evaluate import Batch, answer_loss, assemble
from ..models import Model
from ..optim import Paging, adamw, make_paging, make_schedule
from ..report import Display
from ..typing import Array, PyTree
from .memory import MemoryCheck


class TrainState(NamedTuple):
    """All that changes from step to step, and all that a checkpoint holds."""

    trainable: PyTree
    """The adapter, or every weight with method "full"; float32."""
    optimizer: PyTree
    """Moments and counts of optax."""
    step: Array
    """int32, optimizer steps done."""
    loss_scale: Array
    """float32; always 1 unless the compute type is float16."""
    good_steps: Array
    """int32, steps since the loss scale last changed."""


Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Array]]]

_SCALE_GROWS_AFTER = 200  # steps without an overflow, as in mixed-precision training at large


def init_state(
    trainable: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    half: bool = False,
    paging: Paging | None = None,
) -> TrainState:
    """Return the state before the first step.

    Args:
        trainable: What trains, float32.
        optimizer: Its state is made for `trainable` alone.
        half: Whether the compute type is float16; the loss scale then starts at 2**15.
        paging: Puts the optimizer's state where it lives; absent: on the device.
    """
    paging = make_paging("device") if paging is None else paging
    return TrainState(
        trainable=trainable,
        optimizer=paging.to_host(optimizer.init(trainable)),
        step=jnp.int32(0),
        loss_scale=jnp.float32(2.0**15 if half else 1.0),
        good_steps=jnp.int32(0),
    )


def make_optimizer(
    config: OptimConfig, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer that `config` describes, and its learning rate as a function of steps.

    Args:
        config: Settings; `placement` is not the optimizer's affair but `make_paging`'s.
        steps: Length of the run.
    """
    schedule = make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        steps=steps,
        warmup_steps=config.warmup_steps,
        final_fraction=config.final_fraction,
    )
    optimizer = adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        lora_plus_ratio=config.lora_plus_ratio,
        state=config.state,
    )
    return optimizer, schedule


def make_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: Config,
    *,
    width: int,
    half: bool = False,
    paging: Paging | None = None,
) -> Step:
    """Return the function of one optimizer step: `(state, frozen, batch) -> (state, values)`.

    The loss is the mean over all answer tokens of the batch, however they are spread over its
    accumulated parts. With `half` the loss is scaled so that float16 gradients do not vanish; a
    step whose gradients overflowed changes nothing but the scale, which is halved.

    Args:
        model: The decoder.
        optimizer: Acts on `state.trainable`.
        config: Settings of the loop; seed and dropout.
        width: Most answer tokens in a row, from `answer_width`.
        half: Whether the compute type is float16.
        paging: Brings the optimizer's state to the device and puts it back; absent: it is there.

    Returns:
        A pure function. `batch` has the arrays of `make_batch` with a leading axis of accumulated
        parts; values are float32 "loss" and "grad_norm" (before clipping).
    """
    accumulate, chunk = config.train.accumulate, config.train.loss_chunk
    paging = make_paging("device") if paging is None else paging

    def loss(trainable: PyTree, frozen: PyTree, part: Batch, scale: Array, key: Any) -> Array:
        params = assemble(trainable, frozen, dropout_key=key)
        return answer_loss(model, params, part, width=width, chunk=chunk, scale=scale)[0]

    def step(
        state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        count = jnp.sum(batch["loss_mask"][..., 1:], dtype=jnp.float32)
        scale = state.loss_scale / count
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def gradients(index: Array, part: Batch) -> tuple[Array, PyTree]:
            part_key = jax.random.fold_in(key, index) if config.lora.dropout else None
            return jax.value_and_grad(loss)(state.trainable, frozen, part, scale, part_key)

        def add(total: PyTree, item: tuple[Array, Batch]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradients(*item)), None

        if accumulate == 1:
            total, grads = gradients(jnp.int32(0), jax.tree.map(lambda x: x[0], batch))
        else:
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
            parts = (jnp.arange(accumulate, dtype=jnp.int32), batch)
            (total, grads), _ = jax.lax.scan(add, zero, parts)
        grads = jax.tree.map(lambda g: g / state.loss_scale, grads)
        norm = optax.tree.norm(grads)
        state = state._replace(optimizer=paging.to_device(state.optimizer))
        updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        new = TrainState(
            trainable=optax.apply_updates(state.trainable, updates),
            optimizer=moments,
            step=state.step + jnp.int32(1),
            loss_scale=state.loss_scale,
            good_steps=state.good_steps,
        )
        if half:
            new = _skip_overflow(state, new, jnp.isfinite(norm))
        new = new._replace(optimizer=paging.to_host(new.optimizer))
        return new, {"loss": total / state.loss_scale, "grad_norm": norm}

    return step


def _skip_overflow(old: TrainState, new: TrainState, fine: Array) -> TrainState:
    """Keep the old state when gradients overflowed, and set the loss scale for the next step."""
    kept = jax.tree.map(lambda x, y: jnp.where(fine, y, x), old, new)
    grow = fine & (old.good_steps >= _SCALE_GROWS_AFTER)
    factor = jnp.where(fine, jnp.where(grow, 2.0, 1.0), 0.5)
    good_steps = jnp.where(fine & ~grow, old.good_steps + jnp.int32(1), jnp.int32(0))
    return kept._replace(
        step=new.step,
        loss_scale=jnp.maximum(old.loss_scale * factor, 1.0),
        good_steps=good_steps,
    )


def compiler_options(config: Config, platform: str) -> dict[str, Any]:
    """Return what the compiler is told: to fetch streamed weights while it computes.

    For that it may hold two fifths of what the arguments leave of a card. Elsewhere the same
    scheduling would only hold more at once.

    Args:
        config: Settings of the run.
        platform: What is compiled for.
    """
    if platform == "gpu" and config.quant.streamed:
        return {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            "xla_gpu_memory_limit_slop_factor": 40,  # percent
        }
    return {}


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc).

    Compiling a step leaves some 200 MB behind, freed and still counted as the process's own.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class CompiledSteps:
    """A step compiled once for each length of batch, with its memory known before it runs."""

    def __init__(
        self,
        step: Step,
        config: Config,
        show: Display,
        memory: MemoryCheck | None = None,
    ):
        """Prepare to compile; nothing is compiled yet.

        Args:
            step: From `make_step`. The state given to it is donated.
            config: Settings of the run.
            show: Where to print.
            memory: Compares what is compiled with the device; absent: nothing does.
        """
        self._options = compiler_options(config, jax.devices()[0].platform)
        self._step = step
        self._show = show
        self._memory = memory
        self._compiled: dict[int, tuple[Any, Any]] = {}  # of each length: the form, the program

    def compile(self, state: TrainState, frozen: PyTree, batch: Batch) -> None:
        """Compile for arguments of this form, unless that is done already.

        Args:
            state: Arrays, or their shapes and where they will live.
            frozen: The base, likewise.
            batch: One batch, likewise.

        Raises:
            InputError: The device is known to have too little memory for it.
        """
        parts, rows, length = batch["tokens"].shape
        return_freed_memory()  # what reading a model left, before more is taken
        form = form_of((state, frozen, batch))
        if length in self._compiled and self._compiled[length][0] == form:
            return
        self._compiled.pop(length, None)
        shape = f"{parts} x {rows} x {length}" if parts > 1 else f"{rows} x {length}"
        began = time.monotonic()
        # every part of the state comes back in the memory, host's or device's, that it came from
        where = (jax.tree.map(lambda x: x.sharding, state), None)
        step = jax.jit(self._step, donate_argnums=0, out_shardings=where)
        compiled = step.lower(state, frozen, batch).compile(self._options)
        self._compiled[length] = (form, compiled)
        return_freed_memory()
        seconds = time.monotonic() - began
        needs = "" if self._memory is None else self._memory.measure(compiled, state, frozen)
        self._show.print(
            f"Compiled the step for {shape} tokens in {seconds:.1f} s" + (needs and f"; {needs}")
        )

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Run one step, compiling it first if its length is new."""
        length = batch["tokens"].shape[-1]
        if length not in self._compiled:
            self.compile(state, frozen, batch)
        state, values = self._compiled[length][1](state, frozen, batch)
        return state, jax.block_until_ready(values)


def form_of(tree: PyTree) -> tuple[Any, list[Any]]:
    """Return what a program is compiled for: structure, shapes, dtypes and kinds of memory.

    Args:
        tree: Arrays, or their shapes and where they will live.
    """
    usual = jax.devices()[0].default_memory().kind  # where NumPy's arrays are brought

    def one(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        return x.shape, jnp.dtype(x.dtype), usual if sharding is None else sharding.memory_kind

    leaves, structure = jax.tree.flatten(tree)
    return structure, [one(x) for x in leaves]


def check_finite(step: int, values: dict[str, Any], state: TrainState, config: Config) -> None:
    """Check that the loss and its gradient are numbers.

    In float16 an overflow of the gradient is expected now and then: the step was skipped.

    Args:
        step: The step just made, counted from 1.
        values: What it returned.
        state: The state after it.
        config: Settings, named in the advice.

    Raises:
        InputError: They are not.
    """
    loss, norm, scale = (
        float(np.asarray(x)) for x in (values["loss"], values["grad_norm"], state.loss_scale)
    )
    if math.isfinite(loss) and (math.isfinite(norm) or scale > 1):
        return
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    bad = loss if what == "loss" else norm
    raise InputError(
        f"Step {step}: the {what} is {bad}, expected a finite number. Nothing of this step was "
        "saved; earlier checkpoints are whole. Try a smaller optim.learning_rate (now "
        f"{config.optim.learning_rate:g}), more optim.warmup_steps, optim.clip_norm = 1.0, or "
        'train.compute_dtype = "float32".'
    )
