# SPDX-License-Identifier: Apache-2.0
"""A whole QLoRA training step against our dense LoRA, PEFT + bitsandbytes, and Qwix.

    python benchmarks/train_step.py --torch-python REF --qwix-python REF --output docs/speed.json
    python docs/speed.py                                  the page and the picture from that file

Random decoder of Llama's architecture; NF4, LoRA on all linears, AdamW; float32 and bfloat16, each
without and with checkpointing (`remat`: the layers are recomputed). Each side is a process of its
own, all sides of a cell are there at once and step in turn. Memory is resident memory of a whole
process (VmHWM, imports, interpreter and compiler included): `train` is its peak from the first step
on, `peak` its peak from the start, building and quantizing the model included. `start_s` goes from
the imports to the first loss: building the model, compiling, one step. Run our side with a Python
that lacks the planner's wheels: jax loads the CUDA plugin they hold beside the CPU, some 85 MiB.
Floors, at the default sizes: no slower than either peer, at most 0.6 of the smaller of their peaks,
at most 1.10 of our dense step.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import Report, machine, ratio
from worker import MODEL, Side, add_model_arguments, model_arguments

HERE = Path(__file__).parent
OURS, DENSE = "jax_qlora NF4", "jax_qlora dense LoRA"
TORCH, QWIX = "PEFT + bitsandbytes", "Qwix"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch, peft and bitsandbytes")
    parser.add_argument("--qwix-python", help="a Python with qwix and flax")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write what was measured here, as JSON")
    add_model_arguments(parser)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in MODEL}
    report = Report("train_step", **settings)
    for dtype in args.dtype:
        for remat in args.remat:
            sides = measure(args, dtype, remat)
            for row in sides.values():
                report.add(dtype=dtype, remat=remat, **row)
            if settings == MODEL:
                hold(report, f"{dtype}, remat {remat}", sides)
    if args.output:
        about = {"rounds": args.rounds, "machine": machine(), **report.about}
        args.output.write_text(json.dumps({"about": about, "rows": report.rows}, indent=1) + "\n")
    return report.finish()


def measure(args: argparse.Namespace, dtype: str, remat: str) -> dict[str, dict[str, Any]]:
    """One cell: a row for each side."""
    model = model_arguments(args, dtype=dtype, remat=remat)
    ours = [sys.executable, str(HERE / "step_jax.py"), *model]
    commands = {OURS: [*ours, "--mode=qlora"], DENSE: [*ours, "--mode=lora"]}
    peers = {TORCH: (args.torch_python, "step_torch.py"), QWIX: (args.qwix_python, "step_qwix.py")}
    for name, (python, script) in peers.items():
        if python:
            commands[name] = [python, str(HERE / script), *model]
    sides = {name: Side(name, command) for name, command in commands.items()}
    trainable = {side.about.pop("trainable") for side in sides.values()}
    assert len(trainable) == 1, f"the sides train different numbers of parameters: {trainable}"
    for number in range(args.warmup + args.rounds):
        for side in sides.values():
            side.run("step", count=number >= args.warmup)
    rows = {}
    for name, side in sides.items():
        memory, times, losses = side.finish(), side.times["step"], side.results["step"]
        rows[name] = dict(
            side=name,
            step_s=round(statistics.median(times.wall), 4),
            min_s=round(min(times.wall), 4),
            cpu_s=round(statistics.median(times.cpu), 4),
            nf4_ratio=round(ratio(sides[OURS].times["step"].wall, times.wall), 3),
            nf4_cpu_ratio=round(ratio(sides[OURS].times["step"].cpu, times.cpu), 3),
            start_s=round(memory["build_s"] + side.first["step"], 2),
            loss=f"{losses[0]:.3f} -> {losses[-1]:.3f}",
            **{key: round(value, 1) for key, value in memory.items()},
            versions=" ".join(f"{k} {v}" for k, v in side.about.items()),
        )
    return rows


def hold(report: Report, cell: str, rows: dict[str, dict[str, Any]]) -> None:
    """The floors of one cell."""
    report.floor(f"{cell}: time, nf4 / dense LoRA", rows[DENSE]["nf4_ratio"], 1.10)
    peers = [rows[name] for name in (TORCH, QWIX) if name in rows]
    for row in peers:
        report.floor(f"{cell}: time, nf4 / {row['side']}", row["nf4_ratio"], 1.0)
    for key in ("train_peak_mib", "peak_mib") if peers else ():
        part = rows[OURS][key] / min(row[key] for row in peers)
        report.floor(f"{cell}: {key}, nf4 / the smaller of the peers", part, 0.6)


if __name__ == "__main__":
    sys.exit(main())
