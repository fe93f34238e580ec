# SPDX-License-Identifier: Apache-2.0
"""A whole QLoRA training step: against our dense LoRA, and against PEFT + bitsandbytes.

    python benchmarks/train_step.py --torch-python .venv-reference/bin/python [--rounds 15]

Random decoder of Llama's architecture; NF4 with double quantization, LoRA on all linears, AdamW.
Each side is a process of its own and they step in turn. Memory is the peak resident memory of a
whole process, and the same above what its imports alone take; `train` counts from the first step
on, `peak` includes building and quantizing the model. Floors (float32, default sizes): at most 1.2x
the time of dense LoRA and of PEFT + bitsandbytes, and 0.7x the latter's peak memory.
"""

import argparse
import statistics
import sys
from pathlib import Path

from measure import Report, ratio
from worker import MODEL, Side, add_model_arguments, model_arguments

HERE = Path(__file__).parent
OURS, DENSE, REFERENCE = "jax_qlora nf4", "jax_qlora dense", "peft + bitsandbytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch, peft and bitsandbytes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    add_model_arguments(parser)
    args = parser.parse_args()

    def jax_side(mode: str) -> list[str]:
        return [sys.executable, str(HERE / "step_jax.py"), f"--mode={mode}", *model_arguments(args)]

    commands = {OURS: jax_side("qlora"), DENSE: jax_side("lora")}
    if args.torch_python:
        script = str(HERE / "step_torch.py")
        commands[REFERENCE] = [args.torch_python, script, *model_arguments(args)]
    sides = {name: Side(name, command) for name, command in commands.items()}
    trainable = {side.about["trainable"] for side in sides.values()}
    assert len(trainable) == 1, f"the sides train different numbers of parameters: {trainable}"
    for number in range(args.warmup + args.rounds):
        for side in sides.values():
            side.step(count=number >= args.warmup)

    settings = {name: getattr(args, name) for name in MODEL}
    report = Report("train_step", **settings, dtype=args.dtype, remat=args.remat)
    memory, ours = {}, sides[OURS]
    for name, side in sides.items():
        memory[name] = side.finish()
        above = memory[name]["peak_mib"] - memory[name]["import_mib"]
        report.add(
            side=name,
            step_s=round(statistics.median(side.seconds), 4),
            min_s=round(min(side.seconds), 4),
            cpu_s=round(statistics.median(side.cpu_seconds), 4),
            nf4_cpu_ratio=round(ratio(ours.cpu_seconds, side.cpu_seconds), 3),
            nf4_ratio=round(ratio(ours.seconds, side.seconds), 3),
            loss=f"{side.losses[0]:.3f} -> {side.losses[-1]:.3f}",
            **{key: round(value) for key, value in memory[name].items()},
            peak_above_import_mib=round(above),
            versions=" ".join(f"{k} {v}" for k, v in side.about.items() if k != "trainable"),
        )
    standard = settings == MODEL and (args.dtype, args.remat) == ("float32", "none")
    if standard:
        report.floor("time, nf4 / dense LoRA", ratio(ours.seconds, sides[DENSE].seconds), 1.2)
    if standard and REFERENCE in sides:
        theirs = sides[REFERENCE]
        report.floor("time, nf4 / peft + bitsandbytes", ratio(ours.seconds, theirs.seconds), 1.2)
        peak = memory[OURS]["peak_mib"] / memory[REFERENCE]["peak_mib"]
        report.floor("peak memory of the process, nf4 / peft + bitsandbytes", peak, 0.7)
        above = [memory[n]["peak_mib"] - memory[n]["import_mib"] for n in (OURS, REFERENCE)]
        report.floor("the same above imports", above[0] / above[1], 0.7)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
