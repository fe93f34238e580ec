# SPDX-License-Identifier: Apache-2.0
"""quantized_matmul equals the matmul with the decoded kernel, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_qlora.quant import QuantizedArray, quantize_array, quantized_matmul
from jax_qlora.quant import matmul as matmul_module
from jax_qlora.quant.array import dequantize_rows
from tests.helpers import normal

# float32: rounding of sums in another order. Half precision: operands are rounded alike, sums are
# in float32 in both, so that only the last rounding differs.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}


def dense_matmul(x, q, *, transpose=False, dtype=None):
    """What quantized_matmul stands for, written with the decoded kernel."""
    w = dequantize_rows(q, x.dtype)
    w = w if transpose else jnp.swapaxes(w, -1, -2)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def close(got, want, dtype):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] * np.abs(want).max())


@pytest.fixture(params=["one tile", "tiles", "ragged tiles"])
def tiling(request, monkeypatch):
    """Decoding goes tile by tile of rows; small kernels fit one tile unless tiles are small."""
    if request.param != "one tile":
        assert hasattr(matmul_module, "_TILE_ELEMENTS")
        elements = 128 * (8 if request.param == "tiles" else 7)
        monkeypatch.setattr(matmul_module, "_TILE_ELEMENTS", elements)
        jax.clear_caches()  # the tile size is read when the product is traced
        yield
        jax.clear_caches()
    else:
        yield


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("cols", [128, 96])
def test_equals_the_dense_matmul_and_its_gradient(tiling, cols, transpose):
    q = quantize_array(normal((cols, 40)))
    k, n = (40, cols) if transpose else (cols, 40)
    x, g = normal((5, k), 1), normal((5, n), 2)

    def value_and_grad(matmul):
        def f(x, g):
            y, vjp = jax.vjp(lambda x: matmul(x, q, transpose=transpose), x)
            return y, vjp(g)[0]

        return jax.jit(f)(x, g)

    results = (value_and_grad(matmul) for matmul in (quantized_matmul, dense_matmul))
    for got, want in zip(*results, strict=True):
        close(got, want, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("transpose", [False, True])
def test_computes_in_the_operands_dtype_with_float32_sums(dtype, transpose):
    q = quantize_array(normal((96, 40)))
    k, n = (40, 96) if transpose else (96, 40)
    x, g = normal((5, k), 1, dtype), normal((5, n), 2, dtype)
    y, vjp = jax.vjp(lambda x: quantized_matmul(x, q, transpose=transpose), x)
    want, want_vjp = jax.vjp(lambda x: dense_matmul(x, q, transpose=transpose), x)
    assert y.dtype == dtype and vjp(g)[0].dtype == dtype
    close(y, want, dtype)
    close(vjp(g)[0], want_vjp(g)[0], dtype)


def test_the_result_may_be_wider_than_the_operand():
    q = quantize_array(normal((96, 40)))
    x = normal((5, 96), 1, jnp.bfloat16)
    y, vjp = jax.vjp(lambda x: quantized_matmul(x, q, dtype=jnp.float32), x)
    assert y.dtype == jnp.float32
    close(y, dense_matmul(x, q, dtype=jnp.float32), jnp.float32)
    assert vjp(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_format(format, block_size, double_quant):
    q = quantize_array(
        normal((96, 24)), format=format, block_size=block_size, double_quant=double_quant
    )
    x = normal((4, 96), 1)
    close(jax.jit(quantized_matmul)(x, q), dense_matmul(x, q), jnp.float32)


@pytest.mark.parametrize("lead", [(3,), (2, 3)])
@pytest.mark.parametrize("transpose", [False, True])
def test_lead_axes_are_a_batch_of_matmuls(lead, transpose):
    q = quantize_array(normal((*lead, 96, 24)))
    x = normal((*lead, 4, 24 if transpose else 96), 1)
    got = jax.jit(lambda x, q: quantized_matmul(x, q, transpose=transpose))(x, q)
    close(got, dense_matmul(x, q, transpose=transpose), jnp.float32)


def test_one_row_and_one_column():
    q = quantize_array(normal((64, 1)))
    x = normal((1, 64), 1)
    close(quantized_matmul(x, q), dense_matmul(x, q), jnp.float32)
    y = normal((1, 1), 2)
    close(quantized_matmul(y, q, transpose=True), dense_matmul(y, q, transpose=True), jnp.float32)


def test_gradient_agrees_with_finite_differences():
    q = quantize_array(normal((64, 8)))
    x = normal((3, 64), 1)
    f = jax.jit(lambda x: jnp.sin(quantized_matmul(x, q)))
    check_grads(lambda x: f(jnp.asarray(x)), (x,), 1, ["rev"], rtol=1e-2)


def test_vmap_over_data_and_over_kernels():
    q = quantize_array(normal((3, 96, 24)))
    x = normal((3, 4, 96), 1)
    want = dense_matmul(x, q)
    close(jax.vmap(quantized_matmul)(x, q), want, jnp.float32)
    first = jax.tree.map(lambda a: a[0], q)
    close(jax.vmap(quantized_matmul, (0, None))(x, first), dense_matmul(x, first), jnp.float32)
    grads = jax.vmap(jax.grad(lambda x, q: quantized_matmul(x, q).sum()))(x, q)
    close(grads, jax.grad(lambda x: dense_matmul(x, q).sum())(x), jnp.float32)


def test_only_the_packed_kernel_is_kept_for_the_backward():
    q = quantize_array(normal((256, 64)))
    x = normal((5, 256), 1)
    _, vjp = jax.vjp(lambda x: quantized_matmul(x, q), x)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape")]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= q.nbytes
    assert {leaf.shape for leaf in kept if leaf.size} <= {x.shape for x in jax.tree.leaves(q)}


def test_the_kernel_gets_no_gradient():
    q = quantize_array(normal((64, 8)))
    x = normal((3, 64), 1)
    grads = jax.grad(lambda q: quantized_matmul(x, q).sum(), allow_int=True)(q)
    assert grads.codes.dtype == jax.dtypes.float0
    assert not grads.absmax_scale.any() and not grads.absmax_offset.any()


def test_kernels_of_equal_shape_share_a_compilation():
    traces = []
    f = jax.jit(lambda x, q: traces.append(q) or quantized_matmul(x, q))
    x = normal((3, 64))
    f(x, quantize_array(normal((64, 8))))
    f(x, quantize_array(normal((64, 8), 1)))
    assert len(traces) == 1


def test_a_loop_over_layers_carries_no_array_for_decoding():
    """XLA moves out of a loop what does not change in it, however large it makes it."""
    q = quantize_array(normal((3, 128, 128)))

    def loss(x: jax.Array, q: QuantizedArray) -> jax.Array:
        return jax.lax.scan(lambda x, q: (jnp.sin(quantized_matmul(x, q)), None), x, q)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(normal((16, 128)), q).compile().as_text()
    assert program and " while(" in program
    assert "u16[128,2,64]" in program  # the indices of the look-up
    assert not re.search(r"u16\[128,2,64\]\S* get-tuple-element\(", program)
