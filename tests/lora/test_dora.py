# SPDX-License-Identifier: Apache-2.0
"""DoRA: against the paper's dense formula with its norm held constant, wherever lift goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError, LoraArray, LoraPair, quantize_array
from jax_qlora.lora import dora
from jax_qlora.lora.array import materialize
from jax_qlora.quant.layout import make_layout
from tests.helpers import assert_trees_close, normal
from tests.lift.walk import dense_weights


def pair(shape, rank=4, in_axis=-2, seed=0, out_axis=None):
    layout = make_layout(shape, in_axis, out_axis)
    lead = shape[: len(shape) - len(layout.shape)]
    return LoraPair(
        a=normal((*lead, rank, layout.cols), seed),
        b=normal((*lead, layout.rows, rank), seed + 1),
        layout=layout,
        scale=0.25,
        dropout=0.0,
        magnitude=1 + jnp.abs(normal((*lead, layout.rows), seed + 2)),
    )


def dense_formula(base, p):
    """Equation 5 of the paper in the kernel's own layout, the norm as in section 4.3."""
    rows = p.layout.to_rows(materialize(base, jnp.float32))
    total = rows + p.scale * jnp.matmul(p.b, p.a)
    norm = jax.lax.stop_gradient(jnp.linalg.norm(total, axis=-1, keepdims=True))
    return p.layout.from_rows(p.magnitude[..., None] * total / norm)


