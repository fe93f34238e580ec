# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_qlora.errors import InputError
from jax_qlora.models import (
    DecoderConfig,
    Model,
    abstract_params,
    decoder_functions,
    init_cache,
    init_params,
)
from jax_qlora.models.presets import TINY
from jax_qlora.tree import flatten_paths

from ..helpers import assert_trees_close

BIASED = dataclasses.replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True, tied=True)
ROWS, SEQ = 2, 12


@functools.cache
def model(config: DecoderConfig = TINY, **settings: Any) -> Model:
    """A random model; its functions are jitted, so that a test compiles each shape once."""
    params = init_params(jax.random.key(7), config)
    params = jax.tree.map(lambda x: x + 0.02 * jnp.ones_like(x), params)  # no bias is zero
    functions = decoder_functions(config, **settings).map(jax.jit)
    dtype = settings.get("compute_dtype", jnp.float32)
    return Model(config=config, params=params, functions=functions, compute_dtype=dtype)


def tokens(key: jax.Array, rows: int = ROWS, seq: int = SEQ) -> jax.Array:
    return jax.random.randint(key, (rows, seq), 3, TINY.vocab_size)


def test_parameters_have_the_names_and_shapes_of_the_checkpoint():
    paths = {p: x.shape for p, x in flatten_paths(abstract_params(TINY)).items()}
    assert paths == {
        "embed_tokens/embedding": (96, 32),
        "layers/input_layernorm/scale": (3, 32),
        "layers/mlp/down_proj/kernel": (3, 64, 32),
        "layers/mlp/gate_proj/kernel": (3, 32, 64),
        "layers/mlp/up_proj/kernel": (3, 32, 64),
        "layers/post_attention_layernorm/scale": (3, 32),
        "layers/self_attn/k_proj/kernel": (3, 32, 16),
        "layers/self_attn/o_proj/kernel": (3, 32, 32),
        "layers/self_attn/q_proj/kernel": (3, 32, 32),
        "layers/self_attn/v_proj/kernel": (3, 32, 16),
        "lm_head/kernel": (32, 96),
        "norm/scale": (32,),
    }
    tied = flatten_paths(abstract_params(BIASED))
    assert "lm_head/kernel" not in tied
    assert tied["layers/self_attn/q_proj/bias"].shape == (3, 32)


