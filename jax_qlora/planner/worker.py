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

from ..config import Config, from_table
from ..costs.formula import Bytes
from ..costs.gpus import Gpu
from ..models import DecoderConfig, RopeScaling
from ..optim import page_between
from ..quant import QuantizedArray
from ..train.step import compiler_options
from ..tree import nbytes
from .compiler import Placed, compile_lowered, describe_device, place, planned
from .shapes import Run, abstract_run


def compile_case(decoder: DecoderConfig, config: Config, gpu: Gpu, *, seq: int) -> Bytes:
    """Compiles the training step for a card; returns what it needs, by part."""
    compiled, run = compile_step(decoder, config, gpu, seq=seq)
    needed, parts = planned(compiled), held(run)
    if config.optim.placement == "host":
        parts = replace(parts, optimizer=0)
    return replace(parts, temporaries=needed.device - parts.device, host=needed.host)


def compile_step(decoder: DecoderConfig, config: Config, gpu: Gpu, *, seq: int) -> tuple[Any, Run]:
    """The training step compiled for a card, and the run it belongs to."""
    target = describe_device(gpu)
    device, host = Placed(target, "device"), Placed(target, "pinned_host")
    paged = config.optim.placement == "host"
    paging = page_between(device, host) if paged else None
    run = abstract_run(decoder, config, seq=seq, half=gpu.half, paging=paging)

    def moments(x: Any) -> Any:
        return place(x, host if x.ndim else device)

    state = place(run.state, device)
    if paged:
        state = state._replace(optimizer=jax.tree.map(moments, run.state.optimizer))
    options: dict[str, Any] = {}
    if paged:
        values = {"loss": device, "grad_norm": device}
        options["out_shardings"] = (jax.tree.map(lambda x: x.sharding, state), values)
    step = jax.jit(run.step, donate_argnums=0, **options)
    batch = place(run.batch, device)
    frozen = jax.tree.map(
        lambda x: place(x, host if getattr(x, "streamed", False) else device),
        run.frozen,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )
    lowered = step.lower(state, frozen, batch)
    return compile_lowered(lowered, compiler_options(config, "gpu")), run


def held(run: Run) -> Bytes:
    """What a run holds between steps; streamed kernels, on the host, are left out."""
    constants = streamed = 0
    for x in jax.tree.leaves(run.frozen, is_leaf=lambda x: isinstance(x, QuantizedArray)):
        if isinstance(x, QuantizedArray) and x.streamed:
            streamed += nbytes(x)
        elif isinstance(x, QuantizedArray):
            constants += nbytes((x.absmax, x.absmax_scale, x.absmax_offset))
    return Bytes(
        base=nbytes(run.frozen) - constants - streamed,
        constants=constants,
        trainable=nbytes(run.state.trainable),
        optimizer=nbytes(run.state.optimizer),
    )


def main() -> int:
    """Reads one case as JSON, answers in one line of JSON."""
    case = json.load(sys.stdin)
    decoder = decoder_from_json(case["decoder"])
    config = from_table(case["config"], where="settings")
    gpu = Gpu(**{**case["gpu"], "capability": tuple(case["gpu"]["capability"])})
    began = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        needed = compile_case(decoder, config, gpu, seq=case["seq"])
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
        }
    )


if __name__ == "__main__":
    sys.exit(main())
