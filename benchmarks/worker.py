# SPDX-License-Identifier: Apache-2.0
"""The protocol between a benchmark and its sides: JSON lines, one command and answer at a time.

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

from measure import Times, memory_mib, reset_peak

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
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--remat", nargs="+", choices=("none", "full"), default=["none", "full"])


def side_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line of a side, which has one dtype and one remat."""
    add_model_arguments(parser)
    args = parser.parse_args()
    args.dtype, args.remat = args.dtype[0], args.remat[0]
    return args


def model_arguments(args: argparse.Namespace, **cell: str) -> list[str]:
    """The settings of one cell as a side's command line."""
    values = {**{name: getattr(args, name) for name in MODEL}, **cell}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


Runs = dict[str, Callable[[], Any]]
"""What a side can do, by name; a run returns a loss, or what is ignored, when its work is done."""


def serve(
    build: Callable[[argparse.Namespace], tuple[Runs, dict[str, Any]]], args: argparse.Namespace
) -> int:
    """Builds what is measured, then runs what each line read names."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    imported, began = memory_mib()[0], time.perf_counter()
    runs, about = build(args)
    build_s = time.perf_counter() - began
    built, build_peak = memory_mib()
    reset_peak()
    answer(**about)
    for line in sys.stdin:
        run = runs[line.strip()]
        began, cpu = time.perf_counter(), time.process_time()
        result = run()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        answer(
            result=result if isinstance(result, float) else None,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )
        del result
    train_peak = memory_mib()[1]
    answer(
        import_mib=imported,
        built_mib=built,
        build_s=build_s,
        train_peak_mib=train_peak,
        peak_mib=max(train_peak, build_peak),
    )
    return 0


class Side:
    """One side as its driver sees it.

    Attributes:
        name: What it is called.
        about: What it says about itself: versions, counts.
        times: Seconds of each run that counted, by its name.
        first: Seconds of the first run, what it compiles included, by its name.
        results: What the runs returned, by name.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Starts the process and waits until it has built what is measured."""
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        self.about = self._read()
        self.times: dict[str, Times] = {}
        self.first: dict[str, float] = {}
        self.results: dict[str, list[float]] = {}

    def run(self, what: str, *, count: bool) -> None:
        """Runs something once; its time is kept if it counts."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        values = self._read()
        self.first.setdefault(what, values["seconds"])
        self.results.setdefault(what, []).append(values["result"])
        times = self.times.setdefault(what, Times([], []))
        if count:
            times.wall.append(values["seconds"])
            times.cpu.append(values["cpu_seconds"])

    def finish(self) -> dict[str, float]:
        """Ends the process; returns its memory, and the seconds that building took."""
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
