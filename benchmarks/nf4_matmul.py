# SPDX-License-Identifier: Apache-2.0
"""NF4 matmul against dense float32, forward and backward, on this machine.

    python benchmarks/nf4_matmul.py [--size 4096] [--tokens 1 256 1024] [--rounds 15]

Floors: at most 1.25x dense at 256 and 1024 tokens and 3x at one token, each way. The weight's
gradient does not exist on either side.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from measure import Report, interleave, milliseconds, ratio

import jax_qlora as jq
from jax_qlora.quant import quantized_matmul

FLOORS = {1: 3.0, 256: 1.25, 1024: 1.25}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the kernel")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(FLOORS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    size, dtype = args.size, jnp.dtype(args.dtype)
    q = jq.quantize_array(jnp.asarray(rng.standard_normal((size, size), np.float32)))
    dense = jq.dequantize(q).astype(dtype)

    def dot(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
        dims = (((1,), (w_axis,)), ((), ()))
        return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

    @jax.jit
    def nf4_backward(g: jax.Array, q: jq.QuantizedArray) -> jax.Array:
        like = jnp.zeros((g.shape[0], size), dtype)
        return jax.vjp(lambda x: quantized_matmul(x, q, dtype=jnp.float32), like)[1](g)[0]

    runs = {
        "forward": (
            jax.jit(lambda x, w: dot(x, w, 0)),
            jax.jit(lambda x, q: quantized_matmul(x, q, dtype=jnp.float32)),
        ),
        "backward": (jax.jit(lambda g, w: dot(g.astype(dtype), w, 1)), nf4_backward),
    }
    report = Report("nf4_matmul", jax=jax.__version__, size=size, dtype=args.dtype)
    for tokens in args.tokens:
        for way, (run_dense, run_nf4) in runs.items():
            x = jnp.asarray(rng.standard_normal((tokens, size), np.float32))
            x = x.astype(dtype if way == "forward" else jnp.float32)
            want, got = run_dense(x, dense), run_nf4(x, q)
            error = float(jnp.max(jnp.abs(want - got)) / jnp.max(jnp.abs(want)))
            assert error < (1e-5 if dtype == jnp.float32 else 2e-2), f"{way}: off by {error}"
            rounds = args.rounds * (4 if tokens < 64 else 1)
            times = interleave(
                {
                    "dense": lambda f=run_dense, x=x: f(x, dense).block_until_ready(),
                    "nf4": lambda f=run_nf4, x=x: f(x, q).block_until_ready(),
                },
                rounds=rounds,
            )
            slower = ratio(times["nf4"].wall, times["dense"].wall)
            report.add(
                tokens=tokens,
                way=way,
                **{f"dense_{k}": v for k, v in milliseconds(times["dense"].wall).items()},
                **{f"nf4_{k}": v for k, v in milliseconds(times["nf4"].wall).items()},
                ratio=round(slower, 3),
                cpu_ratio=round(ratio(times["nf4"].cpu, times["dense"].cpu), 3),
                error=float(f"{error:.1e}"),
                rounds=rounds,
            )
            if tokens in FLOORS and size == 4096 and dtype == jnp.float32:
                report.floor(f"{way}, {tokens} tokens, nf4 / dense", slower, FLOORS[tokens])
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
