# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_qlora._compat import aval_of
from jax_qlora.models.matmul import matmul

from ..helpers import assert_trees_close


def operands(key: jax.Array, dtype, y_axis: int, batch: tuple[int, ...]):
    a, b = jax.random.split(key)
    y_shape = (*batch, 5, 7) if y_axis == -2 else (*batch, 7, 5)
    return jax.random.normal(a, (*batch, 4, 5), dtype), jax.random.normal(b, y_shape, dtype)


def reference(x, y, y_axis: int):
    wide = jnp.swapaxes(y, -1, -2) if y_axis == -1 else y
    return jnp.einsum("...mk,...kn->...mn", x.astype(jnp.float32), wide.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("y_axis", [-2, -1])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_product_and_gradients(key: jax.Array, dtype, y_axis: int, batch: tuple[int, ...]):
    x, y = operands(key, dtype, y_axis, batch)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    got = matmul(x, y, y_axis=y_axis)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(x, y, y_axis), rtol=1e-5, atol=1e-5)

    def loss(f):
        return lambda x, y: jnp.sum(jnp.sin(f(x, y)))

    got = jax.jit(jax.grad(loss(lambda x, y: matmul(x, y, y_axis=y_axis)), (0, 1)))(x, y)
    want = jax.jit(jax.grad(loss(lambda x, y: reference(x, y, y_axis)), (0, 1)))(x, y)
    assert [g.dtype for g in got] == [dtype, dtype]
    assert_trees_close(got, want, rtol=tolerance, atol=tolerance * 5)


def test_no_matmul_of_the_backward_widens_an_operand(key: jax.Array):
    x, y = operands(key, jnp.bfloat16, -2, ())
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, y: jnp.sum(matmul(x, y)), (0, 1)))(x, y)
    dots = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(dots) == 3
    assert all(aval_of(v).dtype == jnp.bfloat16 for eqn in dots for v in eqn.invars)
