# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: interleaved timing, memory of this process, tables and floors.

Timings are taken in rounds: every contender runs once in a round, and what is compared is the
median over rounds of the ratio within a round, so that a machine that slows down, or is shared,
slows all of them. Nothing here imports jax or torch.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Seconds of one contender in each round."""

    wall: list[float]
    cpu: list[float]
    """Of all threads together; hardly changes when other processes take turns on the machine."""


def interleave(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, Times]:
    """Times contenders in turn; a contender returns when its work is done."""
    times = {name: Times([], []) for name in contenders}
    for number in range(warmup + rounds):
        for name, run in contenders.items():
            began, cpu = time.perf_counter(), time.process_time()
            run()
            if number >= warmup:
                times[name].wall.append(time.perf_counter() - began)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median over rounds of one contender's time over another's."""
    return statistics.median(t / r for t, r in zip(times, reference, strict=True))


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process, and its peak since `reset_peak` or the start, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return resident, peak


def reset_peak() -> None:
    """Sets the peak of `memory_mib` to the present memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def milliseconds(times: Sequence[float]) -> dict[str, float]:
    """Median and least of some times, in milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(times), 3),
        "min_ms": round(1e3 * min(times), 3),
    }


def machine() -> str:
    """The CPU's name, and whether it multiplies bfloat16 itself, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = found.get("model name") or platform.machine()
    halves = [f for f in ("amx_bf16", "avx512_bf16") if f in found.get("flags", "").split()]
    return " with ".join([name, *halves[:1]])


class Report:
    """Collects rows, prints them as a table and as JSON lines, and holds floors."""

    def __init__(self, benchmark: str, **about: Any) -> None:
        """Args as noted in every line: the benchmark's name, versions, settings."""
        self.about = {"benchmark": benchmark, "cpus": os.cpu_count(), **about}
        self.rows: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self.floors: list[str] = []

    def add(self, **row: Any) -> None:
        """Adds one measurement."""
        self.rows.append(row)

    def floor(self, what: str, value: float, at_most: float) -> None:
        """Notes a claim: `value` is at most `at_most`."""
        held = value <= at_most
        line = f"{'ok  ' if held else 'MISS'} {what}: {value:.3f} (at most {at_most:g})"
        self.floors.append(line)
        if not held:
            self.missed.append(line)

    def finish(self) -> int:
        """Prints everything; returns the exit status, 1 if a floor is missed."""
        print("  ".join(f"{key} {value}" for key, value in self.about.items()))
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [columns, *([_cell(row.get(c)) for c in columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))
        load = round(os.getloadavg()[0], 2)
        for row in self.rows:
            print(json.dumps({**self.about, **row, "load": load}))
        for line in self.floors:
            print(line)
        return 1 if self.missed else 0


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
