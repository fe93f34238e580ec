# SPDX-License-Identifier: Apache-2.0
"""Will it fit? The training step of a run, compiled for a named GPU, and what to change if not."""

import dataclasses
import difflib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Config, TrainConfig, flat_settings, from_table, replaced
from ..costs.advice import MARGIN
from ..costs.formula import Bytes, estimate
from ..costs.gpus import Gpu, find_gpu, parse_memory
from ..costs.roofline import least_seconds
from ..costs.tpus import TPUS, Tpu
from ..errors import InputError
from ..interop.download import resolve
from ..interop.hf_config import read_config
from ..interop.open import read_shape
from ..lora import Targets
from ..models import DecoderConfig
from ..models.presets import PRESETS
from ..train.start import find_decoder_targets
from .compiler import missing_wheels
from .report import Report
from .tpu import ENVIRONMENT, missing_wheel

DEFAULTS = Config(train=TrainConfig(batch_size=1, remat="full"))
"""Settings of a plan that nothing else is said of."""

_SEQ = 512


def fit(
    model: str | Path | DecoderConfig,
    *,
    gpu: str = "rtx4090",
    memory: str | int | None = None,
    seq: int | None = None,
    config: Config = DEFAULTS,
    prove: bool = True,
    **settings: Any,
) -> Report:
    """Plan the memory of a training run on a GPU that need not be there. Reads no weights.

    The trainer's own step is compiled for that GPU by XLA's compiler, on shapes, in a process of
    its own. The answers about other settings are estimates: the formula, scaled to that plan.

    Args:
        model: A preset such as "llama-2-7b", a model directory, a bare config.json, a .gguf file, a
            downloaded name, a Hub id, or a `DecoderConfig`.
        gpu: Name of a card, e.g. "rtx4090", or of a TPU chip, "v5e"; see `jax_qlora.planner.GPUS`
            and `TPUS`.
        memory: Its memory, if other than the card's own: bytes, or text such as "16GiB".
        seq: Tokens of a row; by default `data.max_length`, or 512.
        config: Settings of the run; by default QLoRA, batch 1, layers recomputed.
        prove: Compile. If false, or where the compiler is not installed, the formula answers.
        **settings: Settings by their own names, over `config`: `rank=64`, `remat="offload"`,
            `placement="host"`, `method="lora"`.

    Returns:
        What is needed and whether it fits with 1 GiB to spare; print it for a table.

    Raises:
        InputError: Unknown model, GPU or setting, or a combination that cannot be.

    >>> report = fit("smollm2-135m", gpu="t4", prove=False, rank=8)
    >>> report.fits, report.device_bytes < 2 * 2**30
    (True, True)
    """
    decoder, name = read_decoder(model)
    config = with_settings(config, settings)
    grown = decoder.vocab_size + len(config.data.new_tokens)  # as if it had no rows to spare
    decoder = dataclasses.replace(decoder, vocab_size=grown)
    card = TPUS[gpu.lower()] if gpu.lower() in TPUS else find_gpu(gpu)
    if memory is not None:
        size = memory if isinstance(memory, int) else parse_memory(memory)
        card = dataclasses.replace(card, memory=size)
    room = decoder.max_length - config.virtual_tokens
    seq = seq or config.data.max_length or min(_SEQ, room)
    if seq > room:
        raise InputError(
            f"{seq} tokens: expected at most {room}, the context of '{name}'. Lower --seq."
        )

    @functools.cache
    def found_targets() -> Targets:
        return find_decoder_targets(decoder, config)

    def targets_of(config: Config) -> Targets | None:
        return None if config.method == "full" else found_targets()

    targets = targets_of(config)
    planned = estimate(decoder, config, targets, seq=seq)
    source, note, compiled = "formula", "", {}
    if prove:
        compiled, note = _compile(decoder, config, card, seq)
    scale = 1.0
    if compiled:
        maker = "TPU" if isinstance(card, Tpu) else "CUDA"
        source = f"XLA's {maker} compiler, jax {compiled['jax']}"
        formula, planned = planned, Bytes(**compiled["planned"])
        scale = planned.temporaries / max(formula.temporaries, 1)

    def other(config: Config, seq: int) -> Bytes:
        found = estimate(decoder, config, targets_of(config), seq=seq)
        return dataclasses.replace(found, temporaries=int(found.temporaries * scale))

    budget = card.memory - MARGIN
    return Report(
        model=name,
        gpu=card.name,
        capacity=card.memory,
        margin=MARGIN,
        seq=seq,
        config=config,
        planned=planned,
        source=source,
        note=note,
        seconds=compiled.get("seconds", 0.0),
        most=_most(other, config, seq, budget, decoder, targets),
        changes=_changes(other, config, seq),
        step_seconds=least_seconds(decoder, config, card, planned, seq=seq),
    )


