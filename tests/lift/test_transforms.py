# SPDX-License-Identifier: Apache-2.0
"""A lifted function under and over jax's transforms; one base, many adapters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_qlora as jq
from tests.helpers import assert_trees_close, normal
from tests.lift.cases import distance, mean_square, random_adapter, random_base
from tests.lift.walk import dense_weights, weight_sizes

D, FF, LAYERS = 32, 64, 2


def apply(params, x):
    """Two scanned layers and a kernel of its own."""

    def layer(x, p):
        h = jax.nn.silu(jnp.einsum("bd,df->bf", x, p["up"]))
        return x + h @ p["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["out"]


PARAMS = {
    "layers": {"up": normal((LAYERS, D, FF), 1) / 6, "down": normal((LAYERS, FF, D), 2) / 8},
    "out": normal((D, 16), 3) / 6,
}
X = normal((6, D), 4)
TARGETS = jq.find_targets(apply, PARAMS, X)
BASE = random_base(PARAMS, TARGETS)
ADAPTERS = [random_adapter(TARGETS, seed=i) for i in range(3)]
STACKED = jax.tree.map(lambda *x: jnp.stack(x), *ADAPTERS)


def lifted(adapter, x=X, base=BASE, **kwargs):
    return jq.lift(apply)(jq.attach(base, adapter, **kwargs), x)


def dense(adapter, x=X, base=BASE):
    return apply(jq.merge(base, adapter), x)


def loss(adapter, x=X):
    return mean_square(lifted(adapter, x))


# --- under transforms --------------------------------------------------------------------------


def test_eager_and_jitted_agree():
    assert distance(lifted(ADAPTERS[0]), jax.jit(lifted)(ADAPTERS[0])) < 1e-6


def test_vmap_over_adapters():
    got = jax.jit(jax.vmap(lifted))(STACKED)
    for i, adapter in enumerate(ADAPTERS):
        assert distance(got[i], dense(adapter)) < 2e-6


def test_vmap_over_data_and_gradients_per_example():
    xs = normal((3, 2, D), 5)
    got = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(ADAPTERS[0], xs)
    want = jax.grad(lambda a, x: mean_square(dense(a, x)))
    for i in range(3):
        one = jax.tree.map(lambda g, i=i: g[i], got)
        assert distance(one, want(ADAPTERS[0], xs[i])) < 1e-5


def test_vmap_over_bases():
    bases = jax.tree.map(lambda *x: jnp.stack(x), BASE, random_base(PARAMS, TARGETS))
    got = jax.vmap(lambda base: lifted(ADAPTERS[0], base=base))(bases)
    assert distance(got[1], dense(ADAPTERS[0])) < 2e-6


def test_scan_over_training_steps():
    def step(adapter, x):
        value, grads = jax.value_and_grad(loss)(adapter, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, adapter, grads), value

    def dense_step(adapter, x):
        value, grads = jax.value_and_grad(lambda a: mean_square(dense(a, x)))(adapter)
        return jax.tree.map(lambda p, g: p - 0.1 * g, adapter, grads), value

    xs = jnp.broadcast_to(X, (4, *X.shape))
    last, values = jax.jit(lambda a: jax.lax.scan(step, a, xs))(ADAPTERS[0])
    want, want_values = jax.jit(lambda a: jax.lax.scan(dense_step, a, xs))(ADAPTERS[0])
    assert values[-1] < values[0]
    assert distance(last, want) < 1e-5 and distance(values, want_values) < 1e-5


@pytest.mark.parametrize(
    "policy",
    [None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable],
)
def test_checkpoint_outside_and_inside(policy):
    remat = functools.partial(jax.checkpoint, policy=policy)

    def inside(params, x):
        def layer(x, p):
            return x + jax.nn.silu(x @ p["up"]) @ p["down"], None

        return jax.lax.scan(remat(layer), x, params["layers"])[0] @ params["out"]

    def grads(f):
        return jax.jit(jax.grad(lambda a: mean_square(f(jq.attach(BASE, a), X))))(ADAPTERS[0])

    want = jax.grad(lambda a: mean_square(dense(a)))(ADAPTERS[0])
    assert distance(grads(remat(jq.lift(apply))), want) < 1e-5
    assert distance(grads(jq.lift(inside)), want) < 1e-5


def test_remat_keeps_no_more_than_the_dense_model_does():
    """The residuals of a rematerialized layer are its inputs: packed kernels, no decoded one."""
    f = jax.checkpoint(lambda a: mean_square(lifted(a)))
    sizes = weight_sizes(TARGETS)
    assert dense_weights(jax.grad(f), ADAPTERS[0], sizes=sizes) == []
    _, vjp = jax.vjp(f, ADAPTERS[0])
    kept = [x for x in jax.tree.leaves(vjp) if hasattr(x, "shape") and x.dtype == jnp.float32]
    assert not {x.size for x in kept} & sizes


def test_lift_of_a_lifted_and_of_a_transformed_function():
    tree = jq.attach(BASE, ADAPTERS[0])
    want = dense(ADAPTERS[0])
    for f in (jq.lift(apply), jax.jit(apply), jax.checkpoint(apply), functools.partial(apply)):
        assert distance(jq.lift(f)(tree, X), want) < 2e-6
    per_example = jax.vmap(apply, (None, 0))
    assert distance(jq.lift(per_example)(tree, X[:, None])[:, 0], want) < 2e-6


def test_lifting_a_gradient_function():
    """`lift(grad(f))`: the gradient in the inputs, with the kernels as they are held."""
    f = jax.grad(lambda x, p: mean_square(apply(p, x)))
    got = jax.jit(jq.lift(f))(X, jq.attach(BASE, ADAPTERS[0]))
    want = jax.jit(f)(X, jq.merge(BASE, ADAPTERS[0]))
    assert distance(got, want) < 1e-5


def test_abstract_evaluation():
    out = jax.eval_shape(lifted, ADAPTERS[0])
    assert out.shape == (6, 16) and out.dtype == jnp.float32


def test_sharded_bases_and_data():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spec = jax.sharding.PartitionSpec

    def put(x):
        axes = (None,) * (x.ndim - 2) + ("x",) if x.ndim > 1 and x.shape[-2] % 2 == 0 else ()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(*axes)))

    base = jax.tree.map(put, BASE)
    data = jax.device_put(X, jax.sharding.NamedSharding(mesh, spec("x")))
    grads = jax.jit(jax.grad(lambda a: mean_square(lifted(a, data, base))))(ADAPTERS[0])
    assert distance(grads, jax.grad(loss)(ADAPTERS[0])) < 1e-5


# --- one base, many adapters -------------------------------------------------------------------


def test_adapters_are_swapped_without_recompiling():
    traces = []

    @jax.jit
    def run(base, adapter, x):
        traces.append(x)
        return lifted(adapter, x, base)

    outs = [run(BASE, adapter, X) for adapter in ADAPTERS]
    assert len(traces) == 1
    for out, adapter in zip(outs, ADAPTERS, strict=True):
        assert distance(out, dense(adapter)) < 2e-6
    run(BASE, random_adapter(TARGETS, rank=5), X)  # another rank is another program
    assert len(traces) == 2


def test_each_row_of_a_batch_may_have_its_own_adapter():
    xs = X[:3, None]
    got = jax.jit(jax.vmap(lambda adapter, x: lifted(adapter, x)))(STACKED, xs)
    for i, adapter in enumerate(ADAPTERS):
        assert distance(got[i], dense(adapter, xs[i])) < 2e-6


def test_a_part_of_an_adapter_trains():
    """`partition` freezes what it leaves out; `combine` puts it back in the loss."""
    trainable, frozen = jq.partition(ADAPTERS[0], lambda path, _: path.endswith("/b"))

    def part_loss(trainable):
        return loss(jq.combine(trainable, frozen))

    grads = jax.jit(jax.grad(part_loss))(trainable)
    assert len(jax.tree.leaves(grads)) == len(ADAPTERS[0])
    assert grads["out"].a == jq.ABSENT
    whole = jax.grad(loss)(ADAPTERS[0])
    assert_trees_close(grads["out"].b, whole["out"].b, rtol=1e-5, atol=1e-6)


def test_optax_trains_the_adapter_and_nothing_else():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    adapter: Any = ADAPTERS[0]
    state = optimizer.init(adapter)
    held = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert held == 2 * sum(x.size for x in jax.tree.leaves(adapter))

    @jax.jit
    def step(adapter, state, base):
        value, grads = jax.value_and_grad(lambda a: mean_square(lifted(a, base=base)))(adapter)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    values = []
    for _ in range(5):
        adapter, state, value = step(adapter, state, BASE)
        values.append(float(value))
    assert values[-1] < values[0]
