# SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.models import decoder_functions, layer
from jax_qlora.models.attention import attention_mask_of, grouped_query_attention
from jax_qlora.models.attention_blocks import BLOCK
from jax_qlora.models.blockwise_attention import blockwise_attention

from ..helpers import assert_trees_close, normal
from ..lift.walk import shapes_of
from ..tiny import quantized, tiny_model

ROWS, SEQ, HEAD_DIM, SCALE = 2, 37, 8, 0.4


def valid_of(left: int = 0, right: int = 0, seq: int = SEQ) -> jax.Array:
    """All tokens but those of the first row's padding."""
    place = np.arange(seq)
    padded = np.stack([(place >= left) & (place < seq - right), np.ones(seq, bool)])
    return jnp.asarray(padded)


SEGMENTS = jnp.asarray(np.stack([np.repeat([0, 1, 2], [5, 20, 12]), np.repeat([3, -1], [30, 7])]))

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "right padding": {"valid": valid_of(right=9)},
    "left padding": {"valid": valid_of(left=11)},
    "packed": {"segment_ids": SEGMENTS, "valid": valid_of(left=2, right=3)},
    "window": {"window": 5},
    "window of one": {"window": 1, "valid": valid_of(right=9)},
    "softcap": {"softcap": 1.5},
    "all": {
        "segment_ids": SEGMENTS,
        "valid": valid_of(left=2, right=3),
        "window": 9,
        "softcap": 1.5,
    },
}


def qkv(heads: int = 4, kv_heads: int = 2, seq: int = SEQ, dtype: Any = np.float32) -> tuple:
    """Queries, keys, values, and a cotangent of the output."""
    q, dout = (normal((ROWS, seq, heads, HEAD_DIM), i, dtype) for i in (0, 3))
    k, v = (normal((ROWS, kv_heads, seq, HEAD_DIM), i, dtype) for i in (1, 2))
    return q, k, v, dout


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention by its definition; a query that sees no key gets zeros."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    scores = SCALE * jnp.einsum("bqhd,bhkd->bhqk", q, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    row = np.arange(q.shape[1])
    seen = (row[:, None] >= row[None]) & (row[:, None] - row[None] < (window or row.size))
    seen = jnp.asarray(seen)[None] & valid[:, None, :]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    seen = seen[:, None]
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bhqk,bhkd->bqhd", weights / jnp.where(total == 0, 1.0, total), v)


def with_gradients(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(dout)


def check(inputs: tuple, *, tolerance: float, block: Any, valid: Any = None, **case: Any) -> Any:
    """Values and gradients against the definition in float32; returns what was found."""
    q, k, v, dout = inputs
    valid = valid_of(seq=q.shape[1]) if valid is None else valid

    @jax.jit
    def both(*inputs: jax.Array) -> tuple:
        blockwise = functools.partial(blockwise_attention, SCALE, valid=valid, block=block, **case)
        reference = functools.partial(dense, valid=valid, **case)
        wide = [x.astype(jnp.float32) for x in inputs]
        return with_gradients(blockwise, *inputs), with_gradients(reference, *wide)

    got, want = both(q, k, v, dout)
    assert got[0].dtype == q.dtype and all(x.dtype == q.dtype for x in got[1])
    assert_trees_close(got, want, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str):
    check(qkv(), tolerance=1e-5, block=(8, 16), **CASES[case])


@pytest.mark.parametrize("block", [(16, 8), (8, 8), (32, 32), (36, 36), None])
def test_any_block(block: tuple[int, int] | None):
    """Also blocks that straddle the end of the sequence, or leave one token over."""
    if block is not None:
        check(qkv(), tolerance=1e-5, block=block, **CASES["all"])
    else:
        check(qkv(seq=300), tolerance=1e-5, block=None, window=200)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
def test_any_grouping_of_heads(heads: tuple[int, int]):
    check(qkv(*heads), tolerance=1e-5, block=(8, 16), **CASES["packed"])


@pytest.mark.parametrize("case", ["causal", "all"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(case: str, dtype: Any):
    check(qkv(dtype=dtype), tolerance=2e-2, block=(8, 16), **CASES[case])


@pytest.mark.parametrize("case", ["packed", "window", "softcap"])
def test_a_short_sequence_is_left_to_the_plain_function(case: str):
    q, k, v, dout = qkv()
    options = {"valid": valid_of(), **CASES[case]}
    mask = attention_mask_of(
        options["valid"], options.get("segment_ids"), window=options.get("window")
    )
    softcap = options.get("softcap")
    got = blockwise_attention(SCALE, q, k, v, **options)
    want = grouped_query_attention(SCALE, q, k, v, mask, softcap=softcap)
    np.testing.assert_array_equal(got, want)
    if case != "packed":  # a query that sees no key is another's business there
        check((q, k, v, dout), tolerance=1e-5, block=None, **options)


def test_a_query_that_sees_no_key():
    """Zeros, and no gradient through it, however large its scores and cotangent."""
    q, k, v, dout = qkv()
    valid = valid_of(left=11)
    padding = ~valid[:, :, None, None]
    q, dout = (jnp.where(padding, 1e4, x) for x in (q, dout))
    attend = functools.partial(blockwise_attention, SCALE, valid=valid, block=(8, 8))
    out, (dq, dk, dv) = jax.jit(functools.partial(with_gradients, attend))(q, k, v, dout)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (out, dq, dk, dv))
    assert not jnp.any(out[0, :11]) and not jnp.any(dq[0, :11])
    assert not jnp.any(dk[0, :, :11]) and not jnp.any(dv[0, :, :11])
    without = jax.jit(functools.partial(with_gradients, attend))(
        q, k, v, jnp.where(padding, 0.0, dout)
    )
    assert_trees_close((out, (dq, dk, dv)), without)


def test_vmap_scan_and_checkpoint():
    """Two layers of attention, each over a batch axis of its own, one window for each layer."""
    q, k, v, dout = qkv()

    def layers(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def body(x: jax.Array, window: jax.Array) -> tuple[jax.Array, None]:
            one = functools.partial(attend, window=window)
            return jax.vmap(one)(x[:, None], k[:, None], v[:, None])[:, 0], None

        body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, q, jnp.asarray([7, 20]))[0]

    valid = valid_of()[:1]

    def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, *, window: jax.Array) -> jax.Array:
        return blockwise_attention(SCALE, q, k, v, valid, window=window, block=(8, 16))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, *, window: jax.Array) -> jax.Array:
        mask = attention_mask_of(valid, window=window)
        return grouped_query_attention(SCALE, q, k, v, mask)

    got, want = (
        jax.jit(functools.partial(with_gradients, functools.partial(layers, attend)))(q, k, v, dout)
        for attend in (blockwise, plain)
    )
    assert_trees_close(got, want, rtol=1e-5, atol=1e-5)


