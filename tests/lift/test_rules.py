# SPDX-License-Identifier: Apache-2.0
"""What happens to a weight in a function: rules, permissions, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from tests.helpers import normal
from tests.lift.cases import distance, mean_square, random_adapter
from tests.lift.walk import dense_weights, weight_sizes

W = normal((64, 16), 1) / 8
X = normal((5, 64), 2)
Q = jq.quantize_array(W)
DENSE = jq.dequantize(Q)


def run(f, w: Any = Q, x=X):
    return jq.lift(f)({"w": w}, x)


# --- the weight passes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        lambda p, x: x @ p["w"],
        lambda p, x: x[0] @ p["w"],
        lambda p, x: jnp.matmul(x, p["w"], precision="highest"),
        lambda p, x: (p["w"].T @ x.T).T,
        lambda p, x: jnp.einsum("io,bi->bo", p["w"], x),
        lambda p, x: jnp.einsum("io,bi->ob", p["w"], x),
        lambda p, x: (x @ p["w"]) @ p["w"].T,
        lambda p, x: x @ p["w"].reshape(8, 8, 16).reshape(64, 16),
        lambda p, x: x.reshape(5, 8, 8).reshape(5, 64) @ p["w"].reshape(1, 64, 16)[0],
        lambda p, x: jnp.tensordot(x.reshape(5, 8, 8), p["w"].reshape(8, 8, 16), 2),
        lambda p, x: x @ p["w"].astype(jnp.float32),
        lambda p, x: x @ p["w"][:],
        lambda p, x: x @ jnp.swapaxes(jnp.swapaxes(p["w"], 0, 1), 0, 1),
        lambda p, x: x @ jax.lax.stop_gradient(p["w"]),
        lambda p, x: x @ jax.lax.optimization_barrier((p["w"], x))[0],
        lambda p, x: jnp.broadcast_to((x @ p["w"])[None], (2, 5, 16)),
        lambda p, x: jax.vmap(lambda r: r @ p["w"])(x),
        lambda p, x: jax.lax.map(lambda r: r @ p["w"], x),
        lambda p, x: jax.lax.dot_general(x, p["w"], (((1,), (0,)), ((), ()))),
        lambda p, x: jnp.take(p["w"].T, jnp.array([3, 0, -1]), axis=0),
        lambda p, x: p["w"][:, jnp.array([3, 0, 15])],
        lambda p, x: p["w"].T[jnp.argmax(x[0, :16])],
        lambda p, x: jax.vmap(lambda i: p["w"].T[i])(jnp.arange(3)),
        lambda p, x: jnp.take(p["w"], jnp.array([[3, 200]]), axis=1, mode="fill", fill_value=7),
        lambda p, x: jnp.take(p["w"].T, jnp.array([3, 200], jnp.uint8), axis=0, mode="clip"),
    ],
)
def test_equals_the_function_on_the_dense_weight(f):
    pair = jq.LoraPair(
        a=normal((3, 64), 3) / 8, b=normal((16, 3), 4) / 4, layout=Q.layout, scale=0.5, dropout=0.0
    )
    adapted = jq.LoraArray(base=Q, pair=pair, dropout_key=None)
    for weight, dense in ((Q, DENSE), (adapted, DENSE + pair.delta())):
        got, want = run(f, weight), f({"w": dense}, X)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert distance(got, want) < 2e-6


def test_sharding_constraints_on_a_weight_are_let_pass():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    f = jax.jit(lambda p, x: x @ jax.lax.with_sharding_constraint(p["w"], rows))
    assert distance(run(f), X @ DENSE) < 2e-6


def test_stop_gradient_stops_the_updates_gradient():
    targets = jq.find_targets(lambda p, x: x @ p["w"], {"w": W}, X)
    adapter = random_adapter(targets)

    def loss(f):
        return jax.grad(lambda a: mean_square(jq.lift(f)(jq.attach({"w": W}, a), X)))(adapter)

    assert not any(
        g.any() for g in jax.tree.leaves(loss(lambda p, x: x @ jax.lax.stop_gradient(p["w"])))
    )
    assert all(g.any() for g in jax.tree.leaves(loss(lambda p, x: x @ p["w"])))


def test_untouched_weights_come_out_as_they_went_in():
    out, y = jq.lift(lambda p, x: (p, x @ p["w"]))({"w": Q}, X)
    assert out["w"] is Q and y.shape == (5, 16)
    same = jq.lift(lambda p, x: (p["w"].T.T, x))({"w": Q}, X)[0]
    assert same is Q


def test_weights_returned_by_loops_and_branches_are_virtual():
    """Flax's lifted transforms return the parameters they were given."""

    def f(p, x):
        def body(x, w):
            return x @ w["a"] @ w["b"], w

        x, same = jax.lax.scan(body, x, p)
        p, x = jax.checkpoint(lambda p, x: (p, x @ p["a"][0]))(same, x)
        p, x = jax.lax.cond(x.sum() > 0, lambda p, x: (p, x), lambda p, x: (p, 2 * x), p, x)
        return x @ p["b"][1]

    a, b = normal((2, 64, 16), 3) / 8, normal((2, 16, 64), 4) / 4
    tree = {"a": jq.quantize_array(a), "b": jq.quantize_array(b)}
    assert distance(jax.jit(jq.lift(f))(tree, X), f(jq.merge(tree), X)) < 2e-6


