# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens against plain code: embeddings put in front, keys and values concatenated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.models import Model, decoder_functions
from jax_qlora.models.attention import grouped_query_attention
from jax_qlora.models.decoder import Decoder
from jax_qlora.models.per_layer import per_layer
from jax_qlora.models.rope import all_angles
from tests.helpers import assert_trees_close, normal
from tests.tiny import quantized, tiny_model

COUNT, SEQ = 5, 12
KINDS = ("prompt", "prefix")
WINDOWS: dict[str, Any] = dict(
    n_layers=2, sliding_window=4, local_layers=(True, False), local_rope_theta=500.0, qk_norm=True
)

LEARNED: dict[str, Any] = dict(
    learned_positions=True,
    layer_norm=True,
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    activation="gelu_tanh",
    n_kv_heads=4,
)
MODELS_OF_KINDS = [
    pytest.param(
        kind,
        changes,
        id=f"{name}-{kind}",
        marks=[pytest.mark.slow] if kind == "prompt" and changes else [],
    )
    for name, changes in [("plain", {}), ("windows", WINDOWS), ("learned", LEARNED)]
    for kind in KINDS
]


@functools.cache
def tiny(**changes: Any) -> Model:
    return tiny_model(**{"n_layers": 2, "max_length": 1024, **changes})


def virtual_of(kind: str, model: Model, count: int = COUNT) -> Any:
    """Values of an ordinary size, drawn by NumPy."""
    c = model.config
    if kind == "prompt":
        return {"prompt": jq.VirtualTokens(normal((count, c.d_model), 1) * 0.5)}
    shape = (c.n_layers, count, c.n_kv_heads, c.head_dim)
    path = "layers/self_attn/prefix"
    return {f"{path}/{x}": jq.VirtualTokens(normal(shape, i)) for i, x in enumerate("kv")}


def tokens_of(rows: int = 2, seq: int = SEQ) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(3, 96, (rows, seq), dtype=np.int32))


