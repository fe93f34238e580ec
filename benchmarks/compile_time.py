# SPDX-License-Identifier: Apache-2.0
"""Trace and compile time of a lifted 32-layer scanned decoder against the dense one.

    python benchmarks/compile_time.py [--layers 32] [--rounds 5]

Each round traces and compiles anew, with jax's caches cleared. "logits" is a forward; "step" is a
training step's gradient: of the adapter over NF4 on the lifted side, of every weight on the dense
side. Only shapes are used, no weight exists. Floor: 1.5x, each.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measure import Report, ratio

import jax_qlora as jq
from jax_qlora.models import abstract_params, decoder_functions
from jax_qlora.models.presets import SMOLLM2_135M

FLOOR = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    args = parser.parse_args()

    config = dataclasses.replace(SMOLLM2_135M, n_layers=args.layers)
    apply = decoder_functions(config, remat=args.remat).apply
    params = abstract_params(config)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    targets = jq.find_targets(apply, params, tokens)
    base = jax.eval_shape(lambda p: jq.quantize(p, targets), params)
    adapter = jax.eval_shape(lambda key: jq.init_adapter(key, targets), jax.random.key(0))
    lifted = jq.lift(apply)

    def qlora(adapter: Any, base: Any, tokens: jax.Array) -> jax.Array:
        return lifted(jq.attach(base, adapter), tokens)

    def loss(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *args: jnp.mean(jax.nn.logsumexp(f(*args), axis=-1))

    cases = {
        ("logits", "dense"): (apply, (params, tokens)),
        ("logits", "lifted"): (qlora, (adapter, base, tokens)),
        ("step", "dense"): (jax.value_and_grad(loss(apply)), (params, tokens)),
        ("step", "lifted"): (jax.value_and_grad(loss(qlora)), (adapter, base, tokens)),
    }
    traced: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    compiled: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for number in range(args.rounds + 1):  # the first round warms up Python and XLA
        for case, (f, arguments) in cases.items():
            jax.clear_caches()
            began = time.perf_counter()
            lowered = jax.jit(f).lower(*arguments)
            middle = time.perf_counter()
            lowered.compile()
            if number:
                traced[case].append(middle - began)
                compiled[case].append(time.perf_counter() - middle)

    report = Report("compile_time", jax=jax.__version__, layers=args.layers, remat=args.remat)
    for what in ("logits", "step"):
        total = {}
        for side in ("dense", "lifted"):
            case = (what, side)
            total[side] = [t + c for t, c in zip(traced[case], compiled[case], strict=True)]
            report.add(
                what=what,
                side=side,
                trace_s=round(statistics.median(traced[case]), 3),
                compile_s=round(statistics.median(compiled[case]), 3),
                total_s=round(statistics.median(total[side]), 3),
                ratio=round(ratio(total[side], total["dense"]), 3),
            )
        slower = ratio(total["lifted"], total["dense"])
        report.floor(f"trace + compile of the {what}, lifted / dense", slower, FLOOR)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
