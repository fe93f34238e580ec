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
from ..errors import InputError
from ..interop.hf import unnumbered_name
from ..interop.load import load_model
from ..interop.load_params import is_quantized
from ..interop.peft_select import Beside, select_modules
from ..lift import find_targets, lift
from ..lora import (
    Adapter,
    LoraPair,
    Targets,
    add_magnitudes,
    init_adapter,
    train_tokens,
    train_whole,
)
from ..lora.inits import PLAIN_INITS, check_whole, init_kernel
from ..lora.targets import select_targets
from ..models import DecoderConfig, Model, abstract_params, decoder_functions
from ..typing import Array, PyTree
from .continued import continue_from
from .prompt import start_prompt

_NOTHING = Beside()


def find_decoder_targets(decoder: DecoderConfig, config: Config) -> Targets:
    """Return the kernels that have updates in a decoder of this shape.

    Those that `config.lora.targets` names, without the modules that train as a whole, as in PEFT;
    with rank 0 none.
    They answer to their names in checkpoints as well ("c_attn" of GPT-2), and so do their parts.

    Args:
        decoder: The model's shape.
        config: Settings.

    Raises:
        InputError: A name matches nothing, nothing is left, or a target cannot be adapted so.
    """
    lora, names = config.lora, config.lora.targets
    if decoder.tied and not isinstance(names, str) and "lm_head" in names:
        raise InputError(
            "lora.targets: expected names of this model's weights, found 'lm_head': its output "
            "head is the embedding. Name embed_tokens, whose update acts in both uses."
        )
    functions = decoder_functions(decoder).map(lift)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    found = find_targets(functions.apply, abstract_params(decoder), tokens, parts=decoder.parts)
    aliased = [replace(t, alias=unnumbered_name(t.path, decoder)) for t in found.found]
    targets = select_targets(aliased, names)
    if not lora.rank:
        return Targets((), targets.found)
    whole = select_modules(lora, decoder)
    left = tuple(target for target in targets.selected if target.path not in whole)
    if not left:
        raise InputError(
            "lora.modules_to_save: expected some of lora.targets to keep their updates, found that "
            'all train as a whole. Name fewer, or set method = "full".'
        )
    for target in left:
        module = target.path.rpartition("/")[0]
        if lora.dora and target.kind == "embedding":
            raise InputError(
                f"lora.dora: expected linears, found '{module}' among lora.targets: PEFT scales an "
                "embedding's columns, and DoRA here scales rows. Leave it out of the targets."
            )
        if lora.init == "loftq" and not _in_four_bits(config, target.path):
            raise InputError(
                f"lora.init: expected targets in 4 bits, which LoftQ makes up for, found '{module}'"
                ". Leave it out of lora.targets, or set quant.embeddings = true."
            )
    return Targets(left, targets.found)


def make_adapter(
    config: Config, targets: Targets, base: PyTree, beside: Beside = _NOTHING
) -> Adapter:
    """Return an adapter of the shapes that `config` describes, for `base`.

    Values are those of a run unless its initialization takes them from the weights.

    Args:
        config: Settings.
        targets: Kernels to adapt.
        base: The frozen base.
        beside: What else trains.
    """
    return _complete(config, _fresh(config, targets), targets, base, beside)


def load_start(
    config: Config, targets: Targets, beside: Beside = _NOTHING, **options: Any
) -> tuple[Model, Adapter]:
    """Read the model of a run; return it with its frozen base, and the adapter to train.

    Args:
        config: Settings.
        targets: Kernels to adapt.
        beside: What else trains; where it trains as a whole, it starts dense and is held so.
        **options: Other arguments of `load_model`.

    Raises:
        InputError: The model cannot be read, a weight cannot be initialized from, or a target is
            some parts of a kernel where a setting takes whole ones.
    """
    adapter, started = _fresh(config, targets), {}
    quantization = config.quant.format if config.method == "qlora" else None
    encoding: dict[str, Any] = dict(
        block_size=config.quant.block_size, double_quant=config.quant.double_quant
    )

    def split(path: str, kernel: Array) -> Any:
        leaf, started[path] = init_kernel(
            path,
            kernel,
            adapter[path],
            config.lora.init,
            format=quantization if _in_four_bits(config, path) else None,
            **encoding,
        )
        return leaf

    from_weights = config.lora.init not in PLAIN_INITS
    if from_weights or config.lora.dora:
        check_whole(adapter, "DoRA" if config.lora.dora else f"init {config.lora.init!r}")
    own: dict[str, Any] = {path: _as_it_is for path in beside.whole if _in_four_bits(config, path)}
    if from_weights:
        own |= {path: functools.partial(split, path) for path in adapter}
    model = load_model(
        config.model,
        quantization=quantization,
        split=own,
        embeddings=config.quant.embeddings,
        new_tokens=config.data.new_tokens,
        **encoding,
        **options,
    )
    adapter = _complete(config, adapter | started, targets, model.params, beside)
    if config.lora.adapter is not None:
        adapter = continue_from(config.lora.adapter, adapter, model)
    return model, adapter | start_prompt(config, model)


def undo_relative(adapter: Adapter) -> Adapter:
    """Return the adapter of a run's own base, from the one written for the original weights.

    Args:
        adapter: What `lora.relative_to_start` returned.
    """
    return {
        path: replace(pair, a=pair.a[..., : pair.rank // 2, :], b=pair.b[..., : pair.rank // 2])
        if isinstance(pair, LoraPair)
        else pair
        for path, pair in adapter.items()
    }


def _in_four_bits(config: Config, path: str) -> bool:
    return config.method == "qlora" and is_quantized(path, embeddings=config.quant.embeddings)


def _as_it_is(kernel: Array) -> Array:
    return kernel


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


def _complete(
    config: Config, adapter: Adapter, targets: Targets, base: PyTree, beside: Beside
) -> Adapter:
    """The updates with their magnitudes, if they have any, and what trains beside them."""
    if config.lora.dora:
        adapter = add_magnitudes(base, adapter)
    found = {target.path: target for target in targets.found}
    rows = {path: train_tokens(base, found[path], rows) for path, rows in beside.tokens.items()}
    return adapter | train_whole(base, beside.whole) | rows
