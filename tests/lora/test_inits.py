# SPDX-License-Identifier: Apache-2.0
"""Initializations from weights: what moves into the update leaves the base, and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from jax_qlora.lora import relative_to_start
from tests.helpers import normal

SHAPE = (2, 96, 64)  # layers, in, out


def apply(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, params["w"])
    return x @ params["out"]


@pytest.fixture
def params():
    return {"w": normal(SHAPE, 1) / 8, "out": normal((96, 5), 2)}


@pytest.fixture
def adapter(key, params):
    targets = jq.find_targets(apply, params, jnp.ones((3, 96)), match=["w"])
    return jq.init_adapter(key, targets, rank=8, alpha=4)


def error(params: Any, base: Any, adapter: Any) -> float:
    """Relative error of base and update together."""
    got = jq.merge(base, adapter, dtype=jnp.float32)["w"]
    return float(jnp.linalg.norm(got - params["w"]) / jnp.linalg.norm(params["w"]))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_base_and_update_are_the_weights(params, adapter, init):
    base, start = jq.init_from_weights(params, adapter, init)
    assert jax.tree.structure(start) == jax.tree.structure(adapter)
    assert error(params, base, start) < 1e-6
    assert base["out"] is params["out"]
    moved = float(jnp.linalg.norm(start["w"].delta()) / jnp.linalg.norm(params["w"]))
    assert 0.1 < moved < 0.8
    x = normal((3, 96), 4)
    got = jax.jit(jq.lift(apply))(jq.attach(base, start), x)
    np.testing.assert_allclose(got, apply(params, x), atol=1e-4)


def test_pissa_takes_the_largest_singular_components(params, adapter):
    exact = jq.init_from_weights(params, adapter, "pissa")[1]["w"]
    fast = jq.init_from_weights(params, adapter, "pissa_niter_8")[1]["w"]
    for layer in range(2):
        w = np.asarray(params["w"][layer], np.float64).T
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        want = (u[:, :8] * s[:8]) @ vt[:8]
        np.testing.assert_allclose(exact.delta_rows()[layer], want, atol=1e-5)
        rest = np.linalg.norm(w - np.asarray(fast.delta_rows()[layer]))
        assert rest < 1.001 * np.linalg.norm(w - want)
        np.testing.assert_allclose(
            jnp.linalg.norm(exact.a[layer], axis=1), np.sqrt(s[:8] / exact.scale), rtol=1e-4
        )


def test_olora_starts_orthonormal(params, adapter):
    pair = jq.init_from_weights(params, adapter, "olora")[1]["w"]
    gram = jnp.einsum("lor,los->lrs", pair.b, pair.b)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), (2, 8, 8)), atol=1e-5)
    np.testing.assert_allclose(jnp.tril(pair.a[..., :8], -1), 0, atol=1e-5)


def heavy_tailed(shape, seed):
    numbers = np.random.default_rng(seed).standard_t(3, shape)
    return jnp.asarray(numbers.astype(np.float32) * 0.02)


@pytest.mark.parametrize("weights", ["normal", "heavy-tailed"])
@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_less_is_lost_than_by_quantizing_alone(key, init, weights):
    """Error of 4-bit base and update; a target of the shape of a real projection, scaled down."""
    shape = (256, 704)
    w = normal(shape, 3) * 0.02 if weights == "normal" else heavy_tailed(shape, 3)
    params = {"w": w}
    targets = jq.find_targets(lambda p, x: x @ p["w"], params, jnp.ones((1, 256)))
    adapter = jq.init_adapter(key, targets, rank=8, alpha=8)
    plain = error(params, jq.quantize(params, targets), adapter)
    base, start = jq.init_from_weights(params, adapter, init, format="nf4")
    got = error(params, base, start)
    print(f"{init} on {weights} weights: {got:.4f}, NF4 alone {plain:.4f}")
    assert got < (0.97 if init == "loftq" else 1.0) * plain


def test_the_residual_is_what_is_quantized(params, adapter):
    half = {"w": params["w"].astype(jnp.bfloat16), "out": params["out"]}
    base, start = jq.init_from_weights(half, adapter, "pissa", format="int4", block_size=32)
    q = base["w"]
    assert isinstance(q, jq.QuantizedArray) and q.dtype == jnp.bfloat16 and q.shape == SHAPE
    assert (q.format, q.block_size, q.double_quant) == ("int4", 32, True)
    want = jq.quantize_array(half["w"].astype(jnp.float32) - start["w"].delta(), format="int4",
                             block_size=32)  # fmt: skip
    same = np.mean(np.asarray(q.codes) == np.asarray(want.codes))
    assert same > 0.99  # the sum is taken in another order


def test_a_trained_adapter_of_the_original_weights(params, adapter):
    base, start = jq.init_from_weights(params, adapter, "pissa")
    trained = jax.tree.map(lambda x: x + 0.1 * normal(x.shape, x.size), start)
    plain = relative_to_start(trained, start)
    assert plain["w"].rank == 16
    want = jq.merge(base, trained)["w"]
    np.testing.assert_allclose(jq.merge(params, plain)["w"], want, atol=1e-5)
    magnitudes = jq.add_magnitudes(base, trained)
    np.testing.assert_allclose(
        jq.merge(params, relative_to_start(magnitudes, start))["w"],
        jq.merge(base, magnitudes)["w"],
        atol=1e-5,
    )


def test_gaussian(key, params):
    targets = jq.find_targets(apply, params, jnp.ones((3, 96)), match=["w"])
    pair = jq.init_adapter(key, targets, rank=8, init="gaussian")["w"]
    assert float(jnp.std(pair.a)) == pytest.approx(1 / 8, rel=0.1)
    assert not pair.b.any()


@pytest.mark.parametrize(
    ("init", "format", "message"),
    [
        ("pizza", None, "init 'pizza': expected 'pissa', 'pissa_niter_N'"),
        ("pissa_niter_", None, "init 'pissa_niter_': expected"),
        ("loftq", None, "expected a quantized base, found a dense one"),
        ("pissa", "nf5", "quantization format 'nf5'"),
    ],
)
def test_settings_out_of_range(params, adapter, init, format, message):
    with pytest.raises(InputError, match=message):
        jq.init_from_weights(params, adapter, init, format=format)


def test_weights_that_do_not_serve(key, params, adapter):
    targets = jq.find_targets(apply, params, jnp.ones((3, 96)), match=["w"])
    with pytest.raises(InputError, match="'w' is quantized already"):
        jq.init_from_weights(jq.quantize(params, targets), adapter, "pissa")
    wide = jq.init_adapter(key, targets, rank=65)
    with pytest.raises(InputError, match="expects a rank of at most 64"):
        jq.init_from_weights(params, wide, "olora")
    with pytest.raises(InputError, match=r"init 'pissa': expected 'default' or 'gaussian'"):
        jq.init_adapter(key, targets, init="pissa")