def largest(f: Any, *args: Any) -> int:
    """Elements of the largest of them."""
    return max(int(np.prod(shape)) for shape in shapes_of(f, *args))


def test_no_value_grows_with_the_square_of_the_sequence():
    def gradients(block: Any, seq: int, softcap: float | None = None) -> int:
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv(2, 1, seq)]
        valid, segments = jnp.ones((ROWS, seq), bool), jnp.zeros((ROWS, seq), int)
        attend = functools.partial(
            blockwise_attention, SCALE, valid=valid, segment_ids=segments, block=block
        )
        return largest(functools.partial(with_gradients, attend), *inputs)

    seq = 2**15
    linear = ROWS * 2 * seq * HEAD_DIM
    assert gradients((64, 64), seq) == linear
    assert gradients(None, seq) == ROWS * 2 * BLOCK[0] * BLOCK[1] < seq * seq
    assert gradients((seq, seq), seq) >= seq * seq  # the walk sees it where it is


@functools.cache
def tiny() -> tuple[Any, Any, Any]:
    model = tiny_model(n_layers=2, max_length=2**15)
    return model, *quantized(model)


def gradients_of_a_decoder(trainable: Any, frozen: Any, remat: str) -> Any:
    """Of a padded and packed batch: gradients, and logits where there is no padding."""
    config = tiny()[0].config
    apply = jq.lift(decoder_functions(config, remat=remat).apply)
    tokens = jax.random.randint(jax.random.key(2), (ROWS, SEQ), 3, config.vocab_size)
    valid = valid_of(right=4)

    def loss(trainable: Any) -> tuple[jax.Array, jax.Array]:
        params = trainable if frozen is None else jq.attach(frozen, trainable)
        logits = apply(params, tokens, attention_mask=valid, segment_ids=SEGMENTS)
        logits = jnp.where(valid[..., None], logits, 0.0)
        return jnp.mean(logits**2), logits

    return jax.jit(jax.grad(loss, has_aux=True))(trainable)


@pytest.mark.parametrize("weights", [pytest.param("dense", marks=pytest.mark.slow), "4 bits"])
def test_a_decoder_is_the_same_in_pieces(weights: str, monkeypatch: pytest.MonkeyPatch):
    """Attention in blocks and the MLP in chunks, as in a long sequence, whatever is recomputed.

    With weights that train, and with an adapter over 4-bit weights.
    """
    model, base, adapter = tiny()
    trees = (adapter, base) if weights == "4 bits" else (model.params, None)
    want = gradients_of_a_decoder(*trees, remat="none")
    calls = []

    def blockwise(*args: Any, **settings: Any) -> jax.Array:
        calls.append(len(args))
        return blockwise_attention(*args, **settings, block=(8, 16))

    monkeypatch.setattr(layer, "blockwise_attention", blockwise)
    monkeypatch.setattr(layer, "MLP_TOKENS", 16)
    for remat in ["none"] if weights == "4 bits" else ["dots", "full"]:
        got = gradients_of_a_decoder(*trees, remat=remat)
        assert_trees_close(got, want, rtol=1e-3, atol=1e-4)
    assert calls


def test_a_long_sequence_in_a_lifted_decoder():
    """A training step of 4-bit weights holds no scores and no MLP of the whole sequence."""
    model, base, adapter = tiny()
    seq = 2**14
    assert seq > layer.MLP_TOKENS

    def loss(adapter: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(model.hidden(jq.attach(base, adapter), tokens) ** 2)

    tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    shapes = shapes_of(jax.grad(loss), adapter, tokens)
    assert max(int(np.prod(shape)) for shape in shapes) < seq * seq / 16
    assert (seq, model.config.d_model) in shapes and (seq, model.config.d_ff) not in shapes
    targets = jq.find_targets(model.apply, model.params, tokens)
    assert list(targets) == list(adapter)
