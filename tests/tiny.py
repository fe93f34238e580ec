# SPDX-License-Identifier: Apache-2.0
"""A tiny random decoder, dense or quantized, for tests of everything that runs a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jax_qlora as jq
from jax_qlora.models import Model, decoder_functions, init_params
from jax_qlora.models.presets import TINY


class Letters:
    """The least a tokenizer must do: token ids to text and back."""

    eos_token_id = 2

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(97 + token % 26) for token in row if token != 2) for row in rows]


def tiny_model(**changes: Any) -> Model:
    """A model whose outputs are far from uniform, with lifted functions."""
    config = dataclasses.replace(TINY, eos_token_ids=(2,), **changes)
    params = init_params(jax.random.key(7), config)
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim == 3 else x, params)
    functions = decoder_functions(config).map(jq.lift)
    return Model(
        config=config,
        params=params,
        functions=functions,
        compute_dtype=jnp.float32,
        tokenizer=Letters(),
    )


def quantized(model: Model) -> tuple[Any, dict[str, jq.LoraPair]]:
    """An NF4 base of the model and an adapter that changes something."""
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    base = jq.quantize(model.params, targets, block_size=32)
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, alpha=4)
    return base, jax.tree.map(lambda x: x + 0.05, adapter)
