# SPDX-License-Identifier: Apache-2.0
"""Layers in a loop with a backward by hand: the same numbers as autodiff's, whole or in chunks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.models import Model, decoder_functions
from jax_qlora.models.layer_loop import _chunk_size
from jax_qlora.quant.streaming import fetch
from tests.helpers import needs_host
from tests.lift.walk import shapes_of
from tests.tiny import quantized, tiny_model

BATCH, SEQ = 2, 300
CHUNKED, WHOLE = BATCH * 256, BATCH * SEQ


@functools.cache
def tiny() -> tuple[Model, Any, Any]:
    model = tiny_model(n_layers=2, max_length=2**15)
    return model, *quantized(model)


def inputs() -> tuple[Any, Any, Any]:
    """Tokens, of which some are padding, and three documents."""
    tokens = jax.random.randint(jax.random.key(2), (BATCH, SEQ), 3, tiny()[0].config.vocab_size)
    valid = jnp.arange(SEQ)[None] < jnp.array([SEQ, SEQ - 40])[:, None]
    return tokens, valid, jnp.tile((jnp.arange(SEQ) // 100)[None], (BATCH, 1))


def loss_of(params: Any, dtype: Any = jnp.float32, **how: Any) -> jax.Array:
    tokens, valid, segments = inputs()
    functions = decoder_functions(tiny()[0].config, compute_dtype=dtype, transform=jq.lift, **how)
    hidden = functions.hidden(params, tokens, attention_mask=valid, segment_ids=segments)
    hidden = hidden.astype(jnp.float32) * jnp.cos(jnp.arange(hidden.shape[-1]))[None, None]
    return jnp.sum(jnp.where(valid[..., None], hidden, 0.0)) / SEQ


@functools.cache
def gradients(weights: str, **how: Any) -> Any:
    model, base, adapter = tiny()
    if weights == "dense":
        return jax.jit(jax.value_and_grad(functools.partial(loss_of, **how)))(model.params)

    def loss(adapter: Any) -> jax.Array:
        return loss_of(jq.attach(base, adapter), **how)

    return jax.jit(jax.value_and_grad(loss))(adapter)


def assert_close_in_norm(got: Any, want: Any) -> None:
    """Leaf by leaf, to 1e-4: an element is a sum over 600 tokens in another order."""
    for (path, w), g in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        assert g.shape == w.shape
        error, size = float(jnp.linalg.norm(g - w)), float(jnp.linalg.norm(w))
        assert error <= 1e-4 * size, (jax.tree_util.keystr(path), error / size)


@pytest.mark.parametrize(
    ("weights", "chunk"),
    [
        ("dense", CHUNKED),
        ("4 bits", CHUNKED),
        pytest.param("4 bits", WHOLE, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_autodiff(weights: str, chunk: int):
    """Whole layers, and chunks of which the last is half empty."""
    want = gradients(weights)
    got = gradients(weights, remat="full", layer_chunk=chunk)
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    assert_close_in_norm(got[1], want[1])
    layers = got[1]["layers"] if weights == "dense" else got[1]
    moved = [float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(layers)]
    assert all(size > 1e-4 for size in moved)


def test_gradients_in_bfloat16_stay_close():
    """No further from float32 than autodiff's in bfloat16, give or take a fifth."""
    exact = jax.tree.leaves(gradients("4 bits")[1])
    autodiff, got = (
        jax.tree.leaves(gradients("4 bits", dtype=jnp.bfloat16, **how)[1])
        for how in ({}, {"remat": "full", "layer_chunk": CHUNKED})
    )
    for g, a, w in zip(got, autodiff, exact, strict=True):
        assert g.dtype == w.dtype
        assert jnp.linalg.norm(g - w) < 1.2 * jnp.linalg.norm(a - w)


