# SPDX-License-Identifier: Apache-2.0
"""QuantizedArray: what it stands for, and that every jax transform takes it as a pytree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_qlora import InputError, QuantizedArray, dequantize, quantize_array
from jax_qlora.quant import quantize_rows
from jax_qlora.quant.array import block_constants, dequantize_rows, lookup_rows
from jax_qlora.quant.codebook import CODEBOOKS
from jax_qlora.quant.layout import KernelLayout, make_layout
from tests.helpers import golden, normal

FORMATS = list(CODEBOOKS)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_shape_dtype_and_error_in_every_format(format, block_size, double_quant):
    w = normal((256, 6))
    q = quantize_array(w, format=format, block_size=block_size, double_quant=double_quant)
    assert (q.shape, q.ndim, q.size, q.dtype) == (w.shape, 2, 256 * 6, w.dtype)
    assert (q.format, q.block_size, q.double_quant) == (format, block_size, double_quant)
    got = dequantize(q)
    assert got.shape == w.shape and got.dtype == jnp.float32
    # half the widest gap of a block's range; double quantization moves a constant a little more
    gap = np.diff(np.sort(CODEBOOKS[format].levels)).max()
    bound = float(jnp.abs(w).max()) * gap / 2 * (1.1 if double_quant else 1.0001)
    assert float(jnp.abs(got - w).max()) <= bound


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept_as_a_name_and_the_product_is_cast_once(dtype):
    w = normal((64, 8), dtype=dtype)
    q = quantize_array(w)
    assert q.dtype == dtype
    assert dequantize(q).dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(q, dtype), dequantize(q).astype(dtype))


def test_numpy_kernels_are_welcome():
    w = np.asarray(normal((64, 8)))
    np.testing.assert_array_equal(quantize_array(w).codes, quantize_array(jnp.asarray(w)).codes)


@pytest.mark.parametrize("double_quant", [False, True])
def test_equals_the_reference_vectors(double_quant):
    vectors = golden("nf4_vectors.npz")
    w = jnp.asarray(vectors["normal_mid/input"])  # torch's layout [out, in]
    q = quantize_rows(w, double_quant=double_quant)
    assert q.shape == (384, 256)  # the kernel [in, out] that it stands for
    np.testing.assert_array_equal(q.codes.ravel(), vectors["normal_mid/nf4_b64/packed"].ravel())
    name = "dq_dequant" if double_quant else "dequant"
    got, want = dequantize(q).T, vectors[f"normal_mid/nf4_b64/{name}"]
    # an offset an ulp off moves everything by that, and a handful of codes by one
    np.testing.assert_allclose(got, want, atol=0 if not double_quant else 2e-3)
    assert double_quant is False or np.abs(np.asarray(got) - want).mean() < 1e-6


def test_quantize_rows_is_quantize_array_of_the_transpose():
    w = normal((3, 96, 40))
    a, b = quantize_array(w), quantize_rows(jnp.swapaxes(w, -1, -2))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert quantize_rows(w, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_foreign_blocks_that_straddle_rows_are_exact_at_a_smaller_block_size():
    """bitsandbytes runs its blocks over the flattened [6, 96]; gcd(96, 64) = 32 divides both."""
    vectors = golden("nf4_vectors.npz")
    want = {k.rpartition("/")[2]: v for k, v in vectors.items() if "wide_rows/nf4_b64" in k}

    def repeat(blocks):
        return jnp.asarray(np.repeat(blocks, 2).reshape(6, 3))

    shared: dict[str, Any] = dict(
        codes=jnp.asarray(want["packed"].reshape(6, 48)), kernel_shape=(96, 6), block_size=32
    )
    q = QuantizedArray.from_parts(absmax=repeat(want["absmax"]), **shared)
    np.testing.assert_array_equal(dequantize(q).T, want["dequant"])
    q = QuantizedArray.from_parts(
        absmax=repeat(want["dq_absmax_u8"]),
        absmax_scale=jnp.asarray(want["dq_nested_absmax"]),
        absmax_offset=jnp.asarray(want["dq_offset"]),
        group_size=512,
        **shared,
    )
    np.testing.assert_array_equal(dequantize(q).T, want["dq_dequant"])


def test_an_array_made_of_its_own_parts_is_itself():
    q = quantize_array(normal((2, 96, 8)))
    again = QuantizedArray.from_parts(
        codes=q.codes,
        absmax=q.absmax,
        absmax_scale=q.absmax_scale,
        absmax_offset=q.absmax_offset,
        kernel_shape=(96, 8),
    )
    assert jax.tree.structure(again) == jax.tree.structure(q)


@pytest.mark.parametrize(
    ("shape", "in_axis", "out_axis", "rows_cols"),
    [
        ((96, 8), -2, None, (8, 96)),
        ((8, 96), -1, None, (8, 96)),  # torch's and Equinox's layout
        ((2, 3, 64, 8), -2, None, (8, 64)),  # layers and experts in front
        ((64, 4, 8), -3, None, (32, 64)),  # DenseGeneral, two output axes
        ((4, 8, 16), (-3, -2), None, (16, 32)),  # attention output, two input axes
        ((2, 4, 16, 8), (-3, -1), (-2,), (16, 32)),  # interleaved, a layer axis in front
        ((3, 3, 8, 16), (0, 1, 2), 3, (16, 72)),  # convolution, counted from the front
    ],
)
def test_any_layout_folds_to_rows_and_cols_and_back(shape, in_axis, out_axis, rows_cols):
    w = normal(shape)
    layout = make_layout(shape, in_axis, out_axis)
    assert (layout.rows, layout.cols) == rows_cols
    np.testing.assert_array_equal(layout.from_rows(layout.to_rows(w)), w)
    q = quantize_array(w, in_axis=in_axis, out_axis=out_axis)
    assert q.shape == shape and q.layout == layout
    assert float(jnp.abs(dequantize(q) - w).max()) < 0.6
    lead = len(shape) - len(layout.shape)
    for index in np.ndindex(shape[:lead]):  # each layer or expert is a kernel of its own
        one = quantize_array(w[index], in_axis=layout.in_axes, out_axis=layout.out_axes)
        # compiled alone, an offset may differ by an ulp
        np.testing.assert_allclose(dequantize(one), dequantize(q)[index], atol=1e-5)


def test_looking_up_rows_decodes_those_rows():
    q = quantize_array(normal((12, 96)), in_axis=-1)
    ids = jnp.array([[3, 0], [11, 3]])
    np.testing.assert_array_equal(lookup_rows(q, ids), dequantize_rows(q)[ids])
    assert lookup_rows(q, ids, jnp.bfloat16).dtype == jnp.bfloat16


# --- size and text -----------------------------------------------------------------------------


def test_bits_per_parameter_are_the_papers():
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    q = jax.eval_shape(quantize_array, shape)
    assert q.bits_per_param == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)
    assert f"{q.bits_per_param:.3f}" == "4.127"
    assert q.nbytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(q))
    plain = jax.eval_shape(functools.partial(quantize_array, double_quant=False), shape)
    assert plain.bits_per_param == 4.5


def test_repr_tells_shape_format_bits_and_padding():
    assert repr(quantize_array(normal((2, 128, 64), dtype=jnp.bfloat16))) == (
        "QuantizedArray((2, 128, 64) bfloat16, nf4 block 64 + double quant, 4.133 bits/param)"
    )
    q = quantize_array(normal((70, 8)), format="int4", double_quant=False)
    assert "int4 block 64, 8.229 bits/param, rows padded by 58" in repr(q)
    assert "nf4" in repr(jax.tree.map(lambda x: None, quantize_array(normal((64, 8)))))


def test_an_array_outside_lift_says_what_to_do():
    q: Any = quantize_array(normal((64, 8)))
    for use in (lambda: normal((2, 64)) @ q, lambda: q @ normal((8, 2)), lambda: jnp.sin(q)):
        with pytest.raises(InputError, match=r"run by jax_qlora\.lift"):
            use()


# --- pytree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_layers_are_sliced_by_scan_vmap_and_tree_map(double_quant):
    w = normal((3, 96, 8))
    q = quantize_array(w, double_quant=double_quant)
    want = dequantize(q)
    np.testing.assert_array_equal(
        jax.lax.scan(lambda _, q: (None, dequantize(q)), None, q)[1], want
    )
    np.testing.assert_array_equal(jax.vmap(dequantize)(q), want)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], q)
        assert one.shape == (96, 8)
        np.testing.assert_array_equal(dequantize(one), want[i])


def test_abstract_evaluation_sees_the_packed_arrays():
    q = jax.eval_shape(quantize_array, jax.ShapeDtypeStruct((2, 64, 8), jnp.bfloat16))
    assert q.shape == (2, 64, 8) and q.codes.dtype == jnp.uint8
    assert q.codes.shape == (2, 8, 32) and q.absmax.shape == (2, 8, 1)
    assert q.absmax_scale.shape == (2, 1) and q.absmax_offset.shape == (2,)


def test_trees_of_anything_can_be_made_of_it():
    q = quantize_array(normal((64, 8)))
    flags = jax.tree.map(lambda x: True, q)
    assert jax.tree.leaves(flags) == [True] * 4
    assert jax.tree.structure(flags) == jax.tree.structure(q)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(q)[0]]
    assert paths == [".codes", ".absmax", ".absmax_scale", ".absmax_offset"]


def test_jit_takes_returns_and_donates_it():
    q = quantize_array(normal((64, 8)))
    want = dequantize(q)
    moved = jax.jit(lambda q: q, donate_argnums=0)(q)
    assert q.codes.is_deleted()
    np.testing.assert_array_equal(dequantize(moved), want)


def test_equal_layouts_share_a_compilation():
    traces = []
    f = jax.jit(lambda q: traces.append(q) or dequantize(q))
    f(quantize_array(normal((64, 8))))
    f(quantize_array(normal((64, 8), seed=1)))
    assert len(traces) == 1


def test_sharding_over_devices_keeps_the_values():
    devices = jax.devices()
    assert len(devices) == 2
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    q = quantize_array(normal((4, 96, 8)))
    by_layer = jax.device_put(q, NamedSharding(mesh, PartitionSpec("x")))
    rows = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec(None, "x") if x.ndim == 3 else PartitionSpec()),
        q,
    )
    by_row = jax.device_put(q, rows)
    for sharded in (by_layer, by_row):
        assert len(sharded.codes.sharding.device_set) == 2
        assert sharded.codes.addressable_shards[0].data.size == q.codes.size // 2
        np.testing.assert_array_equal(jax.jit(dequantize)(sharded), dequantize(q))
    assert "QuantizedArray(nf4" in repr(rows)


def test_orbax_restores_it(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    q = {"kernel": quantize_array(normal((2, 96, 8)))}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), q)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", q)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "q", like)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_gradients_do_not_reach_the_codes():
    q = quantize_array(normal((64, 8)))
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(lambda q: dequantize(q).sum())(q)


# --- errors ------------------------------------------------------------------------------------


def test_wrong_input_is_named():
    w = normal((64, 8))
    with pytest.raises(InputError, match="format 'nf8': expected one of nf4, fp4, int4"):
        quantize_array(w, format="nf8")
    with pytest.raises(InputError, match="block size 48: expected one of 32, 64, 128, 256"):
        quantize_array(w, block_size=48)
    with pytest.raises(InputError, match="dtype int32: expected float32, bfloat16 or float16"):
        quantize_array(w.astype(jnp.int32))
    with pytest.raises(InputError, match=r"axis \[-3\] of a kernel of shape \(64, 8\)"):
        quantize_array(w, in_axis=-3)
    with pytest.raises(InputError, match="expected a kernel of two or more axes"):
        quantize_array(w[0])
    with pytest.raises(InputError, match=r"in_axis=-2, out_axis=-2 .* expected distinct axes"):
        quantize_array(w, out_axis=-2)
    with pytest.raises(InputError, match="the last ones of the kernel"):
        quantize_array(normal((4, 64, 8)), in_axis=0, out_axis=1)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("codes", jnp.zeros((8, 16), jnp.uint8), r"codes .* expected uint8 \(8, 32\)"),
        ("codes", jnp.zeros((8, 32), jnp.int8), r"codes .* found int8 \(8, 32\)"),
        ("absmax", jnp.zeros((8, 1), jnp.float32), r"absmax .* expected uint8 \(8, 1\)"),
        ("absmax_scale", jnp.zeros((2,)), r"absmax_scale .* expected float32 \(1,\)"),
        ("absmax_offset", None, r"absmax_offset .* expected float32 \(\), found None"),
        ("format", "nf5", "quantization format 'nf5'"),
        ("block_size", 63, "block size 63"),
        ("kernel_shape", (64, 9), r"codes of a nf4 kernel \(64, 9\) .* expected uint8 \(9, 32\)"),
        ("in_axes", (-3,), r"axis \[-3\]"),
    ],
)
def test_parts_that_contradict_each_other_are_named(part, value, message):
    q = quantize_array(normal((64, 8)))
    parts: dict[str, Any] = dict(
        codes=q.codes,
        absmax=q.absmax,
        absmax_scale=q.absmax_scale,
        absmax_offset=q.absmax_offset,
        kernel_shape=(64, 8),
    )
    with pytest.raises(InputError, match=message):
        QuantizedArray.from_parts(**{**parts, part: value})


def test_layouts_compare_by_value():
    assert make_layout((64, 8)) == KernelLayout((64, 8), (-2,))
    assert hash(make_layout((64, 8))) == hash(make_layout((2, 64, 8)))
    assert block_constants(quantize_array(normal((2, 96, 8)))).shape == (2, 8, 2)