def assert_near(got: Any, want: Any) -> None:
    """To a hundred-thousandth of the largest value: the order of summation differs."""
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def by_hand(model: Model, virtual: Any, tokens: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Final hidden states of one document a row, layer by layer, with plain masks.

    The modules compute norms, projections and MLPs; who sees whom, at which position, is here.
    """
    config, seq = model.config, tokens.shape[1]
    graphdef = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    )[0]
    decoder = nnx.merge(graphdef, model.params)
    x, keys, values = decoder.embed_tokens(tokens), None, None
    if "prompt" in virtual:
        rows = jnp.tile(virtual["prompt"].values[None], (tokens.shape[0], 1, 1))
        x = jnp.concatenate([rows.astype(x.dtype), x], axis=1)
        positions = jnp.arange(COUNT + seq)
    else:
        keys, values = (virtual[f"layers/self_attn/prefix/{x}"].values for x in "kv")
        positions = COUNT + jnp.arange(seq)
    positions = jnp.tile(positions[None], (tokens.shape[0], 1)).astype(jnp.int32)
    if decoder.embed_positions is not None:
        x = x + decoder.embed_positions(positions)
    angles, local_angles = all_angles(config, positions)
    for number, window in enumerate(config.windows):
        layer = jax.tree.map(lambda a, n=number: a[n], nnx.state(decoder.layers))
        layer = nnx.merge(nnx.graphdef(decoder.layers), layer)
        data = jax.tree.map(lambda a, n=number: a[n], per_layer(config))
        q, k, v = layer.queries_keys_values(x, data.angles(angles, local_angles))
        if keys is not None and values is not None:
            before = (jnp.swapaxes(a[number], 0, 1)[None].astype(k.dtype) for a in (keys, values))
            k, v = (
                jnp.concatenate([jnp.tile(a, (x.shape[0], 1, 1, 1)), b], axis=2)
                for a, b in zip(before, (k, v), strict=True)
            )
        back = jnp.arange(q.shape[1])[:, None] + (k.shape[2] - q.shape[1])
        back = back - jnp.arange(k.shape[2])[None]
        seen = (back >= 0) & (back < (window or 10**6))
        seen = jnp.tile(seen[None], (x.shape[0], 1, 1))
        out = grouped_query_attention(layer.self_attn.scale, q, k, v, seen)
        x = layer.finish(x, out)
    return x[:, -seq:]


@pytest.mark.parametrize(("kind", "changes"), MODELS_OF_KINDS)
def test_hidden_states_are_those_of_plain_code(kind: str, changes: dict[str, Any]):
    """Also with padding, which changes nothing on either side, and windows, which it is not in."""
    model = tiny(**changes)
    virtual, tokens = virtual_of(kind, model), tokens_of()
    params = jq.attach(model.params, virtual)
    want = np.asarray(jax.jit(functools.partial(by_hand, model))(virtual, tokens))
    run = jax.jit(model.hidden)
    assert_near(run(params, tokens), want)
    for left in (0, 3):
        padded = jnp.pad(tokens, ((0, 0), (left, 3 - left)), constant_values=7)
        mask = jnp.pad(jnp.ones_like(tokens), ((0, 0), (left, 3 - left)))
        got = run(params, padded, attention_mask=mask)[:, left : left + SEQ]
        assert_near(got, want)
    plain = np.asarray(run(model.params, tokens))
    assert np.abs(plain - want).max() > 0.1  # it matters
    own = jnp.tile(jnp.arange(SEQ)[None], (2, 1))
    assert_near(run(params, tokens, positions=own), want)


@pytest.mark.parametrize(("kind", "changes"), MODELS_OF_KINDS)
def test_decoding_from_the_cache_is_the_full_forward(kind: str, changes: dict[str, Any]):
    model = tiny(**changes)
    params, tokens = jq.attach(model.params, virtual_of(kind, model)), tokens_of()
    want = np.asarray(jax.jit(model.apply)(params, tokens))
    decode = jax.jit(model.decode)
    cache = model.init_cache(2, 2 + SEQ, params)
    padded = jnp.pad(tokens[:, :8], ((0, 0), (2, 0)))
    mask = jnp.pad(jnp.ones((2, 8), bool), ((0, 0), (2, 0)))
    logits, cache = decode(params, padded, cache, attention_mask=mask)
    assert_near(logits[:, 2:], want[:, :8])
    for place in range(8, SEQ):
        logits, cache = decode(params, tokens[:, place : place + 1], cache)
        assert_near(logits[:, 0], want[:, place])
    # a cache that was begun without them gives no answer, not even later
    other = model.init_cache(2, 2 + SEQ + COUNT)
    logits, other = decode(params, padded, other, attention_mask=mask)
    assert np.isnan(logits).all()
    assert np.isnan(decode(params, tokens[:, 8:9], other)[0]).all()


def loss_by_hand(model: Model, virtual: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
    return weighed(by_hand(model, virtual, tokens, dtype))


def weighed(hidden: jax.Array) -> jax.Array:
    wave = jnp.cos(jnp.arange(hidden.shape[-1]))[None, None]
    return jnp.sum(hidden.astype(jnp.float32) * wave) / hidden.shape[1]


@functools.cache
def gradient_by_hand(kind: str, seq: int, dtype: Any = jnp.float32) -> Any:
    model = tiny()
    run = jax.jit(jax.grad(loss_by_hand, argnums=1), static_argnums=(0, 3))
    return run(model, virtual_of(kind, model), tokens_of(1, seq), dtype)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param("prompt", dict(remat="none"), marks=pytest.mark.slow),
        ("prompt", dict(remat="full", layer_chunk=256)),
        pytest.param("prefix", dict(remat="dots"), marks=pytest.mark.slow),
        pytest.param("prefix", dict(remat="full", transform=None), marks=pytest.mark.slow),
        ("prefix", dict(remat="full")),
        ("prefix", dict(remat="full", layer_chunk=256)),
    ],
)
def test_gradients_are_those_of_plain_code(kind: str, how: dict[str, Any]):
    """Of blockwise attention as well: the sequence is longer than a block."""
    model, seq = tiny(), 300
    functions = decoder_functions(model.config, **{"transform": jq.lift, **how})

    @jax.jit
    @jax.grad
    def grad(virtual: Any, tokens: jax.Array) -> jax.Array:
        return weighed(functions.hidden(jq.attach(model.params, virtual), tokens))

    got = grad(virtual_of(kind, model), tokens_of(1, seq))
    want = gradient_by_hand(kind, seq)
    assert min(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(want)) > 1e-3
    assert_trees_close(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", [pytest.param("prompt", marks=pytest.mark.slow), "prefix"])
def test_gradients_in_bfloat16_stay_close(kind: str):
    """No further from float32 than plain code in bfloat16, give or take a half."""
    model, half = tiny(), jnp.bfloat16
    functions = decoder_functions(model.config, compute_dtype=half)

    @jax.jit
    @jax.grad
    def grad(virtual: Any, tokens: jax.Array) -> jax.Array:
        return weighed(functions.hidden(jq.attach(model.params, virtual), tokens))

    got = jax.tree.leaves(grad(virtual_of(kind, model), tokens_of(1, SEQ)))
    exact, plain = (gradient_by_hand(kind, SEQ, dtype) for dtype in (jnp.float32, half))
    for g, p, w in zip(got, *map(jax.tree.leaves, (plain, exact)), strict=True):
        assert g.dtype == jnp.float32
        assert 0 < jnp.linalg.norm(g - w) < 1.5 * jnp.linalg.norm(p - w)


@pytest.mark.parametrize("kind", [pytest.param("prompt", marks=pytest.mark.slow), "prefix"])
def test_over_four_bits_beside_lora(kind: str):
    """Both get their gradient, and a quantized base computes what its dense values do."""
    model = tiny()
    base, lora = quantized(model)
    virtual, tokens = virtual_of(kind, model), tokens_of()

    def loss(adapter: Any, base: Any) -> jax.Array:
        return weighed(model.hidden(jq.attach(base, adapter), tokens))

    run = jax.jit(jax.value_and_grad(loss))
    value, grads = run(lora | virtual, base)
    dense = jq.merge(base)
    want, want_grads = run(lora | virtual, dense)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-4)
    assert all(float(jnp.max(jnp.abs(g))) > 1e-5 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", KINDS)
def test_no_virtual_token_is_the_base(kind: str):
    model, tokens = tiny(), tokens_of()
    params = jq.attach(model.params, virtual_of(kind, model, count=0))
    want = model.hidden(model.params, tokens)
    np.testing.assert_array_equal(model.hidden(params, tokens), want)


def test_what_does_not_fit_is_refused():
    model, tokens = tiny(max_length=16), tokens_of()
    prompt, prefix = (virtual_of(kind, model) for kind in KINDS)
    params = jq.attach(model.params, prompt)
    with pytest.raises(InputError, match="17 tokens, 5 of them virtual: expected at most 16"):
        model.hidden(params, tokens)
    with pytest.raises(InputError, match="segment_ids for parameters with 5 virtual tokens"):
        model.hidden(params, tokens[:, :8], segment_ids=jnp.zeros((2, 8), jnp.int32))
    with pytest.raises(InputError, match="expected virtual tokens of one kind"):
        model.hidden(jq.attach(model.params, prompt | prefix), tokens)
    wide = {"prompt": jq.VirtualTokens(jnp.zeros((5, 33)))}
    with pytest.raises(InputError, match=r"shape \(5, 33\): expected \[tokens, 32\]"):
        model.hidden(jq.attach(model.params, wide), tokens)
    deep = jax.tree.map(lambda x: jnp.concatenate([x, x]), prefix)
    with pytest.raises(InputError, match=r"expected \[2, tokens, 2, 8\]"):
        model.hidden(jq.attach(model.params, deep), tokens)
    half = {path: x for path, x in prefix.items() if path.endswith("k")}
    with pytest.raises(InputError, match="expected keys 'k' and values 'v'"):
        model.hidden(jq.attach(model.params, half), tokens)
    uneven = prefix | jax.tree.map(lambda x: x[:, :3], half)
    with pytest.raises(InputError, match=r"\[3, 5\] keys and values: expected equal numbers"):
        model.hidden(jq.attach(model.params, uneven), tokens)
