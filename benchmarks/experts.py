# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in blocks, as `models/experts.py` has it, against `jax.lax.ragged_dot`.

    python benchmarks/experts.py [--tokens 512] [--rounds 9]

Both get the same router, tokens and frozen kernels, dense or in NF4. "forward" gives the result,
"step" its gradient in the input, what training an adapter elsewhere needs. `ragged_dot` takes all
experts' kernels as one dense array, so NF4 kernels are decoded whole before it, and again in the
backward rather than kept; the blocks decode one expert's at a time. `temp_mib` is what the compiler
plans beside arguments and results. Floors: the blocks are no slower.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from measure import Report, interleave, milliseconds, ratio

import jax_qlora as jq
from jax_qlora.models import DecoderConfig
from jax_qlora.models.experts import MixtureOfExperts
from jax_qlora.models.presets import TINY

# experts, of a token, d_model, d_ff: Mixtral's proportions and Qwen 3 MoE's, smaller
SHAPES = [(8, 2, 1024, 3584), (64, 8, 1024, 512)]


def ragged(config: DecoderConfig, dtype: Any, params: Any, x: jax.Array) -> jax.Array:
    """`MixtureOfExperts` with the tokens of all experts in one product."""
    rows = x.reshape(-1, x.shape[-1])
    router = jnp.matmul(rows.astype(dtype), params["gate"]["kernel"].astype(dtype))
    weights, chosen = lax.top_k(
        jax.nn.softmax(router.astype(jnp.float32), axis=-1), config.experts_per_token
    )
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=config.n_experts).astype(jnp.int32)

    @jax.checkpoint  # else the decoded kernels would be kept for the backward
    def linear(x: jax.Array, kernel: Any) -> jax.Array:
        if isinstance(kernel, jq.QuantizedArray):
            kernel = jq.dequantize(kernel, dtype)
        y = lax.ragged_dot(x, kernel.astype(dtype), sizes, preferred_element_type=jnp.float32)
        return y.astype(dtype)

    gate, up, down = (
        params["experts"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down")
    )
    sorted_rows = rows.astype(dtype)[order // config.experts_per_token]
    y = linear(jax.nn.silu(linear(sorted_rows, gate)) * linear(sorted_rows, up), down)
    y = jnp.zeros_like(y).at[order].set(y).reshape(*chosen.shape, -1)
    y = jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1)
    return y.astype(x.dtype).reshape(x.shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    dtype = jnp.dtype(args.dtype)
    report = Report("experts", jax=jax.__version__, tokens=args.tokens, dtype=args.dtype)
    for experts, per_token, d_model, d_ff in SHAPES:
        config = dataclasses.replace(
            TINY, d_model=d_model, d_ff=d_ff, n_experts=experts, experts_per_token=per_token
        )
        for weights in ("dense", "nf4"):
            params = draw(config, dtype, weights)
            compare(report, config, dtype, weights, params, args)
    return report.finish()


def draw(config: DecoderConfig, dtype: Any, weights: str) -> Any:
    """Random parameters; the experts' kernels in NF4 or not."""
    rng = np.random.default_rng(0)
    abstract = nnx.to_pure_dict(nnx.split(module_of(config, dtype))[1])

    def one(leaf: Any) -> Any:
        x = jnp.asarray(leaf.shape[-2] ** -0.5 * rng.standard_normal(leaf.shape, np.float32), dtype)
        return jq.quantize_array(x) if weights == "nf4" and leaf.ndim == 3 else x

    return jax.block_until_ready(jax.tree.map(one, abstract))


def module_of(config: DecoderConfig, dtype: Any) -> MixtureOfExperts:
    """The module as shapes."""
    return nnx.eval_shape(lambda: MixtureOfExperts(config, dtype=dtype, rngs=nnx.Rngs(0)))


def compare(
    report: Report,
    config: DecoderConfig,
    dtype: Any,
    weights: str,
    params: Any,
    args: argparse.Namespace,
) -> None:
    """Times both variants of a forward and of a step."""
    graphdef, _ = nnx.split(module_of(config, dtype))
    rng = np.random.default_rng(1)
    shape = (1, args.tokens, config.d_model)
    x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(2))
    variants: dict[str, Callable[..., jax.Array]] = {
        "blocks": jq.lift(lambda params, x: nnx.merge(graphdef, params)(x)),
        "ragged": partial(ragged, config, dtype),
    }
    for what in ("forward", "step"):
        runs, compile_s, temp = {}, {}, {}
        for name, f in variants.items():

            def step(params: Any, x: jax.Array, dy: jax.Array, f: Any = f) -> Any:
                return jax.vjp(partial(f, params), x)[1](dy)[0]

            began = time.perf_counter()
            run = jax.jit(f if what == "forward" else step)
            inputs = (params, x) if what == "forward" else (params, x, dy)
            compiled = run.lower(*inputs).compile()
            compile_s[name] = time.perf_counter() - began
            temp[name] = compiled.memory_analysis().temp_size_in_bytes
            runs[name] = partial(compiled, *inputs)
        got, want = (np.asarray(runs[name](), np.float32) for name in ("blocks", "ragged"))
        error = float(np.abs(got - want).max() / np.abs(want).max())
        assert error < (1e-4 if dtype == jnp.float32 else 5e-2), f"{what}: off by {error}"
        times = interleave(
            {name: lambda run=run: run().block_until_ready() for name, run in runs.items()},
            rounds=args.rounds,
        )
        for name in variants:
            report.add(
                experts=config.n_experts,
                per_token=config.experts_per_token,
                weights=weights,
                what=what,
                variant=name,
                **milliseconds(times[name].wall),
                ratio=round(ratio(times[name].wall, times["ragged"].wall), 3),
                cpu_ratio=round(ratio(times[name].cpu, times["ragged"].cpu), 3),
                temp_mib=round(temp[name] / 2**20, 1),
                compile_s=round(compile_s[name], 2),
            )
        slower = ratio(times["blocks"].wall, times["ragged"].wall)
        label = f"{config.n_experts} experts, {weights}, {what}, blocks / ragged"
        report.floor(label, slower, 1.0)


if __name__ == "__main__":
    sys.exit(main())
