# SPDX-License-Identifier: Apache-2.0
"""What families add to the decoder; that it is what theirs is, the checkpoints' tests say."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.models import DecoderConfig, Model, decoder_functions, init_params
from jax_qlora.models.presets import TINY

from ..helpers import assert_trees_close

WINDOW = dataclasses.replace(TINY, sliding_window=3, local_layers=(True, False, True))
FUSED = dataclasses.replace(TINY, fused=True, qkv_bias=True)
GEMMA = dataclasses.replace(
    WINDOW,
    local_rope_theta=100.0,
    qk_norm=True,
    query_pre_attn_scalar=5.0,
    attention_softcap=2.0,
    logit_softcap=3.0,
    activation="gelu_tanh",
    norm_offset=True,
    post_norms=True,
    embed_scale=True,
    tied=True,
)


@functools.cache
def model(config: DecoderConfig) -> Model:
    params = init_params(jax.random.key(7), config)
    params = jax.tree.map(lambda x: x + 0.02, params)  # no bias is zero
    functions = decoder_functions(config).map(jax.jit)
    return Model(config=config, params=params, functions=functions, compute_dtype=jnp.float32)


def tokens(rows: int = 2, seq: int = 12) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(3, TINY.vocab_size, (rows, seq)), "int32")


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_windows_counts_tokens_and_not_padding(side: str):
    m, t, prompt, lengths = model(GEMMA), tokens(), 6, (6, 4)
    want = m.apply(m.params, t)
    ids, mask = np.zeros((2, prompt), np.int32), np.zeros((2, prompt), bool)
    for row, n in enumerate(lengths):
        at = slice(prompt - n, None) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = t[row, :n], True
    cache = m.init_cache(2, 16)
    logits, cache = m.decode(m.params, jnp.array(ids), cache, attention_mask=jnp.array(mask))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row][mask[row]], want[row, :n], atol=1e-5)
    for i in range(5):
        following = jnp.array([[t[row, n + i]] for row, n in enumerate(lengths)])
        logits, cache = m.decode(m.params, following, cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(logits[row, 0], want[row, n + i], atol=1e-5)


def test_a_window_hides_what_is_further_back():
    """A change is seen by the tokens of one window in each layer; a global layer has none."""
    t = jnp.concatenate([tokens(1), tokens(1).at[0, 4].add(1)])
    for local, last in (((True, True), 8), ((True, False), 11)):
        m = model(dataclasses.replace(TINY, n_layers=2, sliding_window=3, local_layers=local))
        first, second = np.asarray(m.apply(m.params, t))
        assert np.flatnonzero(np.any(first != second, axis=-1)).max() == last


def test_logits_are_bounded():
    m = model(GEMMA)
    params = m.params | {"embed_tokens": {"embedding": 100 * m.params["embed_tokens"]["embedding"]}}
    assert 2.9 < jnp.abs(m.apply(params, tokens())).max() <= 3.0


def test_the_loop_with_its_own_backward_knows_windows_and_two_rotations():
    """In two chunks of tokens, against autodiff of the whole."""
    config = dataclasses.replace(GEMMA, max_length=512, sliding_window=200)
    params, t = model(GEMMA).params, tokens(1, 512)
    grads: list[Any] = []
    for remat in ("none", "full"):
        apply = decoder_functions(config, remat=remat, transform=jax.named_call, layer_chunk=256)
        loss = partial(lambda apply, p: jnp.mean(apply(p, t) ** 2), apply.apply)
        grads.append(jax.jit(jax.grad(loss))(params))
    assert_trees_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_fused_projections_are_quantized_and_adapted_as_one():
    m, t = model(FUSED), tokens()
    targets = jq.find_targets(m.apply, m.params, t)
    names = {path.removeprefix("layers/").removesuffix("/kernel") for path in targets}
    assert names == {
        "mlp/down_proj", "mlp/gate_up_proj", "self_attn/o_proj", "self_attn/qkv_proj"
    }  # fmt: skip
    base = jq.quantize(m.params, targets, block_size=32)
    fresh = jq.init_adapter(jax.random.key(1), targets, rank=2)
    adapter = jax.tree.map(lambda x: x + 0.05, fresh)
    got = jax.jit(jq.lift(m.apply))(jq.attach(base, adapter), t)
    np.testing.assert_allclose(got, m.apply(jq.merge(base, adapter), t), atol=1e-5)


def test_half_precision_stays_close():
    m, t = model(GEMMA), tokens()
    half = jax.jit(decoder_functions(GEMMA, compute_dtype=jnp.bfloat16).apply)
    want, got = m.apply(m.params, t), half(m.params, t)
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - want) < 0.03 * jnp.linalg.norm(want)


GPT2 = dataclasses.replace(
    TINY,
    n_kv_heads=4,
    fused=True,
    gated=False,
    layer_norm=True,
    learned_positions=True,
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=True,
)


def test_learned_positions_count_tokens_and_not_padding():
    """Moved to the right of padding, or behind another document, a text has the same logits."""
    m, t = model(GPT2), tokens(1, 8)
    want = m.apply(m.params, t)
    padded, mask = jnp.pad(t, ((0, 0), (4, 0))), jnp.arange(12)[None] >= 4
    got = m.apply(m.params, padded, attention_mask=mask)
    np.testing.assert_allclose(got[:, 4:], want, atol=1e-5)
    packed, segments = jnp.concatenate([t, t], axis=1), jnp.arange(16)[None] // 8
    got = m.apply(m.params, packed, segment_ids=segments)
    np.testing.assert_allclose(got[:, 8:], want, atol=1e-5)
    other = m.apply(m.params, t, positions=jnp.arange(8)[None] + 1)
    assert jnp.abs(other - want).max() > 1e-2


def test_the_loop_trains_parts_of_a_fused_kernel_without_rotations():
    """In two chunks of tokens, on 4 bits, against autodiff of the merged whole."""
    config = dataclasses.replace(GPT2, max_length=512, n_layers=2)
    m, t = model(config), tokens(1, 512)
    find = jq.find_targets(m.apply, m.params, t, parts=config.parts)
    assert "layers/mlp/up_proj/kernel" in find and "embed_positions/embedding" not in find
    base = jq.quantize(m.params, find, block_size=32)
    targets = find.select(["qkv_proj[q,v]", "down_proj"])
    fresh = jq.init_adapter(jax.random.key(1), targets, rank=2)
    adapter = jax.tree.map(lambda x: x + 0.05, fresh)
    apply = decoder_functions(config, remat="full", transform=jq.lift, layer_chunk=256).apply
    got = jax.jit(jax.grad(lambda a: jnp.mean(apply(jq.attach(base, a), t) ** 2)))(adapter)
    want = jax.jit(jax.grad(lambda a: jnp.mean(m.apply(jq.merge(base, a), t) ** 2)))(adapter)
    assert_trees_close(got, want, rtol=1e-3, atol=1e-5)
