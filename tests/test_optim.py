# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_qlora.lora as lora
from jax_qlora.optim import (
    adamw,
    decay_mask,
    lora_b_mask,
    lora_mask,
    make_schedule,
    train_only,
)
from jax_qlora.quant import quantize_array
from jax_qlora.quant.layout import KernelLayout
from jax_qlora.tree import flatten_paths, nbytes

pytestmark = pytest.mark.usefixtures("standard_promotion")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def standard_promotion():
    """Optax itself mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pair(key, rows=6, cols=8, rank=2):
    a_key, b_key = jax.random.split(key)
    return lora.LoraPair(
        a=jax.random.normal(a_key, (rank, cols)),
        b=jax.random.normal(b_key, (rows, rank)),
        layout=KernelLayout(shape=(cols, rows), in_axes=(-2,)),
        scale=2.0,
        dropout=0.0,
    )


@pytest.fixture
def adapter(key):
    return {name: pair(jax.random.fold_in(key, i)) for i, name in enumerate("qk")}


@pytest.fixture
def joined(key, adapter):
    """One tree of everything: 4-bit kernels with updates, a norm, an integer."""
    kernel = jax.random.normal(key, (8, 6))
    base = {
        "q": quantize_array(kernel, block_size=32, double_quant=True),
        "k": kernel,
        "norm": {"scale": jnp.ones(8)},
        "steps": jnp.int32(3),
    }
    return lora.attach(base, adapter)


def run(optimizer, params, gradients, steps=3):
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_adamw_is_torch_adamw():
    golden = np.load(GOLDEN / "optim.npz")
    optimizer = adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    params: Any = jnp.asarray(golden["param0"])
    state = optimizer.init(params)
    for step, gradient in enumerate(golden["grads"]):
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        if step == 0:
            np.testing.assert_allclose(params, golden["torch_adamw/param_step1"], atol=1e-7)
    np.testing.assert_allclose(params, golden["torch_adamw/param"], atol=1e-6)


def test_masks_of_a_joined_tree(joined):
    chosen = {path for path, leaf in flatten_paths(lora_mask(joined)).items() if leaf}
    assert chosen == {"q/pair/a", "q/pair/b", "k/pair/a", "k/pair/b"}
    chosen = {path for path, leaf in flatten_paths(lora_b_mask(joined)).items() if leaf}
    assert chosen == {"q/pair/b", "k/pair/b"}
    kept = {path for path, leaf in flatten_paths(decay_mask(joined)).items() if not leaf}
    assert kept == {"norm/scale"}


def test_masks_of_plain_trees_named_like_adapters():
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    assert not any(jax.tree.leaves(lora_mask(tree)))
    assert not any(jax.tree.leaves(lora_b_mask(tree)))


@pytest.mark.parametrize("mask", ["function", "tree"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_nothing_frozen_moves_and_nothing_is_kept_for_it(joined, adapter, mask, decay):
    """A frozen leaf keeps its bits whatever its gradient; the state is the adapter's alone."""
    plain = adamw(0.1, weight_decay=decay, clip_norm=0.0, lora_plus_ratio=4.0)
    optimizer = train_only(plain, lora_mask(joined) if mask == "tree" else lora_mask)

    def gradient(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.full_like(x, 10.0)
        return np.zeros(x.shape, jax.dtypes.float0)

    moved, state = run(optimizer, joined, jax.tree.map(gradient, joined))
    before, after = flatten_paths(joined), flatten_paths(moved)
    chosen = flatten_paths(lora_mask(joined))
    for path, leaf in before.items():
        assert after[path].dtype == leaf.dtype
        same = np.asarray(after[path]).tobytes() == np.asarray(leaf).tobytes()
        assert same != chosen[path], path
    assert nbytes(state) == nbytes(plain.init(adapter))

    # and the chosen leaves move as they would alone
    alone, _ = run(plain, adapter, jax.tree.map(gradient, adapter))
    np.testing.assert_allclose(after["q/pair/b"], alone["q"].b, rtol=1e-6)
    np.testing.assert_allclose(after["k/pair/a"], alone["k"].a, rtol=1e-6)


def test_gradients_of_a_joined_tree(joined):
    """What `jax.grad(..., allow_int=True)` gives for integer leaves is accepted."""

    def loss(tree):
        return jnp.sum(tree["k"].pair.a ** 2) + jnp.sum(tree["norm"]["scale"] ** 2)

    gradients = jax.grad(loss, allow_int=True)(joined)
    moved, _ = run(train_only(adamw(0.1), lora_mask), joined, gradients)
    assert not np.array_equal(moved["k"].pair.a, joined["k"].pair.a)
    np.testing.assert_array_equal(moved["norm"]["scale"], joined["norm"]["scale"])
    np.testing.assert_array_equal(moved["q"].base.codes, joined["q"].base.codes)


def test_masked_alone_would_not_freeze():
    """The trap that `train_only` avoids, so that nobody replaces it by `optax.masked`."""
    params = {"base": jnp.ones(()), "lora": jnp.ones(())}
    gradients = {"base": jnp.float32(10.0), "lora": jnp.float32(10.0)}
    mask = {"base": False, "lora": True}
    leaked, _ = run(optax.masked(optax.sgd(0.1), mask), params, gradients, steps=1)
    kept, _ = run(train_only(optax.sgd(0.1), mask), params, gradients, steps=1)
    assert float(leaked["base"]) == 11.0
    assert float(kept["base"]) == 1.0
    assert float(kept["lora"]) == 0.0


def test_lora_plus_scales_the_rate_of_b_alone(adapter):
    gradients = jax.tree.map(jnp.ones_like, adapter)
    plain, _ = run(adamw(1e-3), adapter, gradients, steps=1)
    plus, _ = run(adamw(1e-3, lora_plus_ratio=16.0), adapter, gradients, steps=1)
    for name in adapter:
        np.testing.assert_array_equal(plus[name].a, plain[name].a)
        np.testing.assert_allclose(
            plus[name].b - adapter[name].b, 16 * (plain[name].b - adapter[name].b), rtol=1e-3
        )


def test_decay_spares_norms_and_biases():
    params = {"kernel": jnp.ones(3), "scale": jnp.ones(3), "bias": jnp.ones(3)}
    gradients = jax.tree.map(jnp.zeros_like, params)
    moved, _ = run(adamw(0.1, weight_decay=0.5), params, gradients, steps=1)
    np.testing.assert_allclose(moved["kernel"], 0.95)
    np.testing.assert_array_equal(moved["scale"], 1.0)
    np.testing.assert_array_equal(moved["bias"], 1.0)


def test_clipping_bounds_the_global_norm(adapter):
    gradients = jax.tree.map(lambda x: 100.0 * jnp.ones_like(x), adapter)
    optimizer = adamw(1.0, clip_norm=1.0)
    _, state = optimizer.update(gradients, optimizer.init(adapter), adapter)
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) * 1.0


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules(kind):
    rate: Any = make_schedule(
        kind, learning_rate=1.0, steps=110, warmup_steps=10, final_fraction=0.1
    )
    values = [float(rate(step)) for step in range(111)]
    np.testing.assert_allclose(values[:11], np.arange(1, 12) / 11, rtol=1e-6)
    end, middle = {"constant": (1, 1), "linear": (0.1, 0.55), "cosine": (0.1, 0.55)}[kind]
    assert values[60] == pytest.approx(middle)
    assert values[110] == pytest.approx(end)
    rate = make_schedule(kind, learning_rate=3.0, steps=5)
    assert float(rate(0)) == 3.0
