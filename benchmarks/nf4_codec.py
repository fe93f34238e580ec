# SPDX-License-Identifier: Apache-2.0
"""Quantizing and dequantizing a matrix to NF4 on this CPU, against bitsandbytes.

    python benchmarks/nf4_codec.py --torch-python .venv-reference/bin/python [--rounds 9]

Float32 in, float32 out, constants in 8 bits too (double quantization). bitsandbytes runs in a
process of its own with the same threads, and the two take turns. Both give the same codes. Floors:
quantizing at least 3x as fast as bitsandbytes, dequantizing no slower.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from measure import Report, milliseconds, ratio
from worker import Runs, Side, serve

CASES = {"quantize": 1 / 3, "dequantize": 1.0}
OURS, REFERENCE = "jax_qlora", "bitsandbytes"


def build(args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """What each side does when told to."""
    return (build_torch if args.side == REFERENCE else build_jax)(args)


def build_jax(args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_qlora as jq

    w = jnp.asarray(np.random.default_rng(0).standard_normal((args.size, args.size), np.float32))

    def quantize() -> jq.QuantizedArray:
        return jax.block_until_ready(jq.quantize_array(w, in_axis=-1, out_axis=-2))

    q = quantize()
    runs = {"quantize": quantize, "dequantize": lambda: jq.dequantize(q).block_until_ready()}
    return runs, {"jax": jax.__version__, "codes": int(np.asarray(q.codes, np.int64).sum())}


def build_torch(args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    import os

    import bitsandbytes
    import numpy as np
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.set_num_threads(os.cpu_count() or 1)
    w = np.random.default_rng(0).standard_normal((args.size, args.size), np.float32)
    tensor = torch.from_numpy(w)

    def quantize() -> Any:
        return quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)

    packed, state = quantize()
    runs = {"quantize": quantize, "dequantize": lambda: dequantize_4bit(packed, state)}
    codes = int(packed.to(torch.int64).sum())
    return runs, {REFERENCE: bitsandbytes.__version__, "codes": codes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch and bitsandbytes")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", choices=(OURS, REFERENCE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(build, args)

    pythons = {OURS: sys.executable}
    if args.torch_python:
        pythons[REFERENCE] = args.torch_python
    here = str(Path(__file__))
    sides = {
        name: Side(name, [python, here, f"--side={name}", f"--size={args.size}"])
        for name, python in pythons.items()
    }
    codes = {side.about.pop("codes") for side in sides.values()}
    assert len(codes) == 1, f"the sides give different codes: {codes}"
    for number in range(2 + args.rounds):
        for case in CASES:
            for side in sides.values():
                side.run(case, count=number >= 2)

    report = Report("nf4_codec", size=args.size)
    for case, most in CASES.items():
        ours = sides[OURS].times[case]
        for name, side in sides.items():
            versions = " ".join(f"{k} {v}" for k, v in side.about.items())
            cpu = round(1e3 * min(side.times[case].cpu), 2)
            report.add(
                what=case, side=name, **milliseconds(side.times[case].wall), cpu_min_ms=cpu,
                ratio=round(ratio(ours.wall, side.times[case].wall), 3), versions=versions,
            )  # fmt: skip
        if REFERENCE in sides:
            slower = ratio(ours.wall, sides[REFERENCE].times[case].wall)
            report.floor(f"time to {case}, ours / bitsandbytes", slower, most)
    for side in sides.values():
        side.finish()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
