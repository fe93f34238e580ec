# SPDX-License-Identifier: Apache-2.0
"""A batch whose rows use different adapters against the same batch under one adapter.

    python benchmarks/many_adapters.py [--batch 16] [--seq 64] [--rounds 9]

Random decoder of Llama's architecture, NF4 with double quantization, LoRA on all linears; as many
adapters as rows. `forward` gives the logits, `train` is a step of AdamW over the adapters (over the
whole stack where there are many), `decode` one token of each row after `seq` in the cache. Beside
the times stand the compiler's counts of operations and bytes. Floors (default sizes): forward and
train at most 1.3x one adapter. `decode` has none: it reads all the adapters for one token each.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Report, interleave, milliseconds, ratio
from step_jax import shape_of

import jax_qlora as jq
from jax_qlora.generate import CACHE_AXES
from jax_qlora.models import Model, abstract_params, decoder_functions
from jax_qlora.optim import adamw
from jax_qlora.tree import map_with_path

SIZES = dict(hidden=1024, layers=4, heads=16, kv_heads=8, intermediate=2816, vocab=8192)
SIZES |= dict(batch=16, seq=64, rank=16)


def build(args: argparse.Namespace) -> tuple[Model, Any]:
    """A model whose base is random and in 4 bits, and its targets."""
    shape, dtype = shape_of(args), jnp.dtype(args.dtype)
    functions = decoder_functions(shape, compute_dtype=dtype, transform=jq.lift)
    abstract = abstract_params(shape)
    example = jax.ShapeDtypeStruct((args.batch, args.seq), jnp.int32)
    targets = jq.find_targets(functions.apply, abstract, example)
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> Any:
        if path.endswith("scale"):
            return jnp.ones(leaf.shape, dtype)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)

    base = jq.quantize(map_with_path(draw, abstract), targets)
    return Model(config=shape, params=base, functions=functions, compute_dtype=dtype), targets


def works(
    model: Model, attached: Callable[[Any, Any], Any], tokens: jax.Array, adapter: Any
) -> dict[str, tuple[Any, tuple]]:
    """Compiled functions by name, and their arguments.

    Args:
        model: The model.
        attached: `(base, adapter) -> tree`.
        tokens: int32 `[batch, seq]`.
        adapter: One adapter, or a stack.
    """
    apply, optimizer = jq.over_rows(model.apply), adamw(1e-4)
    decode = jq.over_rows(model.decode, in_axes=(0, CACHE_AXES), out_axes=(0, CACHE_AXES))

    def forward(base: Any, adapter: Any) -> jax.Array:
        return apply(attached(base, adapter), tokens)

    def train(base: Any, adapter: Any, state: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            logits = forward(base, adapter)[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(losses)

        updates, state = optimizer.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    def step(base: Any, adapter: Any, cache: Any) -> jax.Array:
        return decode(attached(base, adapter), tokens[:, -1:], cache)[0]

    base, cache = model.params, model.init_cache(*tokens.shape[:1], tokens.shape[1] + 1)
    cache = cache._replace(length=jnp.int32(tokens.shape[1]))
    run = {
        "forward": (forward, (base, adapter)),
        "train": (train, (base, adapter, optimizer.init(adapter))),
        "decode": (step, (base, adapter, cache)),
    }
    return {name: (jax.jit(f).lower(*a).compile(), a) for name, (f, a) in run.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    model, targets = build(args)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, args.vocab, (args.batch, args.seq), dtype=np.int32))
    adapters = [
        jax.tree.map(
            lambda x: x + 0.01 * jnp.asarray(rng.standard_normal(x.shape, np.float32)),
            jq.init_adapter(jax.random.key(i), targets, rank=args.rank),
        )
        for i in range(args.batch)
    ]
    index = jnp.arange(args.batch, dtype=jnp.int32)
    one = works(model, jq.attach, tokens, adapters[0])
    many = works(
        model,
        lambda base, stacked: jq.attach_many(base, stacked, index),
        tokens,
        jq.stack_adapters(adapters),
    )

    settings = {name: getattr(args, name) for name in SIZES}
    report = Report("many_adapters", jax=jax.__version__, **settings, dtype=args.dtype)
    for name in one:
        runs = {"one": one[name], "many": many[name]}
        got = {side: jax.block_until_ready(f(*a)) for side, (f, a) in runs.items()}
        if name == "forward":  # the first row has the first adapter on both sides
            gap = float(jnp.abs(got["many"][0] - got["one"][0]).max())
            assert gap <= 2e-2 * float(jnp.abs(got["one"][0]).max()), f"the first row is off: {gap}"
            assert float(jnp.abs(got["many"][1] - got["one"][1]).max()) > gap
        times = interleave(
            {side: lambda r=r: jax.block_until_ready(r[0](*r[1])) for side, r in runs.items()},
            rounds=args.rounds,
        )
        costs = {side: f.cost_analysis() for side, (f, _) in runs.items()}
        slower = ratio(times["many"].wall, times["one"].wall)
        report.add(
            work=name,
            **{f"one_{k}": v for k, v in milliseconds(times["one"].wall).items()},
            **{f"many_{k}": v for k, v in milliseconds(times["many"].wall).items()},
            ratio=round(slower, 3),
            cpu_ratio=round(ratio(times["many"].cpu, times["one"].cpu), 3),
            flops_ratio=round(costs["many"]["flops"] / costs["one"]["flops"], 3),
            bytes_ratio=round(costs["many"]["bytes accessed"] / costs["one"]["bytes accessed"], 3),
            rounds=args.rounds,
        )
        if name != "decode" and settings == SIZES:
            report.floor(f"{name}, {args.batch} adapters / one", slower, 1.3)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
