# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts against every expert run on every token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_qlora.models.experts import MixtureOfExperts
from jax_qlora.models.presets import TINY
from tests.helpers import assert_trees_close, normal

N, K, ROWS = 4, 2, 300  # more rows than a block holds


def dense(params: Any, x: jax.Array, *, normalize: bool) -> jax.Array:
    """All experts, weighted by the router: zero where it did not choose one."""
    scores = jax.nn.softmax(x @ params["gate"]["kernel"], axis=-1)
    best, chosen = jax.lax.top_k(scores, K)
    if normalize:
        best = best / jnp.sum(best, axis=-1, keepdims=True)
    weights = jnp.sum(jax.nn.one_hot(chosen, N) * best[..., None], axis=-2)
    kernels = {name: value["kernel"] for name, value in params["experts"].items()}
    gate, up = (jnp.einsum("bsd,edf->bsef", x, kernels[n]) for n in ("gate_proj", "up_proj"))
    y = jnp.einsum("bsef,efd->bsed", jax.nn.silu(gate) * up, kernels["down_proj"])
    return jnp.einsum("bsed,bse->bsd", y, weights)


@pytest.mark.parametrize("normalize", [True, False])
def test_values_and_gradients(normalize: bool):
    config = dataclasses.replace(
        TINY, n_experts=N, experts_per_token=K, normalize_routing=normalize
    )
    module = MixtureOfExperts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    params, x = nnx.to_pure_dict(state), normal((2, ROWS // 2, config.d_model))
    weights = normal(x.shape, 1)

    def run(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x)

    def with_gradients(f: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weights), (0, 1)))(params, x)

    got = with_gradients(run)
    want = with_gradients(lambda params, x: dense(params, x, normalize=normalize))
    assert_trees_close(got, want, rtol=1e-4, atol=2e-4)
