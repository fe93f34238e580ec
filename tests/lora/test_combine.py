# SPDX-License-Identifier: Apache-2.0
"""Weighted combinations against float64 NumPy, value by value; tests/reference has PEFT."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from jax_qlora.quant.layout import KernelLayout
from tests.helpers import normal

LAYERS, COLS, ROWS = 2, 12, 10
PATH, OTHER = "layers/up/kernel", "layers/down/kernel"
WEIGHTS = [0.7, -0.4, 1.3]


def pair(seed, rank=3, scale=1.0, dropout=0.0, rows=ROWS):
    return jq.LoraPair(
        a=normal((LAYERS, rank, COLS), seed),
        b=normal((LAYERS, rows, rank), seed + 100),
        layout=KernelLayout(shape=(COLS, rows), in_axes=(-2,)),
        scale=scale,
        dropout=dropout,
    )


@pytest.fixture
def adapters():
    return [{PATH: pair(1, scale=2.0, dropout=0.1)}, {PATH: pair(2)}, {PATH: pair(3, scale=0.5)}]


def wide(x):
    return np.asarray(x, np.float64)


def delta(p):
    return p.scale * wide(p.b) @ wide(p.a)


def keep_largest(x, density):
    """One value after another, in order of size."""
    flat = sorted(np.ndenumerate(x), key=lambda item: -abs(item[1]))
    out = np.zeros_like(x)
    for index, value in flat[: int(density * x.size)]:
        out[index] = value
    return out


def ties(tensors, weights, density, sign):
    tensors = [keep_largest(x, density) for x in tensors]
    out = np.zeros_like(tensors[0])
    for index in np.ndindex(out.shape):
        values = [x[index] for x in tensors]
        votes = sum(values if sign == "total" else np.sign(values))
        elected = 1 if votes >= 0 else -1
        agree = [w * v for w, v in zip(weights, values, strict=True) if np.sign(v) == elected]
        out[index] = sum(agree) / max(len(agree), 1)
    return out


def truncated(x, rank):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def by_factors(adapters, merge):
    """`merge(tensors, weights)` of the down projections, and of the up projections."""
    pairs = [a[PATH] for a in adapters]
    weights = [w * p.scale for w, p in zip(WEIGHTS, pairs, strict=True)]
    a_weights = [np.sign(w) * np.sqrt(abs(w)) for w in weights]
    b_weights = [np.sqrt(abs(w)) for w in weights]
    a = [merge([wide(p.a[i]) for p in pairs], a_weights) for i in range(LAYERS)]
    b = [merge([wide(p.b[i]) for p in pairs], b_weights) for i in range(LAYERS)]
    return np.stack(a), np.stack(b)


def test_cat_is_the_weighted_sum(adapters):
    adapters[1] = {PATH: pair(2, rank=5)}
    got = jq.combine_adapters(adapters, WEIGHTS, method="cat")[PATH]
    want = sum(w * delta(a[PATH]) for w, a in zip(WEIGHTS, adapters, strict=True))
    assert (got.rank, got.scale, got.dropout) == (11, 1.0, 0.1)
    np.testing.assert_allclose(delta(got), want, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2, 9, 11])
def test_svd_is_the_nearest_update_of_a_rank(adapters, rank):
    got = jq.combine_adapters(adapters, WEIGHTS, method="svd", rank=rank)[PATH]
    dense: Any = sum(w * delta(a[PATH]) for w, a in zip(WEIGHTS, adapters, strict=True))
    assert got.rank == (rank or 3)
    want = np.stack([truncated(x, rank or 3) for x in dense])
    np.testing.assert_allclose(delta(got), want, atol=1e-5)


def test_linear_adds_factors_with_the_root_of_each_weight(adapters):
    got = jq.combine_adapters(adapters, WEIGHTS, method="linear")[PATH]
    a, b = by_factors(adapters, lambda xs, ws: sum(w * x for w, x in zip(ws, xs, strict=True)))
    np.testing.assert_allclose(got.a, a, atol=1e-6)
    np.testing.assert_allclose(got.b, b, atol=1e-6)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_of_factors(adapters, density, sign):
    got = jq.combine_adapters(
        adapters, WEIGHTS, method="ties", density=density, majority_sign=sign
    )[PATH]
    a, b = by_factors(adapters, lambda xs, ws: ties(xs, ws, density, sign))
    np.testing.assert_allclose(got.a, a, atol=1e-6)
    np.testing.assert_allclose(got.b, b, atol=1e-6)


def test_ties_of_dense_updates(adapters):
    got = jq.combine_adapters(adapters, WEIGHTS, method="ties_svd", density=0.5)[PATH]
    updates = [delta(a[PATH]) for a in adapters]
    want = [ties([u[i] for u in updates], WEIGHTS, 0.5, "total") for i in range(LAYERS)]
    np.testing.assert_allclose(delta(got), [truncated(x, 3) for x in want], atol=1e-5)


def test_magnitude_pruning_adds_what_is_large(adapters):
    got = jq.combine_adapters(adapters, WEIGHTS, method="magnitude_prune", density=0.3)[PATH]
    a, _ = by_factors(
        adapters,
        lambda xs, ws: sum(w * keep_largest(x, 0.3) for w, x in zip(ws, xs, strict=True)),
    )
    np.testing.assert_allclose(got.a, a, atol=1e-6)


def test_of_equal_values_the_first_are_kept():
    ones = jax.tree.map(jnp.ones_like, pair(1))
    got = jq.combine_adapters([{PATH: ones}] * 2, [0.5, 0.5], method="ties", density=0.5)[PATH]
    kept = np.arange(3 * COLS).reshape(3, COLS) < 3 * COLS // 2
    np.testing.assert_allclose(got.a, np.broadcast_to(kept * np.sqrt(0.5), got.a.shape), atol=1e-6)


def test_dare_keeps_a_share_at_random_and_the_mean(key, adapters):
    options: dict[str, Any] = dict(method="dare_linear", density=0.25)
    got = jq.combine_adapters(adapters[1:2] * 2, [1.0, 0.0], key=key, **options)[PATH]
    a = wide(adapters[1][PATH].a)
    kept = np.asarray(got.a) != 0
    np.testing.assert_allclose(np.asarray(got.a)[kept], 4 * a[kept], rtol=1e-6)
    assert 0.1 < kept.mean() < 0.4
    assert not np.array_equal(kept[0], kept[1])  # layers are independent
    again = jq.combine_adapters(adapters[1:2] * 2, [1.0, 0.0], key=key, **options)[PATH]
    np.testing.assert_array_equal(got.a, again.a)


def test_dare_is_right_on_average(key):
    adapters = [{PATH: pair(seed, rows=3000, scale=seed)} for seed in (1, 2, 3)]
    options: dict[str, Any] = dict(method="dare_linear", density=0.25)
    got = jq.combine_adapters(adapters, WEIGHTS, key=key, **options)[PATH].b
    exact = jq.combine_adapters(adapters, WEIGHTS, method="linear")[PATH].b
    # a value kept with probability 1/4 and multiplied by 4 has a variance of 3 times its square
    scales = [abs(w * a[PATH].scale) for w, a in zip(WEIGHTS, adapters, strict=True)]
    variance = sum(3 * s * wide(a[PATH].b) ** 2 for s, a in zip(scales, adapters, strict=True))
    z = (wide(got) - wide(exact)) / np.sqrt(variance)
    assert abs(z.mean()) < 4 / np.sqrt(z.size) and z.std() == pytest.approx(1, abs=0.03)


def test_a_layer_or_kernel_without_an_update_is_left_to_the_others(adapters):
    first = adapters[0][PATH]
    adapters[0][PATH] = jax.tree.map(lambda x: x.at[1].set(0.0), first)
    adapters[2] = {OTHER: pair(7)}
    got = jq.combine_adapters(adapters, WEIGHTS, method="ties", density=1.0)
    alone = jq.combine_adapters(adapters[1:2], WEIGHTS[1:2], method="linear")[PATH]
    np.testing.assert_allclose(got[PATH].a[1], alone.a[1], atol=1e-6)
    assert not np.allclose(got[PATH].a[0], alone.a[0])
    np.testing.assert_allclose(delta(got[OTHER]), 1.3 * delta(adapters[2][OTHER]), atol=1e-5)


def test_padding_of_a_lower_rank_does_not_count(adapters):
    pad = jq.LoraPair(
        a=jnp.pad(adapters[0][PATH].a, ((0, 0), (0, 2), (0, 0))),
        b=jnp.pad(adapters[0][PATH].b, ((0, 0), (0, 0), (0, 2))),
        layout=adapters[0][PATH].layout,
        scale=2.0,
        dropout=0.1,
    )
    options: dict[str, Any] = dict(method="ties", density=0.4)
    got = jq.combine_adapters([{PATH: pad}, *adapters[1:]], WEIGHTS, **options)[PATH]
    want = jq.combine_adapters(adapters, WEIGHTS, **options)[PATH]
    np.testing.assert_array_equal(got.a, want.a)
    np.testing.assert_array_equal(got.b, want.b)


def test_one_adapter_is_weighted_whatever_the_method(adapters):
    got = jq.combine_adapters(adapters[:1], [-2.5], method="ties", density=0.2)[PATH]
    np.testing.assert_allclose(delta(got), -2.5 * delta(adapters[0][PATH]), rtol=1e-5)


def test_the_sum_of_updates_through_the_model(adapters):
    params = {"layers": {"up": {"kernel": normal((LAYERS, COLS, ROWS), 9)}}}
    got = jq.merge(params, jq.combine_adapters(adapters, WEIGHTS, method="cat"))
    want = wide(params["layers"]["up"]["kernel"])
    for weight, adapter in zip(WEIGHTS, adapters, strict=True):
        want = want + weight * np.swapaxes(delta(adapter[PATH]), 1, 2)
    np.testing.assert_allclose(got["layers"]["up"]["kernel"], want, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (WEIGHTS, dict(method="average"), "method 'average': expected one of linear, cat"),
        (WEIGHTS[:2], dict(method="cat"), "3 adapters and 2 weights"),
        ([1.0, 1.0, float("nan")], dict(method="cat"), "expected finite numbers"),
        (WEIGHTS, dict(method="ties"), "'ties' with density None: expected the share"),
        (WEIGHTS, dict(method="ties", density=0.0), "above 0 and at most 1"),
        (WEIGHTS, dict(method="cat", density=0.5), "expected none, it keeps every value"),
        (WEIGHTS, dict(method="cat", rank=3), "a method with 'svd', which alone"),
        (WEIGHTS, dict(method="svd", rank=0), "at least 1"),
        (WEIGHTS, dict(method="dare_ties", density=0.5), "needs a random key"),
        (WEIGHTS, dict(method="ties", density=0.5, majority_sign="both"), "majority_sign 'both'"),
    ],
)
def test_settings_that_cannot_be(adapters, weights, options, message):
    with pytest.raises(InputError, match=message):
        jq.combine_adapters(adapters, weights, **options)


def test_adapters_that_do_not_go_together(adapters):
    no_pair: Any = {PATH: np.ones(3)}
    with pytest.raises(InputError, match="0 adapters and 0 weights"):
        jq.combine_adapters([], [], method="cat")
    with pytest.raises(InputError, match="with at least one update"):
        jq.combine_adapters([{}], [1.0], method="cat")
    with pytest.raises(InputError, match="is ndarray: expected a LoraPair"):
        jq.combine_adapters([no_pair], [1.0], method="cat")
    adapters[1] = {PATH: pair(2, rank=5)}
    with pytest.raises(InputError, match=r"'layers/up/kernel/0' have ranks 3, 5, 3.*Use 'cat'"):
        jq.combine_adapters(adapters, WEIGHTS, method="linear")
    adapters[1] = {PATH: pair(2, rows=4)}
    with pytest.raises(InputError, match=r"kernels \(2, 12, 10\) and \(2, 12, 4\).*one model"):
        jq.combine_adapters(adapters, WEIGHTS, method="cat")
    adapters[1] = {PATH: dataclasses.replace(pair(2), magnitude=jnp.ones((LAYERS, ROWS)))}
    with pytest.raises(InputError, match="is adapted with DoRA"):
        jq.combine_adapters(adapters, WEIGHTS, method="cat")
