# SPDX-License-Identifier: Apache-2.0
"""Where a run starts: the frozen base and the adapter over it, as the settings say.

Some initializations (PiSSA, OLoRA, LoftQ) take a part out of the weights, so they happen while a
model is read, one stacked kernel at a time: neither the dense model nor two kernels exist at once.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..config import Config
from ..interop.load import load_model
from ..lift import find_targets, lift
from ..lora import Adapter, Targets, add_magnitudes, init_adapter
from ..lora.inits import PLAIN_INITS, init_kernel
from ..models import DecoderConfig, Model, abstract_params, decoder_functions
from ..typing import Array, PyTree


def find_decoder_targets(decoder: DecoderConfig, config: Config) -> Targets:
    """Return the kernels that `config.lora.targets` names in a decoder of this shape."""
    functions = decoder_functions(decoder).map(lift)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return find_targets(
        functions.apply, abstract_params(decoder), tokens, match=config.lora.targets
    )


def make_adapter(config: Config, targets: Targets, base: PyTree) -> Adapter:
    """Return an adapter of the shapes that `config` describes, for `base`.

    Values are those of a run unless its initialization takes them from the weights.
    """
    return _with_magnitudes(config, _fresh(config, targets), base)


def load_start(config: Config, targets: Targets, **options: Any) -> tuple[Model, Adapter]:
    """Read the model of a run; return it with its frozen base, and the adapter to train.

    Args:
        config: Settings.
        targets: Kernels to adapt.
        **options: Other arguments of `load_model`.

    Raises:
        InputError: The model cannot be read, or a weight cannot be initialized from.
    """
    adapter, started = _fresh(config, targets), {}
    quantization = config.quant.format if config.method == "qlora" else None
    encoding: dict[str, Any] = dict(
        block_size=config.quant.block_size, double_quant=config.quant.double_quant
    )

    def split(path: str, kernel: Array) -> Any:
        leaf, started[path] = init_kernel(
            path, kernel, adapter[path], config.lora.init, format=quantization, **encoding
        )
        return leaf

    from_weights = config.lora.init not in PLAIN_INITS
    model = load_model(
        config.model,
        quantization=quantization,
        split={p: functools.partial(split, p) for p in adapter} if from_weights else None,
        embeddings=config.quant.embeddings,
        **encoding,
        **options,
    )
    return model, _with_magnitudes(config, adapter | started, model.params)


def undo_relative(adapter: Adapter) -> Adapter:
    """Return the adapter of a run's own base, from the one written for the original weights.

    Args:
        adapter: What `lora.relative_to_start` returned.
    """
    return {
        path: replace(pair, a=pair.a[..., : pair.rank // 2, :], b=pair.b[..., : pair.rank // 2])
        for path, pair in adapter.items()
    }


def _fresh(config: Config, targets: Targets) -> Adapter:
    lora = config.lora
    return init_adapter(
        jax.random.key(config.seed),
        targets,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        rslora=lora.rslora,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        init=lora.init if lora.init in PLAIN_INITS else "default",
    )


def _with_magnitudes(config: Config, adapter: Adapter, base: PyTree) -> Adapter:
    return add_magnitudes(base, adapter) if config.lora.dora else adapter
