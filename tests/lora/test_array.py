# SPDX-License-Identifier: Apache-2.0
"""The update's arithmetic: against the dense formula, forward, backward, and under dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_qlora import InputError, LoraArray, LoraPair, quantize_array
from jax_qlora.lora.array import lookup, lora_matmul, materialize
from jax_qlora.quant.layout import KernelLayout, make_layout
from tests.helpers import normal


def pair(shape=(96, 24), rank=4, in_axis=-2, scale=0.25, dropout=0.0, seed=0):
    layout = make_layout(shape, in_axis)
    lead = shape[: len(shape) - len(layout.shape)]
    return LoraPair(
        a=normal((*lead, rank, layout.cols), seed),
        b=normal((*lead, layout.rows, rank), seed + 1),
        layout=layout,
        scale=scale,
        dropout=dropout,
    )


def dense_matmul(x, pair, transpose):
    """The formula of the paper, with the update as a dense matrix."""
    delta = pair.scale * jnp.matmul(pair.b, pair.a)
    return jnp.matmul(x, delta if transpose else jnp.swapaxes(delta, -1, -2))


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("transpose", [False, True])
def test_value_and_gradients_are_those_of_the_dense_formula(lead, transpose):
    p = pair((*lead, 96, 24))
    x = normal((*lead, 5, 24 if transpose else 96), 3)
    g = normal((*lead, 5, 96 if transpose else 24), 4)

    def value_and_grads(matmul):
        y, vjp = jax.vjp(matmul, x, p)
        return y, *jax.tree.leaves(vjp(g))

    got = value_and_grads(lambda x, p: lora_matmul(x, p, transpose=transpose))
    want = value_and_grads(lambda x, p: dense_matmul(x, p, transpose))
    for name, a, b in zip(("y", "dx", "da", "db"), got, want, strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-6, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("transpose", [False, True])
def test_half_precision_operands_keep_float32_gradients(dtype, transpose):
    p = pair()
    x = normal((5, 24 if transpose else 96), 3, dtype)
    y, vjp = jax.vjp(lambda x, p: lora_matmul(x, p, transpose=transpose), x, p)
    dx, dp = vjp(jnp.ones_like(y))
    assert y.dtype == dx.dtype == dtype
    assert dp.a.dtype == dp.b.dtype == jnp.float32
    exact = lambda x, p: dense_matmul(x, p, transpose)  # noqa: E731
    want, want_vjp = jax.vjp(exact, x.astype(jnp.float32), p)
    want_dx, want_dp = want_vjp(jnp.ones_like(want))
    for got, ref in ((y, want), (dx, want_dx), (dp.a, want_dp.a), (dp.b, want_dp.b)):
        assert relative(got, ref) < 2e-2
    assert lora_matmul(x, p, transpose=transpose, dtype=jnp.float32).dtype == jnp.float32


def test_dropout_zeroes_inputs_and_keeps_the_expectation():
    p = pair((512, 24), dropout=0.25)
    # an update that shows its input: each of the first rows picks one column
    layout = KernelLayout((512, 512), (-2,))
    eye = LoraPair(a=jnp.eye(512), b=jnp.eye(512), layout=layout, scale=1.0, dropout=0.25)
    x = jnp.ones((64, 512))
    seen = lora_matmul(x, eye, dropout_key=jax.random.key(0))
    assert set(np.unique(np.asarray(seen))) == {0.0, np.float32(1 / 0.75)}
    assert abs(float((seen == 0).mean()) - 0.25) < 0.01
    one = lora_matmul(x, p, dropout_key=jax.random.key(1))
    again = lora_matmul(x, p, dropout_key=jax.random.key(1))
    other = lora_matmul(x, p, dropout_key=jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    keys = jax.random.split(jax.random.key(3), 400)
    mean = jax.vmap(lambda k: lora_matmul(x[:2], p, dropout_key=k))(keys).mean(0)
    plain = lora_matmul(x[:2], p)
    assert relative(mean, plain) < 0.1
    np.testing.assert_array_equal(plain, lora_matmul(x[:2], p, dropout_key=None))


def test_layers_and_experts_drop_different_inputs():
    p = pair((2, 96, 24), dropout=0.5)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), p)
    x = jnp.ones((2, 4, 96))
    y = lora_matmul(x, same, dropout_key=jax.random.split(jax.random.key(0), (2,)))
    assert not np.array_equal(y[0], y[1])


@pytest.mark.parametrize(
    ("shape", "in_axis"),
    [((96, 24), -2), ((24, 96), -1), ((2, 64, 4, 6), -3), ((4, 8, 6), (-3, -2))],
)
def test_delta_and_materialize_are_the_kernel_in_its_own_layout(shape, in_axis):
    p = pair(shape, in_axis=in_axis)
    assert p.delta().shape == shape
    want = p.scale * np.einsum("...or,...ri->...oi", p.b, p.a)
    np.testing.assert_allclose(p.layout.to_rows(p.delta()), want, rtol=1e-5, atol=1e-5)
    base = normal(shape, 5)
    dense = LoraArray(base=base, pair=p, dropout_key=None)
    np.testing.assert_array_equal(materialize(dense), base + p.delta())
    q = quantize_array(base, in_axis=in_axis)
    both = LoraArray(base=q, pair=p, dropout_key=None)
    np.testing.assert_array_equal(materialize(both), materialize(q) + p.delta())
    assert materialize(both, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("quantized", [False, True])
def test_looking_up_rows_adds_their_update(quantized):
    p = pair((12, 96), in_axis=-1)
    base = normal((12, 96), 5)
    if quantized:
        base = quantize_array(base, in_axis=-1)
    leaf = LoraArray(base=base, pair=p, dropout_key=None)
    ids = jnp.array([[3, 0], [11, 3]])
    got = lookup(leaf, ids, jnp.float32)
    np.testing.assert_allclose(got, materialize(leaf)[ids], atol=1e-5)

    def total(p):
        return lookup(LoraArray(base=base, pair=p, dropout_key=None), ids, jnp.float32).sum()

    da = jax.grad(total)(p)
    assert bool(jnp.any(da.b[3])) and not bool(jnp.any(da.b[1]))


def test_they_print_what_they_are():
    p = pair((2, 96, 24), dropout=0.1)
    assert repr(p) == "LoraPair(rank 4 of (2, 96, 24), scale 0.25, dropout 0.1)"
    dense = LoraArray(base=normal((2, 96, 24)), pair=p, dropout_key=None)
    assert repr(dense).startswith("LoraArray(float32 (2, 96, 24), LoraPair(rank 4")
    assert "nf4" in repr(LoraArray(base=quantize_array(dense.base), pair=p, dropout_key=None))
    assert repr(jax.tree.map(lambda _: True, p)) == "LoraPair(a=True, b=True)"
    repr(jax.tree.map(lambda _: True, dense))
    assert (dense.shape, dense.ndim, dense.dtype, dense.lead) == ((2, 96, 24), 3, jnp.float32, (2,))


def test_an_adapted_kernel_outside_lift_says_what_to_do():
    leaf = LoraArray(base=normal((96, 24)), pair=pair(), dropout_key=None)
    with pytest.raises(InputError, match=r"run by jax_qlora\.lift"):
        jnp.sin(leaf)  # type: ignore[arg-type]
