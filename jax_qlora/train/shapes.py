# SPDX-License-Identifier: Apache-2.0
"""The training step of a run as a function of shapes: nothing is read, nothing is allocated.

So it can be compiled before a model is read, and for a card that is not there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from ..config import Config
from ..interop.load_params import is_quantized
from ..interop.peft_select import Beside, select_beside
from ..lift import lift
from ..lora import Targets
from ..models import DecoderConfig, Model, abstract_params, decoder_functions
from ..optim import Paging
from ..quant import QuantizedArray, quantize_array
from ..quant.streaming import fetch
from ..tree import map_with_path
from ..typing import Array, PyTree
from .prompt import prompt_shapes
from .start import find_decoder_targets, make_adapter
from .step import Step, init_state, make_optimizer, make_step


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _quantized(params: PyTree, config: Config, beside: Beside) -> PyTree:
    """The base with in 4 bits what a loaded model has so, whatever is adapted."""
    quant = config.quant

    def one(path: str, x: Any) -> Any:
        if path in beside.whole or not is_quantized(path, embeddings=quant.embeddings):
            return x
        kernel = path.endswith("/kernel")

        def encode(x: Array) -> QuantizedArray:
            q = quantize_array(
                x,
                in_axis=-2 if kernel else -1,
                out_axis=-1 if kernel else -2,
                format=quant.format,
                block_size=quant.block_size,
                double_quant=quant.double_quant,
            )
            return dataclasses.replace(q, streamed=quant.streamed and bool(q.lead))

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
    compute_dtype: DTypeLike = jnp.bfloat16,
    width: int | None = None,
    paging: Paging | None = None,
    stored: Callable[[str], DTypeLike] | None = None,
    targets: Targets | None = None,
    beside: Beside | None = None,
) -> Run:
    """The step that `train` would run, on shapes.

    Args:
        decoder: The model's shape, rows for `data.new_tokens` included.
        config: Settings of the run.
        seq: Tokens of a row.
        compute_dtype: Of the matmuls; float16 comes with a loss scale.
        width: Most answer tokens in a row; absent: every token counts as an answer's.
        paging: How the optimizer's state moves; absent: it stays on the device.
        stored: What a parameter is held in, by its path; absent: norms in float32, all else in
            `compute_dtype`.
        targets: Kernels to adapt; absent: found here.
        beside: What else trains; absent: chosen here, the last tokens being those added.
    """
    dtype = jnp.dtype(compute_dtype)
    half = dtype == jnp.float16
    functions = decoder_functions(
        decoder,
        compute_dtype=dtype,
        remat=config.train.remat,
        attention=config.train.attention,
        transform=lift,
        fetch=fetch if config.quant.streamed else None,
        layer_chunk=config.train.layer_chunk,
    )
    model = Model(config=decoder, params=None, functions=functions, compute_dtype=dtype)

    def default(path: str) -> DTypeLike:
        return jnp.float32 if path.endswith("scale") else dtype

    def parameter(path: str, x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, (stored or default)(path))

    params = map_with_path(parameter, abstract_params(decoder))
    if config.method == "full":
        frozen = None
        trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    else:
        targets = find_decoder_targets(decoder, config) if targets is None else targets
        if beside is None:
            added = range(decoder.vocab_size - len(config.data.new_tokens), decoder.vocab_size)
            beside = select_beside(config.lora, decoder, targets, new_tokens=added)
        frozen = _quantized(params, config, beside) if config.method == "qlora" else params
        trainable = jax.eval_shape(lambda base: make_adapter(config, targets, base, beside), frozen)
        trainable |= prompt_shapes(config, decoder)
    optimizer, _ = make_optimizer(config.optim, config.train.steps)
    width = seq - 1 if width is None else width
    step = make_step(model, optimizer, config, width=width, half=half, paging=paging)
    state = jax.eval_shape(lambda t: init_state(t, optimizer, half=half), trainable)
    shape = (config.train.accumulate, config.train.batch_size, seq)
    masks = {
        name: jax.ShapeDtypeStruct(shape, jnp.bool_) for name in ("loss_mask", "attention_mask")
    }
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), **masks}
    return Run(step=step, state=state, frozen=frozen, batch=batch)


def place_run(run: Run, config: Config, *, device: Sharding, host: Sharding) -> Run:
    """Say where the arguments of a step live, as a run with these settings has them.

    Args:
        run: From `abstract_run`.
        config: Settings of the run.
        device: Where what is computed with lives.
        host: Where what waits lives: streamed kernels, paged moments.
    """

    def put(tree: Any, sharding: Sharding) -> Any:
        def one(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, tree)

    state = put(run.state, device)
    if config.optim.placement == "host":
        state = state._replace(
            optimizer=jax.tree.map(lambda x: put(x, host if x.ndim else device), state.optimizer)
        )
    frozen = jax.tree.map(
        lambda x: put(x, host if getattr(x, "streamed", False) else device),
        run.frozen,
        is_leaf=_is_quantized,
    )
    return Run(step=run.step, state=state, frozen=frozen, batch=put(run.batch, device))