def read_decoder(model: str | Path | DecoderConfig) -> tuple[DecoderConfig, str]:
    """The shape of a model, and what to call it; no weights are read.

    Raises:
        InputError: there is no such model, or its description is not understood.
    """
    if isinstance(model, DecoderConfig):
        return model, "this model"
    name = str(model)
    if name in PRESETS:
        return PRESETS[name], name
    path = Path(name).expanduser()
    if path.name == "config.json":
        return read_config(path.parent)[0], path.parent.name
    if "/" not in name and not path.exists():
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
        if near:
            raise InputError(
                f"'{name}' is no preset: did you mean {' or '.join(near)}? Or give a model "
                "directory, a config.json, a .gguf file or a Hub id."
            )
    path = resolve(name)
    return read_shape(path), name


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """`config` with settings by their own names, e.g. `{"rank": 64}`.

    Raises:
        InputError: there is no such setting, or it has no such value.
    """
    keys: dict[str, str] = {}
    for key in flat_settings(config):
        keys.setdefault(key.rpartition(".")[2], key)  # lora.init comes before prompt.init
    table = _table(config)
    for leaf, value in settings.items():
        if leaf not in keys:
            near = difflib.get_close_matches(leaf, keys, n=3, cutoff=0.5)
            raise InputError(
                f"setting '{leaf}': expected one of {', '.join(sorted(keys))}."
                + (f" Did you mean {' or '.join(near)}?" if near else "")
            )
        section = keys[leaf].rpartition(".")[0]
        (table.setdefault(section, {}) if section else table)[leaf] = value
    return from_table(table)


def _table(config: Config) -> dict[str, Any]:
    """Settings as a TOML file would nest them."""
    table: dict[str, Any] = {}
    for key, value in flat_settings(config).items():
        section, _, leaf = key.rpartition(".")
        if value is not None:
            (table.setdefault(section, {}) if section else table)[leaf] = value
    return table


def _compile(
    decoder: DecoderConfig, config: Config, card: Gpu | Tpu, seq: int
) -> tuple[dict[str, Any], str]:
    """What the compiler plans, and why it could not where it could not."""
    if config.train.attention == "cudnn":
        return {}, (
            "cuDNN plans its attention on the card itself, which is not here; what is compiled "
            'for a card that is not there is train.attention = "blocks"'
        )
    if why := missing_wheel() if isinstance(card, Tpu) else missing_wheels():
        return {}, why
    case = {
        "decoder": dataclasses.asdict(decoder),
        "config": _table(config),
        "card": dataclasses.asdict(card),
        "seq": seq,
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", **ENVIRONMENT}
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(
        [sys.executable, "-m", "jax_qlora.planner.worker"],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        env=environment,
    )
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return {}, f"the compiler failed: {lines[-1] if lines else run.returncode}"
    return json.loads(run.stdout.splitlines()[-1]), ""


def _most(
    other: Callable[[Config, int], Bytes],
    config: Config,
    seq: int,
    budget: int,
    decoder: DecoderConfig,
    targets: Targets | None,
) -> dict[str, int]:
    """The largest value of a few settings that fits, all others as they are; 0: none does."""
    questions: dict[str, tuple[Callable[[int], Bytes], int]] = {
        "sequence length": (lambda n: other(config, n), decoder.max_length - config.virtual_tokens),
        "batch size": (lambda n: other(replaced(config, {"train.batch_size": n}), seq), 4096),
    }
    if targets:
        widest = min(min(t.layout.rows, t.layout.cols) for t in targets.values())
        questions["rank"] = (lambda n: other(replaced(config, {"lora.rank": n}), seq), widest)
    answers = {}
    for name, (need, most) in questions.items():
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if need(middle).device <= budget else (low, middle - 1)
        answers[name] = low
    return answers


_OPTIONS = (
    ("without double quantization", {"quant.double_quant": False}),
    ("embedding and head in 4 bits", {"quant.embeddings": True}),
    ("remat none", {"train.remat": "none"}),
    ("remat dots", {"train.remat": "dots"}),
    ("remat full", {"train.remat": "full"}),
    ("remat offload", {"train.remat": "offload"}),
    ("optimizer in bfloat16", {"optim.state": "bfloat16"}),
    ("optimizer in 8 bits", {"optim.state": "8bit"}),
    ("optimizer on the host", {"optim.placement": "host"}),
    ("weights streamed from the host", {"quant.streamed": True}),
    ("LoRA on 16-bit weights", {"method": "lora", "quant.streamed": False}),
    ("full fine-tuning", {"method": "full", "quant.streamed": False}),
)


_OF_QLORA = (
    "without double quantization",
    "embedding and head in 4 bits",
    "weights streamed from the host",
)


def _changes(
    other: Callable[[Config, int], Bytes], config: Config, seq: int
) -> list[tuple[str, Bytes]]:
    """What each option would need; those that are set already are left out."""
    changes = []
    now = flat_settings(config)
    for name, values in _OPTIONS:
        if all(now[key] == value for key, value in values.items()):
            continue
        if config.method != "qlora" and name in _OF_QLORA:
            continue
        changes.append((name, other(replaced(config, values), seq)))
    return changes
