# SPDX-License-Identifier: Apache-2.0
"""The prompt or prefix of a run, beside LoRA or alone: where it starts."""

import zlib
from dataclasses import replace

import jax

from ..config import Config
from ..lora import Adapter
from ..models import DecoderConfig, Model, abstract_model
from ..prompts import init_prefix, init_prompt

_INITS = {"prompt": init_prompt, "prefix": init_prefix}


def start_prompt(config: Config, model: Model) -> Adapter:
    """Return the virtual tokens that a run trains, as an adapter; empty if there are none.

    Args:
        config: Settings.
        model: The decoder with its frozen base, from which they start.

    Raises:
        InputError: Too many for the model's context, or a text without tokens.
    """
    prompt = config.prompt
    if prompt.kind == "none":
        return {}
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"prompt"))
    return _INITS[prompt.kind](
        key, model, tokens=prompt.tokens, init=prompt.init, text=prompt.init_text
    )


def prompt_shapes(config: Config, decoder: DecoderConfig) -> Adapter:
    """Return the same as shapes; nothing is read.

    Args:
        config: Settings.
        decoder: The model's shape.

    Raises:
        InputError: Too many for the model's context.
    """
    random = replace(config, prompt=replace(config.prompt, init="random", init_text=None))
    return jax.eval_shape(lambda: start_prompt(random, abstract_model(decoder)))
