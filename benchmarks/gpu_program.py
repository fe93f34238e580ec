# SPDX-License-Identifier: Apache-2.0
"""What a GPU would execute: an audit of the compiled training step, on a machine without a GPU.

    python benchmarks/gpu_program.py --model llama-2-7b --gpu rtx4090 [--set remat=none rank=64]

Compiles the trainer's QLoRA step with XLA's CUDA compiler (`pip install 'jax-qlora[fit]'`). Lists
every buffer above a quarter of the largest kernel with the reason it exists, every dequantization
with what reads it, every copy of streamed weights with the products that run beside it. Exits with
1 if a buffer has no explanation, a weight is dense in float32, one decoding serves other than one
product, state is not updated in place, or most of what is copied has nothing beside it.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections import Counter

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: the planner's compiler wants it

import jax

from jax_qlora.costs.gpus import find_gpu
from jax_qlora.errors import InputError
from jax_qlora.planner.audit import Audit, audit, sizes
from jax_qlora.planner.plan import DEFAULTS, read_decoder, with_settings
from jax_qlora.planner.program import Program
from jax_qlora.planner.worker import compile_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-2-7b", help="a preset, a directory, config.json")
    parser.add_argument("--gpu", default="rtx4090")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--json", action="store_true", help="one line for a program to read")
    parser.add_argument("--hlo", help="write the optimized program here")
    args = parser.parse_args()
    try:
        found, seconds = run(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**found._asdict(), "problems": found.problems()}))
    else:
        print(f"{args.model} on {args.gpu}, {args.seq} tokens {' '.join(args.set)}: jax "
              f"{jax.__version__}, compiled in {seconds:.1f} s. Nothing was run.")  # fmt: skip
        print(text(found))
    return 1 if found.problems() else 0


def run(args: argparse.Namespace) -> tuple[Audit, float]:
    """Compiles and audits."""
    decoder, _ = read_decoder(args.model)
    settings = dict(one.split("=", 1) for one in args.set)
    config = with_settings(DEFAULTS, {name: _value(text) for name, text in settings.items()})
    if config.method != "qlora":
        raise InputError(f"method '{config.method}': expected qlora, whose step is audited here.")
    began = time.perf_counter()
    compiled, case = compile_step(decoder, config, find_gpu(args.gpu), seq=args.seq)
    seconds = time.perf_counter() - began
    program = compiled.as_text()
    if args.hlo:
        with open(args.hlo, "w", encoding="utf-8") as file:
            file.write(program)
    found = audit(Program(program), sizes(decoder, config, case, seq=args.seq), case)
    return found, seconds


def text(found: Audit) -> str:
    """The audit for people."""
    counts = Counter((f.why or "UNEXPLAINED", f.where, f.shape) for f in found.findings)
    order = sorted(counts, key=lambda key: (-key[2].nbytes, key))
    lines = [f"Buffers of at least {found.threshold / 2**20:.1f} MiB"]
    lines += [
        f"  {shape.nbytes / 2**20:9.1f} MiB  {counts[why, where, shape]:2} x  {where:<8}  "
        f"{str(shape):<28} {why}"
        for why, where, shape in order
    ]
    lines += ["", "Dequantizations in one layer"]
    decodes = Counter((d.where, d.kernels, d.products, d.others) for d in found.decodes)
    lines += [
        f"  {number:2} x  {where:<8}  {kernels} kernel(s) at once, read by {products} product(s)"
        + (f" and {', '.join(others)}" if others else "")
        for (where, kernels, products, others), number in sorted(decodes.items())
    ]
    if found.copies:
        lines += ["", "Copies of packed codes from host memory in one layer"]
        lines += [f"  {c.where:<8}  {str(c.shape):<28} beside {c.beside} products"
                  for c in found.copies]  # fmt: skip
    have, want = found.in_place
    lines += ["", f"Updated in place: {have} of {want} arrays of the training state", ""]
    problems = found.problems()
    return "\n".join([*lines, *(f"PROBLEM: {one}" for one in problems or ())]
                     + ([] if problems else ["No problem found."]))  # fmt: skip


def _value(text: str) -> object:
    """A setting's value as TOML has it; a bare word is text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


if __name__ == "__main__":
    sys.exit(main())
