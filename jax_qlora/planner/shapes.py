# SPDX-License-Identifier: Apache-2.0
"""The training step of a run as a function of shapes: nothing is read, nothing is allocated."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..config import Config
from ..interop.load_params import is_quantized
from ..lift import lift
from ..models import DecoderConfig, Model, abstract_params, decoder_functions
from ..optim import Paging
from ..quant import QuantizedArray, quantize_array
from ..quant.streaming import fetch
from ..train.recipe import find_decoder_targets, make_optimizer
from ..train.start import make_adapter
from ..train.step import Step, init_state, make_step
from ..tree import map_with_path
from ..typing import PyTree


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _streamed(x: Any) -> Any:
    return dataclasses.replace(x, streamed=True) if _is_quantized(x) and x.lead else x


def _quantized(params: PyTree, config: Config) -> PyTree:
    """The base with in 4 bits what a loaded model has so, whatever is adapted."""
    quant = config.quant

    def one(path: str, x: Any) -> Any:
        if not is_quantized(path, embeddings=quant.embeddings):
            return x
        kernel = path.endswith("/kernel")
        encode = functools.partial(
            quantize_array,
            in_axis=-2 if kernel else -1,
            out_axis=-1 if kernel else -2,
            format=quant.format,
            block_size=quant.block_size,
            double_quant=quant.double_quant,
        )
        return jax.eval_shape(encode, x)

    return map_with_path(one, params)


class Run(NamedTuple):
    """A training step and the shapes of its arguments.

    Attributes:
        step: `(state, frozen, batch) -> (state, values)`, the trainer's own.
        state: A `TrainState` of shapes.
        frozen: The base as shapes; None where every weight trains.
        batch: Tokens and masks as shapes.
    """

    step: Step
    state: Any
    frozen: PyTree | None
    batch: dict[str, Any]


def abstract_run(
    decoder: DecoderConfig,
    config: Config,
    *,
    seq: int,
    half: bool = False,
    paging: Paging | None = None,
) -> Run:
    """The step that `train` would run, on shapes.

    Args:
        decoder: The model's shape.
        config: Settings of the run; every token counts as an answer's.
        seq: Tokens of a row.
        half: Compute in float16 with a loss scale, as on cards without bfloat16.
        paging: How the optimizer's state moves; absent: it stays on the device.
    """
    dtype = jnp.float16 if half else jnp.bfloat16
    functions = decoder_functions(
        decoder,
        compute_dtype=dtype,
        remat=config.train.remat,
        transform=lift,
        fetch=fetch if config.quant.streamed else None,
        layer_chunk=config.train.layer_chunk,
    )
    model = Model(config=decoder, params=None, functions=functions, compute_dtype=dtype)

    def stored(path: str, x: Any) -> Any:
        """Norms are float32, all else is held as checkpoints are, in 16 bits."""
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if path.endswith("scale") else dtype)

    params = map_with_path(stored, abstract_params(decoder))
    if config.method == "full":
        frozen = None
        trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    else:
        targets, quant = find_decoder_targets(decoder, config), config.quant
        frozen = _quantized(params, config) if config.method == "qlora" else params
        if quant.streamed:
            frozen = jax.tree.map(_streamed, frozen, is_leaf=_is_quantized)
        trainable = jax.eval_shape(lambda base: make_adapter(config, targets, base), frozen)
    optimizer, _ = make_optimizer(config.optim, config.train.steps)
    step = make_step(model, optimizer, config, width=seq - 1, half=half, paging=paging)
    state = jax.eval_shape(lambda t: init_state(t, optimizer, half=half), trainable)
    shape = (config.train.accumulate, config.train.batch_size, seq)
    masks = {
        name: jax.ShapeDtypeStruct(shape, jnp.bool_) for name in ("loss_mask", "attention_mask")
    }
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), **masks}
    return Run(step=step, state=state, frozen=frozen, batch=batch)
