# SPDX-License-Identifier: Apache-2.0
"""The jax_qlora side of train_step.py: a worker that runs one training step when told to."""

import argparse
import io
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from worker import Runs, serve, side_arguments

import jax_qlora as jq
from jax_qlora.config import Config
from jax_qlora.models import DecoderConfig, Model, abstract_params, decoder_functions
from jax_qlora.optim import adamw
from jax_qlora.report import Display
from jax_qlora.train.step import CompiledSteps, init_state, make_step
from jax_qlora.tree import map_with_path


def shape_of(args: argparse.Namespace) -> DecoderConfig:
    """The model that the arguments describe."""
    return DecoderConfig(
        vocab_size=args.vocab,
        d_model=args.hidden,
        d_ff=args.intermediate,
        n_layers=args.layers,
        n_heads=args.heads,
        n_kv_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        max_length=max(2048, args.seq),
    )


def build(args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """The step, and what there is to say about the model."""
    shape, dtype = shape_of(args), jnp.dtype(args.dtype)
    # as the trainer has them: with remat "full" the layers run in the loop of their own
    functions = decoder_functions(shape, compute_dtype=dtype, remat=args.remat, transform=jq.lift)
    abstract = abstract_params(shape)
    example = jax.ShapeDtypeStruct((args.batch, args.seq), jnp.int32)
    targets = jq.find_targets(functions.apply, abstract, example)
    rng = np.random.default_rng(0)

    def kept(path: str, leaf: Any) -> Any:
        """The shapes of what `draw` returns."""
        x = jax.ShapeDtypeStruct(leaf.shape, dtype)
        quantized = args.mode == "qlora" and path in targets
        return jax.eval_shape(jq.quantize_array, x) if quantized else x

    def draw(path: str, leaf: Any) -> Any:
        """One parameter, a stacked kernel layer by layer, as a checkpoint is read."""
        if path.endswith("scale"):
            return jnp.ones(leaf.shape, dtype)

        def normal(dims: tuple[int, ...]) -> jax.Array:
            x = rng.standard_normal(dims, np.float32)
            x *= 0.02
            return jnp.asarray(x.astype(dtype, copy=False))  # as read: in the dtype it is stored in

        if args.mode != "qlora" or path not in targets:
            return normal(leaf.shape)
        layers = [jq.quantize_array(normal(leaf.shape[1:])) for _ in range(leaf.shape[0])]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    adapter = jq.init_adapter(jax.random.key(0), targets, rank=args.rank, alpha=2 * args.rank)
    model = Model(config=shape, params=None, functions=functions, compute_dtype=dtype)
    optimizer = adamw(1e-4)
    step = make_step(model, optimizer, Config(), width=args.seq - 1)
    steps = CompiledSteps(step, Config(), Display(Console(file=io.StringIO())))
    state = init_state(adapter, optimizer)
    tokens = rng.integers(0, args.vocab, (1, args.batch, args.seq), dtype=np.int32)
    all_true = np.ones(tokens.shape, bool)
    batch = {"tokens": tokens, "loss_mask": all_true, "attention_mask": all_true}
    # as the trainer does it: compiled from shapes, before there are weights
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        map_with_path(kept, abstract),
    )
    steps.compile(state, shapes, batch)
    base = jax.block_until_ready(map_with_path(draw, abstract))
    steps.compile(state, base, batch)  # nothing is left to do, unless the form differs

    def run() -> float:
        nonlocal state
        state, values = steps(state, base, batch)
        return float(values["loss"])

    trainable = sum(x.size for x in jax.tree.leaves(adapter))
    return {"step": run}, {"jax": jax.__version__, "trainable": trainable}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("qlora", "lora"), required=True)
    sys.exit(serve(build, side_arguments(parser)))
