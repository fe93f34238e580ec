# SPDX-License-Identifier: Apache-2.0
"""Kernels in host memory: fetched in use, to the same bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.models import decoder_functions, init_params
from jax_qlora.models.presets import TINY
from jax_qlora.quant import streaming
from tests.helpers import needs_host, normal
from tests.lift.cases import random_adapter


def kinds(tree: Any) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


@needs_host
def test_what_is_streamed_says_so():
    q = jq.quantize_array(normal((2, 64, 32)))
    flat = jq.quantize_array(normal((64, 32)))
    tree = jq.stream({"stack": q, "flat": flat, "dense": jnp.ones(3)})
    assert kinds(tree["stack"]) == {"pinned_host"}
    assert "pinned_host" not in kinds(tree["flat"]) | kinds(tree["dense"])
    assert "streamed from the host" in repr(tree["stack"]) and "streamed" not in repr(flat)
    np.testing.assert_array_equal(jq.dequantize(tree["stack"]), jq.dequantize(q))


@needs_host
@pytest.mark.parametrize(
    ("remat", "dtype"),
    [
        ("none", jnp.float32),
        ("full", jnp.float32),
        *(
            pytest.param(remat, dtype, marks=pytest.mark.slow)
            for remat, dtype in [
                ("dots", jnp.float32),
                ("offload", jnp.float32),
                *((remat, jnp.bfloat16) for remat in ("none", "dots", "full", "offload")),
            ]
        ),
    ],
)
def test_a_scanned_model_keeps_its_bits(remat: str, dtype: Any):
    model = jq.lift(decoder_functions(TINY, compute_dtype=dtype, remat=remat).apply)
    params = init_params(jax.random.key(0), TINY)
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    targets = jq.find_targets(model, params, tokens)
    base = jq.quantize(params, targets)
    adapter = random_adapter(targets)

    @jax.jit
    def step(adapter: Any, base: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            return jnp.mean(jax.nn.logsumexp(model(jq.attach(base, adapter), tokens), axis=-1))

        return jax.value_and_grad(loss)(adapter)

    streamed = jq.stream(base)
    assert kinds(streamed["layers"]["mlp"]["up_proj"]) == {"pinned_host"}
    want, got = step(adapter, base), step(adapter, streamed)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@needs_host
def test_merging_fetches():
    q = {"w": jq.quantize_array(normal((2, 64, 32)))}
    np.testing.assert_array_equal(jq.merge(jq.stream(q))["w"], jq.merge(q)["w"])


def test_a_device_without_host_memory():
    class Memory:
        kind = "device"

    class Bare:
        platform, device_kind = "npu", "Bare 1"

        def addressable_memories(self) -> list[Any]:
            return [Memory()]

    bare = Bare()
    with pytest.raises(InputError, match="npu .* the kinds device and jax .* Keep the weights"):
        streaming.streaming_memory(bare)
    with pytest.raises(InputError, match='remat "offload" on npu .* Use remat "full"'):
        streaming.offload_memory(bare)
    assert streaming.offload_memory().memory_kind == "pinned_host"  # on jax 0.10's CPU too


@needs_host
def test_a_streamed_slice_is_complete_in_itself():
    q = jq.stream({"w": jq.quantize_array(normal((3, 64, 32)))})["w"]
    first = jax.tree.map(lambda x: x[0], q)
    assert first.streamed and first.shape == (64, 32)
    assert dataclasses.replace(first, streamed=False).layout == q.layout