def test_causality():
    """A token's logits do not depend on later embeddings, and do on earlier ones."""
    m = model(dataclasses.replace(BIASED, tied=False))

    def logits_at(table: jax.Array, position: int) -> jax.Array:
        params = m.params | {"embed_tokens": {"embedding": table}}
        # one row of the table per token, so that its gradient tells positions apart
        return jnp.sum(m.apply(params, jnp.arange(3, 3 + SEQ)[None])[0, position] ** 2)

    grad = jax.grad(logits_at)(m.params["embed_tokens"]["embedding"], 5)[3 : 3 + SEQ]
    assert jnp.all(grad[6:] == 0)
    assert jnp.all(jnp.any(grad[:6] != 0, axis=-1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(key: jax.Array, side: str):
    m, t = model(), tokens(key)
    pad = jnp.zeros((ROWS, 4), t.dtype)
    mask = jnp.concatenate([jnp.ones_like(t), pad], axis=1)
    padded = jnp.concatenate([t, pad], axis=1)
    keep = slice(0, SEQ)
    if side == "left":
        padded, mask, keep = jnp.roll(padded, 4, 1), jnp.roll(mask, 4, 1), slice(4, None)
    got = m.apply(m.params, padded, attention_mask=mask)
    assert jnp.all(jnp.isfinite(got))
    np.testing.assert_allclose(got[:, keep], m.apply(m.params, t), atol=1e-5)


def test_a_packed_row_equals_its_documents(key: jax.Array):
    m, t = model(), tokens(key, 1)
    segments = jnp.array([[0] * 3 + [1] * 5 + [2] * 4])
    packed = m.apply(m.params, t, segment_ids=segments)
    alone = [m.apply(m.params, t[:, s]) for s in (slice(0, 3), slice(3, 8), slice(8, 12))]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)
    assert not np.allclose(packed, m.apply(m.params, t), atol=1e-3)


def test_a_packed_row_with_padding_on_both_sides(key: jax.Array):
    m, t = model(), tokens(key, 1)
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    mask = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    packed = m.apply(m.params, t, segment_ids=segments, attention_mask=mask)
    alone = [m.apply(m.params, t[:, s]) for s in (slice(2, 6), slice(6, 10))]
    np.testing.assert_allclose(packed[:, 2:10], jnp.concatenate(alone, axis=1), atol=1e-5)


def test_positions_override(key: jax.Array):
    m, t = model(), tokens(key)
    want = m.apply(m.params, t)
    shifted = jnp.broadcast_to(jnp.arange(SEQ) + 9, t.shape)  # rotary positions are relative
    np.testing.assert_allclose(m.apply(m.params, t, positions=shifted), want, atol=1e-4)
    stretched = jnp.broadcast_to(jnp.arange(SEQ) * 3, t.shape)
    assert not np.allclose(m.apply(m.params, t, positions=stretched), want, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_decoding_token_by_token_equals_the_whole(key: jax.Array, side: str):
    """The prompt in one call, then single tokens, whatever side the prompt is padded on."""
    m, t = model(), tokens(key)
    want = m.apply(m.params, t)
    prompt, lengths = 6, (6, 4) if side != "none" else (6, 6)
    ids, mask = np.zeros((ROWS, prompt), np.int32), np.zeros((ROWS, prompt), bool)
    for row, n in enumerate(lengths):
        at = slice(prompt - n, None) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = t[row, :n], True
    step = jax.jit(m.decode, donate_argnums=2)
    cache = m.init_cache(ROWS, 16)
    logits, cache = step(m.params, jnp.array(ids), cache, attention_mask=jnp.array(mask))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row][mask[row]], want[row, :n], atol=1e-5)
    for i in range(5):
        following = jnp.array([[t[row, n + i]] for row, n in enumerate(lengths)])
        logits, cache = step(m.params, following, cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(logits[row, 0], want[row, n + i], atol=1e-5)
    assert int(cache.length) == prompt + 5


def test_a_full_cache_gives_no_answer(key: jax.Array):
    m, t = model(), tokens(key)
    logits, cache = m.decode(m.params, t, m.init_cache(ROWS, SEQ))
    assert jnp.all(jnp.isfinite(logits))
    logits, _ = m.decode(m.params, t[:, :1], cache)
    assert jnp.all(jnp.isnan(logits))


def test_a_token_outside_the_vocabulary_gives_no_answer():
    m = model()
    logits = m.apply(m.params, jnp.array([[5, 6], [5, TINY.vocab_size]]))
    assert jnp.all(jnp.isfinite(logits[0])) and jnp.all(jnp.isnan(logits[1, 1]))


def test_remat_trades_memory_and_changes_no_gradient(key: jax.Array):
    """Bytes kept for the backward: those of attention too > of linears > the layers' inputs."""
    config = dataclasses.replace(TINY, max_length=256)
    t = tokens(key, 4, 256)  # attention in blocks
    params = model().params
    grads, temporaries = {}, {}
    for remat in ("none", "dots", "full"):
        apply = decoder_functions(config, remat=remat).apply
        grad = jax.jit(jax.grad(lambda p, apply=apply: jnp.mean(apply(p, t) ** 2)))
        compiled = grad.lower(params).compile()
        grads[remat] = compiled(params)
        memory = compiled.memory_analysis()
        assert memory is not None
        temporaries[remat] = memory.temp_size_in_bytes
    assert temporaries["none"] > temporaries["dots"] > temporaries["full"]
    assert_trees_close(grads["dots"], grads["none"], rtol=1e-5, atol=1e-6)
    assert_trees_close(grads["full"], grads["none"], rtol=1e-5, atol=1e-6)


def dots_of(jaxpr: Any) -> list[Any]:
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += dots_of(inner)
    return found


def test_layers_are_scanned_and_kernels_are_used_as_they_are(key: jax.Array):
    """Seven linears, two attention matmuls and a head: once each, whatever the number of layers."""
    m = model(compute_dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(m.apply)(m.params, tokens(key))
    dots = dots_of(jaxpr.jaxpr)
    assert len(dots) == 10  # jit boundaries are looked through
    assert all(v.aval.dtype == jnp.bfloat16 for eqn in dots for v in eqn.invars)
    assert all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in dots)
    linears = [eqn for eqn in dots if len(eqn.invars[1].aval.shape) == 2]
    assert len(linears) == 8 and all(len(eqn.invars[0].aval.shape) == 2 for eqn in linears)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_close(key: jax.Array, dtype):
    t = tokens(key)
    wide, half = model(), model(compute_dtype=dtype)
    got, want = half.apply(half.params, t), wide.apply(wide.params, t)
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - want) < 0.02 * jnp.linalg.norm(want)
    assert half.init_cache(1, 4).k.dtype == dtype


