# SPDX-License-Identifier: Apache-2.0
"""Stacks of adapters, and one batch whose rows use different ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from jax_qlora.optim import adamw
from tests.helpers import assert_trees_close, normal
from tests.lift import zoo
from tests.lift.walk import dense_weights, equations, weight_sizes

from .test_adapter import DOWN, UP, VOCAB, apply, make_params

INDEX = jnp.array([2, 0, -1, 2, 1], jnp.int32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (5, 7), dtype=np.int32))
MODEL = jq.lift(apply)
ROWS = jq.over_rows(MODEL)


def random(adapter, seed):
    return jax.tree.map(lambda x: normal(x.shape, x.size + seed) / 8, adapter)


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def targets(params):
    return jq.find_targets(apply, params, TOKENS)


@pytest.fixture(scope="module")
def adapters(targets):
    """Three that differ in targets, rank and scale."""
    key = jax.random.key(0)
    return {
        "wide": random(jq.init_adapter(key, targets, rank=5, alpha=5), 1),
        "up": random(jq.init_adapter(key, targets.select(["up"]), rank=2, alpha=1), 2),
        "strong": random(jq.init_adapter(key, targets, rank=3, alpha=9), 3),
    }


@pytest.fixture(scope="module")
def stacked(adapters):
    return jq.stack_adapters(adapters)


@jax.jit
def run(base, adapter):
    return MODEL(jq.attach(base, adapter), TOKENS)


@jax.jit
def run_rows(base, stacked, index):
    return ROWS(jq.attach_many(base, stacked, index), TOKENS)


def compilations(f: Any) -> int:
    return f._cache_size()


def alone(base, adapters, number):
    """The logits under one adapter, for all rows."""
    return run(base, adapters[sorted(adapters)[number]] if number >= 0 else {})


# --- stacks ------------------------------------------------------------------------------------


def test_a_stack_holds_the_updates_that_were_put_in(adapters, stacked):
    assert stacked[UP].a.shape[:3] == (3, 2, 5) and list(stacked) == [DOWN, UP]
    for number, (_, adapter) in enumerate(sorted(adapters.items())):
        chosen = jq.select_adapter(stacked, number)
        for path in (DOWN, UP):
            want = adapter[path].delta() if path in adapter else 0.0
            np.testing.assert_allclose(chosen[path].delta(), want, atol=1e-6)
    for path, pair in jq.select_adapter(stacked, -1).items():
        assert not pair.delta().any() and pair.a.any(), path


def test_equal_scales_leave_the_factors_alone(targets, key):
    pair = [random(jq.init_adapter(key, targets, rank=4, alpha=6), i) for i in range(2)]
    stacked = jq.stack_adapters(pair)
    assert stacked[UP].scale == 1.5
    np.testing.assert_array_equal(stacked[UP].b[1], pair[1][UP].b)


def test_a_stack_made_inside_jit_has_the_same_order(adapters, stacked):
    inside = jax.jit(lambda adapters: jq.stack_adapters(adapters))(adapters)
    assert_trees_close(inside, stacked, atol=1e-6)


def test_switching_and_disabling_compile_once(params, adapters, stacked):
    base = jq.quantize(params, jq.find_targets(apply, params, TOKENS))

    @jax.jit
    def switched(base, stacked, index):
        return MODEL(jq.attach(base, jq.select_adapter(stacked, index)), TOKENS)

    before = compilations(run_rows)
    for number in (0, 1, 2, -1):
        want = alone(base, adapters, number)
        np.testing.assert_allclose(switched(base, stacked, number), want, atol=1e-5)
        every = jnp.full(5, number, jnp.int32)
        np.testing.assert_allclose(run_rows(base, stacked, every), want, atol=1e-5)
    assert compilations(switched) == 1 and compilations(run_rows) <= before + 1


# --- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_each_row_is_what_its_adapter_gives_alone(targets, adapters, stacked, dtype, quantized):
    params = make_params(dtype)
    base = jq.quantize(params, targets) if quantized else params
    got = np.asarray(run_rows(base, stacked, INDEX), np.float32)
    for row, number in enumerate(INDEX.tolist()):
        want = np.asarray(alone(base, adapters, number)[row], np.float32)
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2 * np.abs(want).max()
        np.testing.assert_allclose(got[row], want, atol=tolerance)
    assert np.abs(got[0] - got[2]).max() > 0.1


def loss(logits):
    return -jnp.sum(jax.nn.log_softmax(logits)[..., 0])


@jax.jit
def row_grads(stacked, base, index) -> Any:
    return jax.grad(lambda s: loss(ROWS(jq.attach_many(base, s, index), TOKENS)))(stacked)


@jax.jit
def grads_alone(adapter, base, rows):
    """Of the loss over some rows, under one adapter."""
    return jax.grad(lambda a: loss(MODEL(jq.attach(base, a), TOKENS)[rows]))(adapter)


def test_gradients_go_to_the_adapter_of_each_row(params, targets, stacked):
    base = jq.quantize(params, targets)
    index = jnp.array([2, 0, -1, 2, 0], jnp.int32)  # nobody uses the second
    grads = row_grads(stacked, base, index)
    for number, rows in {0: [1, 4], 2: [0, 3]}.items():
        own = jq.select_adapter(stacked, number)
        want = grads_alone(own, base, jnp.array(rows))
        assert_trees_close(jq.select_adapter(grads, number), want, atol=1e-4)
        assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-2
    assert not any(x[1].any() for x in jax.tree.leaves(grads))


def test_padding_stays_zero_in_training(params, stacked):
    optimizer = adamw(1e-2, weight_decay=0.1)
    trained: Any = stacked
    state = optimizer.init(stacked)
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            grads = row_grads(trained, params, INDEX)
            updates, state = optimizer.update(grads, state, trained)
            trained = optax.apply_updates(trained, updates)  # type: ignore[assignment]
    for path, rank in {UP: 2, DOWN: 0}.items():  # of the second
        pair: Any = trained[path]
        assert not pair.a[1, :, rank:].any() and not pair.b[1, ..., rank:].any()
    moved = jax.tree.map(lambda new, old: jnp.abs(new - old)[0].max(), trained, stacked)
    assert min(map(float, jax.tree.leaves(moved))) > 1e-3


def test_kernels_are_decoded_once_for_the_batch(params, targets, adapters):
    """No value is a dense weight for each row, and the operations are those of one adapter."""
    base = jq.quantize(params, targets)
    same = [random(adapters["wide"], i) for i in range(5)]
    stacked, index = jq.stack_adapters(same), jnp.arange(5, dtype=jnp.int32)

    def many(stacked, base, index):
        return loss(ROWS(jq.attach_many(base, stacked, index), TOKENS))

    def one(adapter, base):
        return loss(MODEL(jq.attach(base, adapter), TOKENS))

    sizes = weight_sizes(targets)
    sizes |= {len(TOKENS) * size for size in sizes}
    args = (stacked, base, index)
    assert dense_weights(jax.grad(many), *args, sizes=sizes) == []
    # inside the product as well: the codes have no axis of rows anywhere
    kernels = {t.layout.rows * t.layout.cols for t in targets.values()}
    for eqn in equations(jax.make_jaxpr(jax.grad(many))(*args), exempt=""):
        for var in eqn.outvars:
            assert np.prod(var.aval.shape) not in {len(TOKENS) * k for k in kernels}, eqn

    def flops(f: Any, *args: Any) -> float:
        costs: Any = jax.jit(jax.grad(f)).lower(*args).cost_analysis()
        return costs["flops"]

    assert flops(many, *args) < 1.1 * flops(one, same[0], base)


def test_on_a_model_of_another_library():
    apply, params, (tokens,) = zoo.linen_model()
    targets = jq.find_targets(apply, params, tokens)
    base = jq.quantize(params, targets)
    adapters = [random(jq.init_adapter(jax.random.key(i), targets, rank=2), i) for i in range(2)]
    model, stacked = jq.lift(apply), jq.stack_adapters(adapters)
    index = jnp.array([1, 0], jnp.int32)
    run = jax.jit(lambda b, s: jq.over_rows(model)(jq.attach_many(b, s, index), tokens))
    got = run(base, stacked)
    single = jax.jit(lambda b, a: model(jq.attach(b, a), tokens))
    for row, number in enumerate(index.tolist()):
        want = single(base, adapters[number])[row]
        np.testing.assert_allclose(got[row], want, atol=4e-6 * float(jnp.abs(want).max()))


def test_each_row_has_dropout_of_its_own(params, adapters, key):
    stacked = jq.stack_adapters([adapters["wide"]], dropout=0.5)
    index, tokens = jnp.zeros(5, jnp.int32), jnp.broadcast_to(TOKENS[:1], TOKENS.shape)

    @jax.jit
    def run(key):
        return ROWS(jq.attach_many(params, stacked, index, dropout_key=key), tokens)

    first = np.asarray(run(key))
    assert all(np.abs(first[0] - row).max() > 1e-2 for row in first[1:])
    np.testing.assert_array_equal(first, run(key))


def test_arguments_and_results_with_the_batch_elsewhere(params, stacked):
    @jq.lift
    def f(params, state, shared, *, tokens, times):
        logits = apply(params, tokens) * shared * times
        return {"logits": jnp.swapaxes(logits, 0, 1), "state": {"count": state["count"] + 1}}

    state = {"count": jnp.arange(15.0).reshape(3, 5)}
    out_axes = {"logits": 1, "state": {"count": 1}}
    rows = jq.over_rows(f, in_axes=({"count": 1}, None), out_axes=out_axes)
    tree = jq.attach_many(params, stacked, INDEX)
    got = jax.jit(lambda tree, state: rows(tree, state, 2.0, tokens=TOKENS, times=3))(tree, state)
    want = jnp.swapaxes(6 * run_rows(params, stacked, INDEX), 0, 1)
    np.testing.assert_allclose(got["logits"], want, rtol=1e-5)
    np.testing.assert_array_equal(got["state"]["count"], state["count"] + 1)


def test_other_parameters_pass_through(params):
    np.testing.assert_array_equal(ROWS(params, TOKENS), apply(params, TOKENS))


# --- what cannot be ----------------------------------------------------------------------------


def test_adapters_that_cannot_be_stacked(params, adapters, targets, key):
    with pytest.raises(InputError, match="no adapters to stack"):
        jq.stack_adapters([])
    with pytest.raises(InputError, match="Expected several adapters, in a list or by name"):
        jq.stack_adapters(adapters["wide"])
    other = dataclasses.replace(adapters["up"][UP], layout=adapters["wide"][DOWN].layout)
    with pytest.raises(
        InputError, match=r"'layers/mlp/up/kernel' is a kernel \(2, 64, 32\) in adapter 'other' and"
    ):
        jq.stack_adapters({**adapters, "other": {UP: other}})
    dora = jq.add_magnitudes(params, adapters["wide"])
    with pytest.raises(InputError, match="adapter 'dora' is a DoRA adapter"):
        jq.stack_adapters({**adapters, "dora": dora})
    dropped = jq.init_adapter(key, targets, dropout=0.1)
    with pytest.raises(InputError, match=r"dropout 0.0 in adapter 'a' and 0.1 in 'b'"):
        jq.stack_adapters({"a": adapters["wide"], "b": dropped})
    stacked = jq.stack_adapters({"a": adapters["wide"], "b": dropped}, dropout=0.2)
    assert stacked[UP].dropout == 0.2


def test_numbers_and_names_that_are_not_there(params, adapters, stacked):
    assert jq.adapter_index(adapters, ["strong", None]).tolist() == [0, -1]
    with pytest.raises(InputError, match="no adapter is called 'weak': expected one of strong, up"):
        jq.adapter_index(adapters, ["weak"])
    for index in (3, -2):
        with pytest.raises(InputError, match="numbers of the 3 stacked adapters, 0 to 2, or -1"):
            jq.select_adapter(stacked, index)
    with pytest.raises(InputError, match="expected one integer for each row"):
        jq.attach_many(params, stacked, 1)
    with pytest.raises(InputError, match="expected one integer"):
        jq.select_adapter(stacked, 0.5)
    too_large = run_rows(params, stacked, INDEX + 1)
    assert jnp.isnan(too_large[0]).all() and not jnp.isnan(too_large[1]).any()


def test_arguments_without_a_row_for_each_adapter(params, stacked):
    tree = jq.attach_many(params, stacked, INDEX)
    with pytest.raises(InputError, match=r"shape \(4, 7\) for adapters of 5 rows"):
        ROWS(tree, TOKENS[:4])
    with pytest.raises(InputError, match="expected 5 rows along axis 0"):
        ROWS(tree, jnp.int32(1))


def test_an_adapter_of_another_model(params, stacked):
    tree: Any = {"layers": params["layers"]["mlp"]}
    with pytest.raises(InputError, match="not in the parameters"):
        ROWS(jq.attach_many(tree, stacked, INDEX), TOKENS)