def test_arguments_of_any_kind():
    def f(params, x, *, train, scale, name=None):
        y = x @ params["w"]
        return {"y": y * scale if train else y, "name": name, "n": 3, "f": jax.nn.relu}

    out = jq.lift(f)({"w": Q}, X, train=True, scale=2.0, name="layer")
    assert out["name"] == "layer" and out["n"] == 3 and out["f"] is jax.nn.relu
    assert distance(out["y"], 2 * (X @ DENSE)) < 2e-6
    jitted = jax.jit(
        lambda p, x, train: jq.lift(f)(p, x, train=train, scale=1.0)["y"], static_argnums=2
    )
    assert jitted({"w": Q}, np.asarray(X), False).shape == (5, 16)


def test_weights_in_several_arguments_and_closed_over_arrays():
    shift = normal((16,), 5)
    f = lambda a, *, b: X @ a + (X @ b["k"] + shift[None])  # noqa: E731
    got = jq.lift(f)(Q, b={"k": Q})
    assert distance(got, 2 * (X @ DENSE) + shift[None]) < 2e-6


def test_lift_keeps_the_functions_name():
    def forward(params, x):
        """Says what it does."""
        return x @ params

    lifted = jq.lift(forward)
    assert (lifted.__name__, lifted.__doc__) == ("forward", "Says what it does.")


# --- a weight must be dense ----------------------------------------------------------------------


def convolve(p, x):
    """The kernel of a convolution, whose size is also a penalty."""
    kernel = p["conv"]["kernel"].astype(x.dtype)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jax.nn.relu(y) @ p["out"] + jnp.abs(kernel).mean()


CONV = {"conv": {"kernel": normal((3, 32, 16), 1) / 10}, "out": normal((16, 8), 2) / 4}
SIGNAL = normal((2, 7, 32), 3)


@pytest.fixture(scope="module")
def conv():
    targets = jq.find_targets(convolve, CONV, SIGNAL, match=["conv", "out"])
    assert targets["conv/kernel"].kind == "conv"
    assert targets["conv/kernel"].layout.in_axes == (-3, -2)
    assert list(jq.find_targets(convolve, CONV, SIGNAL)) == ["out"]
    return targets, jq.quantize(CONV, targets), random_adapter(targets)


def test_a_weight_used_otherwise_needs_permission(conv):
    _, base, adapter = conv
    for tree in (base, jq.attach(CONV, adapter), jq.attach(base, adapter)):
        with pytest.raises(InputError, match="'conv/kernel' .* reaches 'abs'"):
            jq.lift(convolve)(tree, SIGNAL)
        with pytest.raises(InputError, match=r"lift\(f, materialize=\['conv/kernel'\]\)"):
            jq.lift(convolve, materialize=["out"])(tree, SIGNAL)