def test_logits_are_the_head_of_hidden(key: jax.Array):
    m, t = model(), tokens(key)
    hidden = m.hidden(m.params, t)
    assert hidden.shape == (ROWS, SEQ, TINY.d_model)
    np.testing.assert_array_equal(m.head(m.params, hidden), m.apply(m.params, t))
    some = m.head(m.params, hidden[:, 3])
    np.testing.assert_allclose(some, m.apply(m.params, t)[:, 3], atol=1e-5)


def test_parameters_are_an_argument(key: jax.Array):
    """Other parameters run through the same compiled function."""
    m, t = model(), tokens(key)
    traces = []

    @jax.jit
    def run(params: Any, t: jax.Array) -> jax.Array:
        traces.append(t.shape)
        return m.apply(params, t)

    other = jax.tree.map(lambda x: x * 1.5, m.params)
    assert not np.allclose(run(m.params, t), run(other, t))
    assert len(traces) == 1


def test_init_params_draws_the_dtype_asked_for(key: jax.Array):
    params = init_params(key, TINY, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not jnp.array_equal(kernel[0], kernel[1])


def test_too_long_a_sequence():
    m = model()
    long = jnp.ones((1, TINY.max_length + 1), jnp.int32)
    with pytest.raises(InputError, match="sequence of 65 tokens: expected at most 64"):
        m.apply(m.params, long)
    m.apply(m.params, long, segment_ids=jnp.arange(65)[None] // 40)  # packed: no document is
    with pytest.raises(InputError, match="cache of 65 tokens: expected at most 64"):
        m.init_cache(1, 65)
    with pytest.raises(InputError, match="12 tokens for a cache of 8 slots"):
        m.decode(m.params, jnp.ones((1, 12), jnp.int32), m.init_cache(1, 8))


def test_unknown_settings():
    with pytest.raises(InputError, match="compute_dtype is int8: expected float32, bfloat16"):
        decoder_functions(TINY, compute_dtype=jnp.int8)
    with pytest.raises(InputError, match="remat is 'some': expected one of none, dots, full"):
        decoder_functions(TINY, remat="some")


def test_functions_can_be_transformed(key: jax.Array):
    """How a lifted model is made: each function wrapped, the methods unchanged."""
    m, t = model(), tokens(key)
    calls = []

    def spy(f):
        @functools.wraps(f)
        def g(*args: Any, **kwargs: Any):
            calls.append(f.__name__)
            return f(*args, **kwargs)

        return g

    spied = dataclasses.replace(m, functions=m.functions.map(spy))
    spied.decode(m.params, t, init_cache(TINY, ROWS, SEQ))
    assert calls == ["decode_hidden", "head"]
