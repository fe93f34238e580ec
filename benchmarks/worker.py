# SPDX-License-Identifier: Apache-2.0
"""The protocol between train_step.py and its sides: JSON lines, one command and answer at a time.

Each side is a process of its own, so that its peak memory is its own; the driver lets them step in
turn, so that they share whatever the machine is doing. Imports neither jax nor torch.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import memory_mib, reset_peak

MODEL = dict(
    hidden=1024,
    layers=8,
    heads=16,
    kv_heads=8,
    intermediate=2816,
    vocab=8192,
    batch=2,
    seq=256,
    rank=16,
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the settings that all sides take."""
    for name, default in MODEL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")


def model_arguments(args: argparse.Namespace) -> list[str]:
    """The same settings as a command line."""
    names = [*MODEL, "dtype", "remat"]
    return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]


def serve(
    build: Callable[[argparse.Namespace], tuple[Callable[[], float], dict[str, Any]]],
    args: argparse.Namespace,
) -> int:
    """Builds a model, then runs its step once for every line read."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    imported = memory_mib()[0]
    step, about = build(args)
    built, build_peak = memory_mib()
    reset_peak()
    answer(**about)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        loss = step()
        answer(
            loss=loss,
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - cpu,
        )
    train_peak = memory_mib()[1]
    answer(
        import_mib=imported,
        built_mib=built,
        train_peak_mib=train_peak,
        peak_mib=max(train_peak, build_peak),
    )
    return 0


class Side:
    """One side as its driver sees it."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Starts the process; `ready` waits until its model is built."""
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        self.about = self._read()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, *, count: bool) -> None:
        """Runs one step; its time is kept if it counts."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        values = self._read()
        self.losses.append(values["loss"])
        if count:
            self.seconds.append(values["seconds"])
            self.cpu_seconds.append(values["cpu_seconds"])

    def finish(self) -> dict[str, float]:
        """Ends the process; returns its memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        memory = self._read()
        self._process.wait()
        return memory

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended with status {self._process.wait()}")
        return json.loads(line)
