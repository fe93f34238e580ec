# SPDX-License-Identifier: Apache-2.0
"""Adapters over parameter trees: fresh, attached, merged, unmerged; and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from tests.helpers import assert_trees_close, normal

D, LAYERS, VOCAB = 32, 2, 12


def apply(params, tokens):
    """Embedding, two scanned layers with a residual, output head."""
    x = params["embed"]["embedding"][tokens]

    def layer(x, p):
        h = jax.nn.silu(x @ p["mlp"]["up"]["kernel"])
        return x + h @ p["mlp"]["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"]


def make_params(dtype=jnp.float32):
    params = {
        "embed": {"embedding": normal((VOCAB, D), 1)},
        "layers": {
            "mlp": {
                "up": {"kernel": normal((LAYERS, D, 2 * D), 2) / 6},
                "down": {"kernel": normal((LAYERS, 2 * D, D), 3) / 8},
            }
        },
        "head": {"kernel": normal((D, VOCAB), 4) / 6},
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


TOKENS = jnp.array([[1, 5, 3], [7, 0, 11]])
UP, DOWN = "layers/mlp/up/kernel", "layers/mlp/down/kernel"


@pytest.fixture
def params():
    return make_params()


@pytest.fixture
def targets(params):
    return jq.find_targets(apply, params, TOKENS)


def trained(key, targets, **kwargs):
    """An adapter that changes something."""
    adapter = jq.init_adapter(key, targets, rank=4, alpha=4, **kwargs)
    return jax.tree.map(lambda x: normal(x.shape, x.size) / 8, adapter)


# --- init --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_fresh_adapter_is_the_base_model_exactly(key, dtype, quantized):
    params = make_params(dtype)
    targets = jq.find_targets(apply, params, TOKENS)
    base = jq.quantize(params, targets) if quantized else params
    adapter = jq.init_adapter(key, targets, dropout=0.1)
    run = jax.jit(jq.lift(apply))
    want = run(base, TOKENS)
    np.testing.assert_array_equal(run(jq.attach(base, adapter), TOKENS), want)
    np.testing.assert_array_equal(run(jq.attach(base, adapter, dropout_key=key), TOKENS), want)


def test_factors_are_float32_whatever_the_base(key):
    params = make_params(jnp.bfloat16)
    adapter = jq.init_adapter(key, jq.find_targets(apply, params, TOKENS))
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}


def test_a_starts_as_pefts_and_b_at_zero(key, targets):
    adapter = jq.init_adapter(key, targets, rank=8)
    assert list(adapter) == [DOWN, UP]
    a, b = adapter[UP].a, adapter[UP].b
    assert a.shape == (LAYERS, 8, D) and b.shape == (LAYERS, 2 * D, 8)
    assert not b.any()
    bound = 1 / np.sqrt(D)  # torch's kaiming_uniform_(a=sqrt(5))
    assert 0.9 * bound < float(jnp.abs(a).max()) <= bound
    assert float(jnp.abs(a).mean()) == pytest.approx(bound / 2, rel=0.1)


def test_a_targets_values_depend_on_the_key_and_its_path_alone(key, params, targets):
    one = jq.init_adapter(key, targets.select(["up"]), rank=8)
    both = jq.init_adapter(key, targets, rank=8)
    np.testing.assert_array_equal(one[UP].a, both[UP].a)
    assert not np.array_equal(both[UP].a[0, :, :D], both[DOWN].a[0, :, :D])
    assert not np.array_equal(both[UP].a[0], both[UP].a[1])
    other = jq.init_adapter(jax.random.key(99), targets, rank=8)
    assert not np.array_equal(both[UP].a, other[UP].a)


def test_scaling(key, targets):
    assert jq.init_adapter(key, targets)[UP].scale == 2.0
    assert jq.init_adapter(key, targets, rank=16, alpha=8, rslora=True)[UP].scale == 2.0


def test_patterns_choose_rank_and_alpha_by_the_end_of_the_name(key, targets):
    adapter = jq.init_adapter(
        key,
        targets,
        rank=4,
        alpha=4,
        rank_pattern={"up": 8, "mlp.up": 2, r"mlp\.dow.": 3},
        alpha_pattern={"layers.mlp.down": 6},
        rslora=False,
    )
    assert (adapter[UP].rank, adapter[UP].scale) == (8, 0.5)  # the first pattern wins
    assert (adapter[DOWN].rank, adapter[DOWN].scale) == (3, 2.0)


def test_init_works_on_shapes_and_under_jit(key, params, targets):
    shapes = jax.eval_shape(lambda: params)
    same = jq.find_targets(apply, shapes, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    assert same == targets
    adapter = jax.jit(lambda k: jq.init_adapter(k, same, rank=2))(key)
    assert_trees_close(adapter, jq.init_adapter(key, targets, rank=2), atol=1e-7)
    jax.eval_shape(lambda p: jq.attach(jq.quantize(p, targets), adapter), shapes)


# --- attach, merge, unmerge --------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_merged_parameters_are_the_lifted_model(key, params, targets, quantized):
    base = jq.quantize(params, targets) if quantized else params
    adapter = trained(key, targets)
    lifted = jax.jit(jq.lift(apply))(jq.attach(base, adapter), TOKENS)
    merged = jq.merge(base, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert_trees_close(apply(merged, TOKENS), lifted, atol=2e-5)
    assert_trees_close(jq.merge(jq.attach(base, adapter)), merged)
    far = apply(jq.merge(base), TOKENS)
    assert float(jnp.abs(far - lifted).max()) > 0.1


def test_merge_alone_makes_a_tree_dense(params, targets):
    base = jq.quantize(params, targets)
    dense = jq.merge(base)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    np.testing.assert_array_equal(
        dense["layers"]["mlp"]["up"]["kernel"], jq.dequantize(base["layers"]["mlp"]["up"]["kernel"])
    )
    assert dense["head"]["kernel"] is params["head"]["kernel"]


def test_merge_keeps_the_kernels_dtype_or_takes_one(key):
    params = make_params(jnp.bfloat16)
    targets = jq.find_targets(apply, params, TOKENS)
    base, adapter = jq.quantize(params, targets), trained(key, targets)
    assert jq.merge(base, adapter)["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    exact = jq.merge(base, adapter, dtype=jnp.float32)
    assert exact["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    assert exact["head"]["kernel"].dtype == jnp.bfloat16


def test_unmerge_undoes_merge(key, params, targets):
    adapter = trained(key, targets)
    merged = jq.merge(params, adapter)
    assert_trees_close(jq.unmerge(merged, adapter), params, atol=1e-6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    back = jq.unmerge(jq.merge(half, adapter, dtype=jnp.float32), adapter, dtype=jnp.bfloat16)
    assert_trees_close(back, half, atol=1e-2)


def test_attach_copies_nothing(key, params, targets):
    base = jq.quantize(params, targets)
    tree = jq.attach(base, jq.init_adapter(key, targets))
    assert tree["layers"]["mlp"]["up"]["kernel"].base is base["layers"]["mlp"]["up"]["kernel"]
    assert tree["head"]["kernel"] is base["head"]["kernel"]


def test_gradients_have_the_adapters_structure(key, params, targets):
    base, adapter = jq.quantize(params, targets), trained(key, targets)
    model = jq.lift(apply)
    grads = jax.grad(lambda a: model(jq.attach(base, a), TOKENS).sum())(adapter)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert all(bool(jnp.any(g)) for g in jax.tree.leaves(grads))


# --- dropout -----------------------------------------------------------------------------------


def test_dropout_follows_its_key_and_is_off_without_one(key, params, targets):
    adapter = trained(key, targets, dropout=0.5)
    run = jax.jit(lambda k: jq.lift(apply)(jq.attach(params, adapter, dropout_key=k), TOKENS))
    off = jax.jit(jq.lift(apply))(jq.attach(params, adapter), TOKENS)
    one, other = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert not np.array_equal(one, other) and not np.array_equal(one, off)
    still = trained(key, targets, dropout=0.0)
    on = jq.lift(apply)(jq.attach(params, still, dropout_key=key), TOKENS)
    assert_trees_close(on, jq.lift(apply)(jq.attach(params, still), TOKENS))


def test_remat_recomputes_the_same_mask(key, params, targets):
    adapter = trained(key, targets, dropout=0.5)

    def grads(remat):
        model = jq.lift(remat(apply))
        loss = lambda a: (model(jq.attach(params, a, dropout_key=key), TOKENS) ** 2).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(adapter)

    assert_trees_close(grads(jax.checkpoint), grads(lambda f: f), rtol=1e-4, atol=1e-5)


def test_old_style_keys_work_too(key, params, targets):
    adapter = trained(key, targets, dropout=0.5)
    tree = jq.attach(params, adapter, dropout_key=jax.random.PRNGKey(0))
    assert jq.lift(apply)(tree, TOKENS).shape == (2, 3, VOCAB)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "rank 0 for 'layers/mlp/down/kernel': expected a whole number"),
        (dict(alpha=0), "alpha 0 for 'layers/mlp/down/kernel': expected a positive number"),
        (dict(alpha=float("nan")), "alpha nan for"),
        (dict(dropout=1.0), r"dropout 1\.0: expected a probability in \[0, 1\)"),
        (dict(rank_pattern={"gate": 2}), "rank_pattern 'gate' matches none of the 2 targets"),
        (dict(alpha_pattern={"up_proj": 2}), r"alpha_pattern 'up_proj' .* 'layers\.mlp\.down'"),
    ],
)
def test_settings_out_of_range(key, targets, settings, message):
    with pytest.raises(InputError, match=message):
        jq.init_adapter(key, targets, **settings)


def test_trees_that_do_not_belong_together(key, params, targets):
    adapter = jq.init_adapter(key, targets, rank=2)
    base = jq.quantize(params, targets)
    with pytest.raises(InputError, match="2 of 2 .* paths are not in the parameters"):
        jq.attach({"params": base}, adapter)
    with pytest.raises(InputError, match="not in the parameters: layers/mlp/down/kernel"):
        jq.quantize({"other": params["head"]}, targets)
    wide = jax.tree.map(lambda x: jnp.concatenate([x, x], -1), params)
    with pytest.raises(
        InputError, match=r"is for a kernel of shape \(2, 64, 32\), found \(2, 64, 64"
    ):
        jq.attach(wide, adapter)
    with pytest.raises(InputError, match=f"'{DOWN}' has an adapter attached already"):
        jq.attach(jq.attach(base, adapter), adapter)
    with pytest.raises(InputError, match="is QuantizedArray.*expected a dense kernel to subtract"):
        jq.unmerge(base, adapter)


def test_arguments_in_the_wrong_order(key, params, targets):
    adapter: Any = jq.init_adapter(key, targets, rank=2)
    for bad in (params, {UP: "kernel"}):
        with pytest.raises(InputError, match="no mapping from paths to LoraPair"):
            jq.attach(params, bad)
    with pytest.raises(InputError, match=r"found dict at 'embed'.*in the order \(base, adapter\)"):
        jq.unmerge(adapter, params)


def test_a_base_quantized_along_other_axes(key, params, targets):
    adapter = jq.init_adapter(key, targets, rank=2)
    kernel = jq.quantize_array(params["layers"]["mlp"]["up"]["kernel"], in_axis=-1)
    base = {**params, "layers": {"mlp": {**params["layers"]["mlp"], "up": {"kernel": kernel}}}}
    with pytest.raises(InputError, match=f"'{UP}' is quantized along other axes"):
        jq.attach(base, adapter)