@needs_host
@pytest.mark.parametrize("chunk", [WHOLE, CHUNKED])
def test_what_waits_in_host_memory_keeps_its_bits(chunk: int):
    """The inputs of layers, and streamed kernels, each fetched while the layer before computes."""
    _, base, adapter = tiny()
    want = gradients("4 bits", remat="full", layer_chunk=chunk)
    streamed = jq.stream(base)

    @jax.jit
    def step(adapter: Any, base: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            params = jq.attach(base, adapter)
            return loss_of(params, remat="offload", layer_chunk=chunk, fetch=fetch)

        return jax.value_and_grad(loss)(adapter)

    jax.tree.map(np.testing.assert_array_equal, step(adapter, streamed), want)


def test_dropout_in_the_backward_is_that_of_the_forward():
    """A directional derivative against a difference quotient, with other masks in every chunk."""
    model, base, _ = tiny()
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, alpha=4, dropout=0.5)
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)

    @jax.jit
    def loss(adapter: Any, key: Any) -> jax.Array:
        params = jq.attach(base, adapter, dropout_key=key)
        return loss_of(params, remat="full", layer_chunk=CHUNKED)

    key, step = jax.random.key(0), 1e-3
    grads = jax.jit(jax.grad(loss))(adapter, key)
    along = sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)) ** 0.5

    def moved(by: float) -> jax.Array:
        return loss(jax.tree.map(lambda x, g: x + by * g / along, adapter, grads), key)

    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(float(along), rel=0.02)
    assert loss(adapter, key) != loss(adapter, jax.random.key(1))


def test_dropout_on_experts():
    """Each has a key of its own. Traced, not run."""
    model = tiny_model(n_layers=2, n_experts=4, experts_per_token=2)
    tokens = jnp.ones((1, 600), jnp.int32)
    targets = jq.find_targets(model.apply, model.params, tokens[:, :4])
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, dropout=0.5)
    functions = decoder_functions(
        dataclasses.replace(model.config, max_length=1024), transform=jq.lift, remat="full",
        layer_chunk=256,
    )  # fmt: skip

    def loss(adapter: Any) -> jax.Array:
        params = jq.attach(model.params, adapter, dropout_key=jax.random.key(0))
        return jnp.mean(functions.hidden(params, tokens))

    grads = jax.eval_shape(jax.grad(loss), adapter)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)


def test_several_adapters_at_once():
    model, base, adapter = tiny()

    def grad(adapter: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            return loss_of(jq.attach(base, adapter), remat="full", layer_chunk=CHUNKED)

        return jax.grad(loss)(adapter)

    both = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), adapter)
    second = jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(grad))(both))
    want = jax.jit(grad)(jax.tree.map(lambda x: x[1], both))
    assert_close_in_norm(second, want)


def test_a_long_sequence_is_never_whole_where_it_is_wide():
    """Of `seq` long there are the residual stream, keys and values, and nothing of the MLP."""
    model, base, adapter = tiny()
    config, seq = model.config, 2**14
    functions = decoder_functions(config, transform=jq.lift, remat="full", layer_chunk=1024)

    def loss(adapter: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(functions.hidden(jq.attach(base, adapter), tokens))

    tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    widths = {s[-1] for s in shapes_of(jax.grad(loss), adapter, tokens) if seq in s[:-1]}
    assert config.d_model in widths
    assert max(widths) <= config.d_model, widths


@pytest.mark.parametrize("seq", [4, 700])
def test_targets_are_found_in_the_loop(seq: int):
    """Layers looked up by number are the stacks that they come from."""
    model, _, adapter = tiny()
    functions = decoder_functions(model.config, transform=jq.lift, remat="full", layer_chunk=256)
    tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    targets = jq.find_targets(functions.apply, model.params, tokens)
    assert {path: target.lead for path, target in targets.items()} == dict.fromkeys(adapter, (2,))


@pytest.mark.parametrize(
    ("seq", "most", "size"),
    [(300, 300, 300), (300, 299, 256), (2048, 512, 512), (1100, 1024, 768), (5, 1, 5)],
)
def test_chunks_are_few_and_of_whole_blocks(seq: int, most: int, size: int):
    assert _chunk_size(seq, most) == size