@pytest.mark.parametrize("permission", ["allow", ["conv"], ["conv/kernel"], [r"conv/.*"]])
def test_a_weight_with_permission(conv, permission):
    targets, base, adapter = conv
    model = jq.lift(convolve, materialize=permission)

    def loss(adapter):
        return mean_square(model(jq.attach(base, adapter), SIGNAL))

    if permission != "allow":
        assert (
            distance(loss(adapter), mean_square(convolve(jq.merge(base, adapter), SIGNAL))) < 1e-6
        )
        return
    grads = jax.jit(jax.grad(loss))(adapter)
    want = jax.grad(lambda a: mean_square(convolve(jq.merge(base, a), SIGNAL)))(adapter)
    assert distance(grads, want) < 1e-5
    found = dense_weights(jax.grad(loss), adapter, sizes=weight_sizes(targets))
    assert any(x.startswith("abs") for x in found)


@pytest.mark.parametrize(
    ("f", "use"),
    [
        (lambda p, x: x @ (2 * p["w"]), "mul"),
        (lambda p, x: (p["w"] ** 2).sum() + x.sum(), "integer_pow"),
        (lambda p, x: x[:, :32] @ p["w"][:32], "slice"),
        (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1), "concatenate"),
        (lambda p, x: x[:, :16] @ p["w"].reshape(16, 64), "dot_general"),
        (lambda p, x: p["w"].T @ p["w"], "dot_general"),
        (
            lambda p, x: jnp.einsum("bio,bi->bo", jnp.broadcast_to(p["w"], (5, 64, 16)), x),
            "broadcast",
        ),
        (lambda p, x: p["w"][jnp.array([1, 2])], "gather"),
        (lambda p, x: p["w"].astype(jnp.int32), "convert_element_type"),
        (lambda p, x: p["w"].T, "the function's output"),
    ],
)
def test_anything_else_is_refused_by_name_and_right_with_permission(f, use):
    with pytest.raises(InputError, match=f"'w' is quantized or adapted and reaches '{use}"):
        run(f)
    got = jq.lift(f, materialize="allow")({"w": Q}, X)
    np.testing.assert_allclose(got, f({"w": DENSE}, X), atol=1e-5)


def test_a_permission_that_is_no_list():
    with pytest.raises(InputError, match=r"materialize='conv'.*pass \['conv'\]"):
        jq.lift(convolve, materialize="conv")
    with pytest.raises(InputError, match=r"'con\(v' is no regular expression"):
        jq.lift(convolve, materialize=["con(v"])


# --- weights and control flow --------------------------------------------------------------------

SQUARE, OTHER = (jq.quantize_array(normal((64, 64), seed) / 8) for seed in (6, 7))


def test_a_weight_changed_in_a_branch_or_chosen_there():
    def chosen(p, x):
        w = jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["v"])
        return x @ w

    with pytest.raises(
        InputError, match="'[vw]' is chosen or changed by a conditional.*'dot_general'"
    ):
        jq.lift(chosen)({"w": SQUARE, "v": OTHER}, X)

    def mixed(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: jnp.zeros((64, 64)))

    with pytest.raises(InputError, match="'w' comes out of one branch .* an array out of another"):
        jq.lift(mixed)({"w": SQUARE}, X)

    def unused(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: (p["w"], x), lambda: (p["v"], 2 * x))[1]

    assert jq.lift(unused)({"w": SQUARE, "v": OTHER}, X).shape == X.shape