CASES = {  # kernel, contracted axes, output axes, function of the kernel, shape of x
    "linear": ((96, 24), -2, None, lambda x, w: x @ w, (5, 96)),
    "transposed": ((96, 24), -2, None, lambda x, w: x @ w.T, (5, 24)),
    "layers": (
        (2, 96, 96), -2, None, lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
        (5, 96),
    ),
    "experts": ((3, 64, 24), -2, None, lambda x, w: jnp.einsum("bd,edf->bef", x, w), (5, 64)),
    "experts, transposed": (
        (3, 64, 24), -2, None, lambda x, w: jnp.einsum("bf,edf->bed", x, w), (5, 24),
    ),
    "heads": ((64, 4, 6), -3, None, lambda x, w: jnp.einsum("bd,dhk->bhk", x, w), (5, 64)),
    "convolution": (
        (3, 3, 4, 24), (-4, -3, -2), None,
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (2, 5, 5, 4),
    ),
    "convolution in groups": (
        (24, 2, 3, 3), (-3, -2, -1), -4,
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", rhs_dilation=(1, 2), feature_group_count=2
        ),
        (2, 4, 5, 7),
    ),
    "rows looked up": (
        (24, 64), -1, -2, lambda x, w: w[jnp.array([3, 0, 3])] * x[None], (64,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_dense_formula(case, quantized):
    shape, in_axis, out_axis, f, x_shape = CASES[case]
    p = pair(shape, in_axis=in_axis, out_axis=out_axis)
    base, x = normal(shape, 5), normal(x_shape, 6)
    if quantized:
        base = quantize_array(base, in_axis=in_axis, out_axis=out_axis)

    def lifted(x, p):
        return jq.lift(f)(x, LoraArray(base=base, pair=p, dropout_key=None))

    def dense(x, p):
        return f(x, dense_formula(base, p))

    got, vjp = jax.vjp(jax.jit(lifted), x, p)
    want, want_vjp = jax.vjp(dense, x, p)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)
    g = normal(want.shape, 7)
    for a, b in zip(jax.tree.leaves(vjp(g)), jax.tree.leaves(want_vjp(g)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    if case == "linear":  # merged, and looked at from the side
        leaf = LoraArray(base=base, pair=p, dropout_key=None)
        np.testing.assert_allclose(materialize(leaf), dense_formula(base, p), atol=1e-5)


def test_norms_go_tile_by_tile(monkeypatch):
    p = pair((96, 24))
    base = quantize_array(normal((96, 24), 5))
    whole = dora.row_norms(base, p)
    monkeypatch.setattr(dora, "_TILE_ELEMENTS", 96 * 7)  # three tiles of seven rows, one of three
    np.testing.assert_allclose(dora.row_norms(base, p), whole, rtol=1e-6)
    assert dense_weights(dora.row_norms, base, p, sizes={24 * 96}) == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    p, x = pair((96, 24)), normal((5, 96), 6, dtype)
    leaf = LoraArray(base=quantize_array(normal((96, 24), 5, dtype)), pair=p, dropout_key=None)
    f = jq.lift(lambda x, w: x @ w)
    got, vjp = jax.vjp(lambda p: f(x, dataclasses.replace(leaf, pair=p)), p)
    want = x.astype(jnp.float32) @ dense_formula(leaf.base, p)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, atol=2e-2 * float(jnp.abs(want).max())
    )
    (grads,) = vjp(jnp.ones_like(got))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def apply(params, tokens):
    """A look-up, two scanned layers under remat, and the tied head."""
    x = params["embed"][tokens]

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["embed"].T


TOKENS = jnp.array([[1, 5, 3], [7, 0, 11]])


@pytest.fixture
def params():
    return {"embed": normal((12, 64), 1), "layers": normal((2, 64, 64), 2) / 8}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_fresh_adapter_is_the_base_model(key, params, quantized):
    targets = jq.find_targets(apply, params, TOKENS, match=["embed", "layers"])
    base = jq.quantize(params, targets) if quantized else params
    adapter = jq.add_magnitudes(base, jq.init_adapter(key, targets, rank=2))
    sizes = {path: getattr(pair.magnitude, "shape", None) for path, pair in adapter.items()}
    assert sizes == {"embed": (12,), "layers": (2, 64)}
    run = jax.jit(jq.lift(apply))
    want = run(base, TOKENS)
    got = run(jq.attach(base, adapter), TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
    assert "DoRA" in repr(adapter["layers"])
    assert f"trainable {2 * 64 * 4 + 12 * 2 + 2 * 64 + 2 * 64 + 12:,} of" in jq.summary(
        base, adapter
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_merged_parameters_are_the_lifted_model(key, params, quantized):
    targets = jq.find_targets(apply, params, TOKENS, match=["embed", "layers"])
    base = jq.quantize(params, targets) if quantized else params
    adapter = jq.add_magnitudes(base, jq.init_adapter(key, targets, rank=2))
    adapter = jax.tree.map(lambda x: x + 0.1 * normal(x.shape, x.size), adapter)
    want = jax.jit(jq.lift(apply))(jq.attach(base, adapter), TOKENS)
    got = apply(jq.merge(base, adapter), TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
    assert float(jnp.abs(want - apply(jq.merge(base), TOKENS)).max()) > 0.1
    with pytest.raises(InputError, match="'embed' was merged with DoRA"):
        jq.unmerge(jq.merge(base, adapter), adapter)


def test_adapters_are_mapped_over(key, params):
    targets = jq.find_targets(apply, params, TOKENS)
    adapter = jq.add_magnitudes(params, jq.init_adapter(key, targets, rank=2))
    many = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), adapter)
    run = jax.jit(lambda a: jq.lift(apply)(jq.attach(params, a), TOKENS))
    both = jax.jit(jax.vmap(run))(many)
    assert_trees_close(both[0], run(adapter), atol=1e-4)
    assert_trees_close(both[1], run(jax.tree.map(lambda x: x + 0.1, adapter)), atol=1e-4)


def test_a_row_of_zeros_stays_zero(key):
    params = {"w": jnp.zeros((64, 8)).at[:, 1:].set(1.0)}
    targets = jq.find_targets(lambda p, x: x @ p["w"], params, jnp.ones((2, 64)))
    adapter = jq.add_magnitudes(params, jq.init_adapter(key, targets, rank=2))
    f = jq.lift(lambda p, x: (x @ p["w"]).sum())
    value, grads = jax.value_and_grad(lambda a: f(jq.attach(params, a), jnp.ones((2, 64))))(adapter)
    assert bool(jnp.isfinite(value)) and all(
        bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)
    )
