# SPDX-License-Identifier: Apache-2.0
"""Convolutions with kernels that are quantized and adapted: against NumPy, and dense autodiff."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from jax_qlora.lora.array import dropped
from jax_qlora.lora.targets import Convolution
from tests.helpers import normal
from tests.lift import images
from tests.lift.cases import (
    Case,
    distance,
    mean_square,
    outputs_and_grads,
    random_adapter,
    random_base,
)
from tests.lift.walk import dense_weights, weight_sizes

RANK = 5


@pytest.fixture
def standard_promotion():
    """The libraries mix dtypes themselves."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def case_of(apply, params, args, *, quantized=True, **settings) -> Case:
    targets = jq.find_targets(apply, params, *args, match=".*")
    base = random_base(params, targets) if quantized else params
    return Case(apply, params, args, targets, base, random_adapter(targets, rank=RANK, **settings))


# --- against the definition ----------------------------------------------------------------------


def numpy_conv(
    x: Any, w: Any, *, stride: Any = (1, 1), pad: Any = ((0, 0),) * 2, dilation: Any = (1, 1),
    groups: int = 1,
) -> np.ndarray:  # fmt: skip
    """The definition in float64: x `[batch, in, *image]`, w `[out, in / groups, *window]`."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    x = np.pad(x, ((0, 0), (0, 0), *pad))
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], w.shape[2:], stride, dilation, strict=True)
    ]
    y = np.zeros((x.shape[0], w.shape[0], *sizes))
    outs, ins = w.shape[0] // groups, w.shape[1]
    for o, i, j in itertools.product(range(w.shape[0]), *map(range, sizes)):
        group = o // outs
        patch = x[
            :,
            group * ins : (group + 1) * ins,
            i * stride[0] : i * stride[0] + dilation[0] * (w.shape[2] - 1) + 1 : dilation[0],
            j * stride[1] : j * stride[1] + dilation[1] * (w.shape[3] - 1) + 1 : dilation[1],
        ]
        y[:, o, i, j] = np.einsum("bchw,chw->b", patch, w[o])
    return y


DEFINITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided and padded": dict(stride=(2, 1), pad=((1, 0), (2, 1))),
    "dilated": dict(dilation=(2, 1)),
    "in groups": dict(groups=2, stride=(1, 2)),
    "depthwise": dict(groups=4),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("order", ["OIHW", "HWIO"])
def test_the_update_is_a_convolution_to_rank_channels_and_one_of_a_pixel(name, order):
    settings = DEFINITIONS[name]
    groups = settings.get("groups", 1)
    x, w = normal((2, 4, 6, 5), 1), normal((8, 4 // groups, 3, 2), 2) / 5
    turned = [order.index(axis) for axis in "OIHW"]  # from the kernel's order to torch's

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            settings.get("stride", (1, 1)),
            settings.get("pad", "VALID"),
            rhs_dilation=settings.get("dilation"),
            dimension_numbers=("NCHW", order, "NCHW"),
            feature_group_count=groups,
        )

    params = {"w": jnp.transpose(w, np.argsort(turned).tolist())}
    targets = jq.find_targets(apply, params, x, match=["w"])
    found = targets["w"]
    assert found.kind == "conv" and found.layout.rows == 8
    assert found.conv == Convolution(
        dims=tuple((order.index(axis) - 4,) for axis in "IHW"),
        groups=groups,
        dilated=name == "dilated",
    )
    adapter = random_adapter(targets, rank=3)
    pair = adapter["w"]
    base = jq.quantize(params, targets)
    got = jax.jit(jq.lift(apply))(jq.attach(base, adapter), x)

    sizes = [w.shape[1:][["I", "H", "W"].index(axis)] for axis in order if axis != "O"]
    ins = [axis for axis in order if axis != "O"]
    a = np.asarray(pair.a).reshape(3, *sizes)
    a = a.transpose(0, *(1 + ins.index(axis) for axis in "IHW"))
    # the groups share `a`
    h = numpy_conv(x, np.concatenate([a] * groups), **settings)
    update = numpy_conv(h, np.asarray(pair.b)[:, :, None, None], groups=groups)
    dense = np.asarray(jq.dequantize(base["w"])).transpose(turned)
    want = numpy_conv(x, dense, **settings) + pair.scale * update
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    merged = np.asarray(jq.merge(base, adapter)["w"]).transpose(turned)
    want = numpy_conv(x, merged, **settings)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


# --- every library's convolutions ----------------------------------------------------------------

CONVS = {  # contracted axes of each convolution's kernel, in the order of paths
    "nnx_net": [(-4, -3, -2)] * 3,
    "linen_net": [(-3, -2)] * 4,
    "eqx_net": [(-3, -2, -1)] * 3,
    "haiku_net": [(-4, -3, -2)] * 3,
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", images.MODELS)
def test_lifted_equals_dense_forward_and_backward(name):
    case = case_of(*images.MODELS[name]())
    convs = [t for t in case.targets.values() if t.kind == "conv"]
    assert [t.layout.in_axes for t in convs] == CONVS[name]
    (x,) = case.args

    def outputs_and_grads(f):
        def loss(adapter, x):
            out = f(adapter, None, x)
            return mean_square(out), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(case.adapter, x)
        return out, grads

    out, grads = outputs_and_grads(case.lifted)
    want, want_grads = outputs_and_grads(case.dense)
    assert distance(out, want) < 2e-6
    assert distance(grads, want_grads) < 1e-5
    assert all(np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", images.MODELS)
def test_no_dense_weight_is_made(name, quantized):
    case = case_of(*images.MODELS[name](), quantized=quantized)
    sizes = weight_sizes(case.targets)
    for x in case.args:
        loss = lambda adapter, x: mean_square(case.lifted(adapter, None, x))  # noqa: E731
        found = dense_weights(jax.grad(loss, (0, 1)), case.adapter, x, sizes=sizes)
        # a dense base is used as the model has it: a gradient's convolution turns it round
        turned = () if quantized else ("rev", "transpose", "reshape")
        found = [f for f in found if not f.startswith(turned)]
        assert found == []
        assert dense_weights(case.dense, case.adapter, None, x, sizes=sizes)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["nnx_net", "eqx_net"])
def test_bfloat16(name):
    case = case_of(*images.MODELS[name](jnp.bfloat16))

    out, grads = outputs_and_grads(case.lifted, case.adapter)
    want, want_grads = outputs_and_grads(case.dense, case.adapter)
    assert out.dtype == want.dtype == jnp.bfloat16
    assert distance(out, want) < 4e-2 and distance(grads, want_grads) < 8e-2
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


# --- transforms, dropout, merging ----------------------------------------------------------------


def apply(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(x)


PARAMS = {"w": normal((3, 16, 24), 1) / 7}
X = normal((4, 9, 16), 2)
TARGETS = jq.find_targets(apply, PARAMS, X, match=["w"])
BASE = jq.quantize(PARAMS, TARGETS)


def lifted(adapter, x=X, **options):
    return jq.lift(apply)(jq.attach(BASE, adapter, **options), x)


def test_vmap_over_adapters_and_examples_and_remat():
    adapters = [random_adapter(TARGETS, seed=i) for i in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def loss(adapter, x):
        return mean_square(lifted(adapter, x))

    want = jax.grad(lambda adapter, x: mean_square(apply(jq.merge(BASE, adapter), x)))
    got = jax.jit(jax.vmap(jax.grad(loss), (0, 0)))(stacked, jnp.stack([X, 2 * X]))
    for i, adapter in enumerate(adapters):
        one = jax.tree.map(lambda g, i=i: g[i], got)
        assert distance(one, want(adapter, (1 + i) * X)) < 1e-5


def test_a_fresh_adapter_changes_nothing_to_the_bit():
    fresh = jq.init_adapter(jax.random.key(0), TARGETS, rank=4)
    bound = 1 / np.sqrt(3 * 16)  # PEFT's: uniform by the fan-in of the window
    assert 0.9 * bound < np.abs(fresh["w"].a).max() <= bound
    for base in (BASE, PARAMS):
        got = jax.jit(lambda base, adapter: jq.lift(apply)(jq.attach(base, adapter), X))
        want = jax.jit(lambda base: jq.lift(apply)(base, X))(base)
        np.testing.assert_array_equal(got(base, fresh), want)


def test_dropout_acts_on_the_input_of_the_update():
    adapter = random_adapter(TARGETS, dropout=0.5)
    tree = jq.attach(BASE, adapter, dropout_key=jax.random.key(1))
    got = jq.lift(lambda p, x: jnp.arctanh(apply(p, x)))(tree, X / 10)
    dense, pair = jq.dequantize(BASE["w"]), adapter["w"]
    x = dropped(X / 10, 0.5, tree["w"].dropout_key)
    assert 0.3 < np.mean(np.asarray(x) == 0) < 0.7
    linear = lambda w, x: jnp.arctanh(apply({"w": w}, x))  # noqa: E731
    np.testing.assert_allclose(got, linear(dense, X / 10) + linear(pair.delta(), x), atol=1e-5)


def test_merging_is_undone_and_weights_give_an_initialization():
    adapter = random_adapter(TARGETS)
    merged = jq.merge(PARAMS, adapter)
    assert distance(apply(merged, X), jq.lift(apply)(jq.attach(PARAMS, adapter), X)) < 2e-6
    assert distance(jq.unmerge(merged, adapter), PARAMS) < 1e-6
    fresh = jq.init_adapter(jax.random.key(0), TARGETS, rank=4)
    base, split = jq.init_from_weights(PARAMS, fresh, "pissa")
    assert distance(jq.merge(base, split), PARAMS) < 1e-6


# --- kernels that are no kernels as they are held ------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        # the weight is what is convolved, not what it is convolved with
        lambda w, x: jax.lax.conv_general_dilated(
            jnp.swapaxes(w, 1, 2),
            jnp.swapaxes(x, 1, 2),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        ),
        # turned round
        lambda w, x: apply({"w": w[::-1]}, x),
        # each image with a kernel of its own rows
        lambda w, x: jax.lax.conv_general_dilated(
            jnp.concatenate([x, x]), w, (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=8,
        ),
    ],
)  # fmt: skip
def test_other_convolutions_need_permission(f):
    q = BASE["w"]
    with pytest.raises(InputError, match="'0' is quantized or adapted and reaches"):
        jq.lift(f)(q, X)
    got = jq.lift(f, materialize="allow")(q, X)
    np.testing.assert_allclose(got, f(jq.dequantize(q), X), atol=1e-5)