def test_a_weight_changed_in_the_carry_of_a_loop():
    def swap(p, x):
        def body(carry, _):
            a, b, x = carry
            return (b, a, x @ a), None

        return jax.lax.scan(body, (p["w"], p["v"], x), None, length=3)[0][2]

    with pytest.raises(InputError, match="'w' is changed by a loop that carries it"):
        jq.lift(swap)({"w": SQUARE, "v": OTHER}, X)

    def decay(p, x):
        return jax.lax.while_loop(lambda s: s[1].sum() < 0, lambda s: (s[0] * 2, s[1]), (p["w"], x))

    with pytest.raises(InputError, match="'w' is changed by a loop that carries it"):
        jq.lift(decay, materialize="allow")({"w": SQUARE}, X)


def test_a_weight_scanned_over_what_is_contracted_or_returned_changed():
    with pytest.raises(InputError, match="'w' is scanned over an axis that is contracted"):
        run(lambda p, x: jax.lax.scan(lambda c, r: (c, r.sum()), 0.0, p["w"])[1])

    def stacked(p, x):
        return x @ jax.lax.scan(lambda c, _: (c, p["w"]), 0.0, None, length=2)[1][0]

    with pytest.raises(InputError, match="'w' is stacked by a scan"):
        run(stacked)

    def turned(p, x):
        x, ws = jax.lax.scan(lambda x, w: (x @ w, w.T), x, p["w"])
        return x @ ws[0]

    with pytest.raises(InputError, match="'w' is changed inside a scan"):
        run(turned, jq.quantize_array(normal((2, 64, 64), 3) / 8))


def test_layers_may_be_taken_from_a_stack_in_every_way():
    w = normal((3, 64, 64), 3) / 8
    q = jq.quantize_array(w)
    ways = [
        lambda p, x: x @ p["w"][1],
        lambda p, x: x @ p["w"][-2],
        lambda p, x: x @ p["w"][x.argmax() % 3],
        lambda p, x: x @ jax.lax.index_in_dim(p["w"], 1, keepdims=False),
        lambda p, x: x @ jax.lax.dynamic_index_in_dim(p["w"], 1, keepdims=False),
        lambda p, x: functools.reduce(lambda x, w: x @ w, p["w"], x),
        lambda p, x: jnp.einsum("bd,bdf->bf", x, p["w"][jnp.array([0, 2, 1, 1, 0])]),
        lambda p, x: jnp.einsum(
            "bd,bkdf->bkf", x, jnp.take(p["w"], jnp.zeros((5, 2), int), axis=0)
        ),
        lambda p, x: jax.vmap(lambda r, i: r @ p["w"][i])(x, jnp.array([0, 2, 1, 1, 0])),
        lambda p, x: jnp.einsum("bd,ldf->blf", x, p["w"][::1]),  # every expert sees every row
    ]
    for i, f in enumerate(ways):
        got, want = jq.lift(f)({"w": q}, X), f({"w": jq.dequantize(q)}, X)
        assert got.shape == want.shape and distance(got, want) < 2e-6, i
        assert jq.find_targets(f, {"w": w}, X)["w"].layout.in_axes == (-2,), i


def test_custom_rules_of_functions_without_weights_are_kept():
    @jax.custom_vjp
    def clip_gradient(x):
        return x

    clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))
    f = lambda p, x: (clip_gradient(x) @ p["w"]).sum()  # noqa: E731
    grads = jax.grad(lambda x: jq.lift(f)({"w": Q}, x))(X)
    assert jnp.abs(grads).max() <= jnp.float32(1e-3)


def test_dropout_masks_differ_by_layer_and_follow_the_key():
    f = lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1]  # noqa: E731
    w = jnp.zeros((2, 64, 16))
    targets = jq.find_targets(f, {"w": w}, X)
    adapter = random_adapter(targets, dropout=0.5)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), adapter)
    on = jax.jit(lambda k: jq.lift(f)(jq.attach({"w": w}, same, dropout_key=k), X))
    one = on(jax.random.key(0))
    assert not np.array_equal(one[0], one[1])
    np.testing.assert_array_equal(one, on(jax.random.key(0)))
    off = jq.lift(f)(jq.attach({"w": w}, same), X)
    np.testing.assert_array_equal(off[0], off[1])
