# SPDX-License-Identifier: Apache-2.0
"""The planner's process, `python -m jax_qlora.planner.worker`: compiles one case.

A process of its own, because compiling for a GPU that is not there needs jax started with the CPU
alone, and because a compiler that fails may take its process with it.
"""

import contextlib
import json
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from ..config import Config, from_table
from ..costs.formula import Bytes
from ..costs.gpus import Gpu
from ..costs.held import held
from ..costs.tpus import Tpu
from ..models import DecoderConfig, RopeScaling
from ..optim import page_between
from ..train.shapes import Run, abstract_run, place_run
from ..train.step import compiler_options
from .compiler import AHEAD_OF_TIME, Placed, compile_lowered, describe_device, planned
from .tpu import describe_chip, wanted_bytes


def compile_case(decoder: DecoderConfig, config: Config, card: Gpu | Tpu, *, seq: int) -> Bytes:
    """Compiles the training step for a card or chip; returns what it needs, by part.

    Raises:
        JaxRuntimeError: The compiler failed, other than for want of memory.
        InputError: It cannot run here.
    """
    lowered, options, run = lower_step(decoder, config, card, seq=seq)
    paged = config.optim.placement == "host"
    parts = held(run.state.trainable, run.state.optimizer, run.frozen, paged=paged)
    try:
        needed = planned(compile_lowered(lowered, options))
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler makes no plan that does not fit
        if (wanted := wanted_bytes(str(error))) is None:
            raise
        return replace(parts, temporaries=max(wanted, card.memory - parts.device + 1))
    return replace(parts, temporaries=needed.device - parts.device, host=needed.host)


def compile_step(decoder: DecoderConfig, config: Config, gpu: Gpu, *, seq: int) -> tuple[Any, Run]:
    """The training step compiled for a card, and the run it belongs to."""
    lowered, options, run = lower_step(decoder, config, gpu, seq=seq)
    return compile_lowered(lowered, options), run


def lower_step(
    decoder: DecoderConfig, config: Config, card: Gpu | Tpu, *, seq: int
) -> tuple[Any, dict[str, Any], Run]:
    """The training step lowered for a card or chip, what its compiler is told, and the run."""
    if isinstance(card, Tpu):
        chip, platform, told = describe_chip(card), "tpu", {}
        device, host = (
            SingleDeviceSharding(chip, memory_kind=kind) for kind in ("device", "pinned_host")
        )
    else:
        target, platform, told = describe_device(card), "gpu", AHEAD_OF_TIME
        device, host = Placed(target, "device"), Placed(target, "pinned_host")
    paged = config.optim.placement == "host"
    paging = page_between(device, host) if paged else None
    dtype = jnp.float16 if card.half else jnp.bfloat16
    run = abstract_run(decoder, config, seq=seq, compute_dtype=dtype, paging=paging)
    run = place_run(run, config, device=device, host=host)
    places: dict[str, Any] = {}
    if paged:
        values = {"loss": device, "grad_norm": device}
        places["out_shardings"] = (jax.tree.map(lambda x: x.sharding, run.state), values)
    step = jax.jit(run.step, donate_argnums=0, **places)
    lowered = step.lower(run.state, run.frozen, run.batch)
    return lowered, {**told, **compiler_options(config, platform)}, run


def main() -> int:
    """Reads one case as JSON, answers in one line of JSON."""
    case = json.load(sys.stdin)
    decoder = decoder_from_json(case["decoder"])
    config = from_table(case["config"], where="settings")
    values = case["card"]
    card: Gpu | Tpu = (
        Tpu(**values)
        if "topology" in values
        else Gpu(**{**values, "capability": tuple(values["capability"])})
    )
    began = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        needed = compile_case(decoder, config, card, seq=case["seq"])
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"planned": asdict(needed), "seconds": seconds, "jax": jax.__version__}))
    return 0


def decoder_from_json(values: dict[str, Any]) -> DecoderConfig:
    """A model's shape from its fields, as `dataclasses.asdict` and JSON give them."""
    scaling = values.get("rope_scaling")
    return DecoderConfig(
        **{
            **values,
            "rope_scaling": RopeScaling(**scaling) if scaling else None,
            "eos_token_ids": tuple(values["eos_token_ids"]),
            "local_layers": tuple(values["local_layers"]),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
