# SPDX-License-Identifier: Apache-2.0
"""Updates of some parts of a fused kernel: the dense formula, the rows that stay, and the names."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_qlora as jq
from jax_qlora import InputError, LoraArray, LoraPair, Target
from jax_qlora.lora.array import lookup, lora_matmul
from jax_qlora.lora.targets import name_parts, select_targets
from jax_qlora.optim import adamw
from jax_qlora.quant.layout import make_layout
from tests.helpers import assert_trees_close, normal

D, LAYERS, RANK = 32, 2, 3
WIDTHS = {"q": 24, "k": 8, "v": 16}
Q, K, V = (0, 24), (24, 32), (32, 48)
PATH = "layers/c_attn/kernel"


def pair(parts, lead=(), rows=48, cols=D, scale=0.5, dropout=0.0):
    height = sum(stop - start for start, stop in parts)
    layout = make_layout((*lead, cols, rows), -2)
    return LoraPair(
        a=normal((*lead, len(parts) * RANK, cols), 1),
        b=normal((*lead, height, RANK), 2),
        layout=layout,
        scale=scale,
        dropout=dropout,
        parts=tuple(parts),
    )


def dense_delta(p, parts):
    """The formula of the paper, part by part; no other row changes."""
    delta = jnp.zeros((*p.a.shape[:-2], p.layout.rows, p.layout.cols))
    end = 0
    for i, (start, stop) in enumerate(parts):
        a = p.a[..., i * RANK : (i + 1) * RANK, :]
        b = p.b[..., end : end + stop - start, :]
        delta = delta.at[..., start:stop, :].set(p.scale * jnp.matmul(b, a))
        end += stop - start
    return delta


CHOICES = [(Q, V), (K,), (Q, K, V), ((8, 12), (30, 31))]


@pytest.mark.parametrize("parts", CHOICES)
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("transpose", [False, True])
def test_value_and_gradients_are_those_of_the_dense_formula(parts, lead, transpose):
    p = pair(parts, lead)
    x = normal((*lead, 5, 48 if transpose else D), 3)
    g = normal((*lead, 5, D if transpose else 48), 4)

    def dense(x, p):
        delta = dense_delta(p, parts)
        return jnp.matmul(x, delta if transpose else jnp.swapaxes(delta, -1, -2))

    def value_and_grads(f):
        y, vjp = jax.vjp(f, x, p)
        return y, *jax.tree.leaves(vjp(g))

    got = value_and_grads(lambda x, p: lora_matmul(x, p, transpose=transpose))
    want = value_and_grads(dense)
    for name, a, b in zip(("y", "dx", "da", "db"), got, want, strict=True):
        assert a.shape == b.shape, name
        assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b), name
    np.testing.assert_allclose(p.delta_rows(), dense_delta(p, parts), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_operands_keep_float32_gradients(dtype):
    p, x = pair((Q, V)), normal((5, D), 3)
    f = lambda x, p: jnp.sum(jnp.sin(lora_matmul(x, p).astype(jnp.float32)))  # noqa: E731
    wide, half = (jax.grad(f, 1)(x.astype(kind), p) for kind in (jnp.float32, dtype))
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(wide), strict=True):
        assert a.dtype == jnp.float32 and jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def test_as_a_whole_it_is_the_same_update():
    p = pair((Q, V), (2,))
    whole = p.whole()
    assert (whole.parts, whole.rank, whole.a.shape, whole.b.shape) == (
        (), 2 * RANK, (2, 2 * RANK, D), (2, 48, 2 * RANK),
    )  # fmt: skip
    np.testing.assert_array_equal(whole.delta(), p.delta())
    assert whole.whole() is whole
    assert repr(p) == "LoraPair(rank 3 of (2, 32, 48), rows 0:24, rows 32:48, scale 0.5)"


def test_looking_up_rows():
    layout = make_layout((48, D), -1)
    p = dataclasses.replace(pair((Q, V)), layout=layout)
    leaf = LoraArray(base=normal((48, D), 5), pair=p, dropout_key=None)
    ids = jnp.array([3, 25, 40])
    got = lookup(leaf, ids, jnp.float32)
    np.testing.assert_allclose(got, (leaf.base + dense_delta(p, (Q, V)))[ids], atol=1e-5)


# --- in a model ---------------------------------------------------------------------------------


def apply(params, x):
    """Two scanned layers of a toy attention: queries times keys gate the values."""

    def layer(x, p):
        q, k, v = jnp.split(x @ p["c_attn"]["kernel"], [24, 32], axis=-1)
        gate = jax.nn.sigmoid(q.sum(-1, keepdims=True) * k.sum(-1, keepdims=True) / 16)
        return x + (gate * v) @ p["c_proj"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.tanh(x)


PARAMS = {
    "layers": {
        "c_attn": {"kernel": normal((LAYERS, D, 48), 1) / 6},
        "c_proj": {"kernel": normal((LAYERS, 16, D), 2) / 4},
    }
}
X = normal((4, D), 3)


def find(match: Any = ("c_attn[q,v]",)) -> jq.Targets:
    return jq.find_targets(apply, PARAMS, X, match=match, parts={"c_attn": WIDTHS})


def trained(key: jax.Array, targets: jq.Targets, **settings: Any) -> dict[str, LoraPair]:
    adapter = jq.init_adapter(key, targets, rank=RANK, alpha=6, **settings)
    return jax.tree.map(lambda x: normal(x.shape, x.size) / 8, adapter)


@pytest.mark.parametrize("quantized", [False, True])
def test_fresh_is_the_base_and_merged_is_lifted(key, quantized):
    targets = find(["c_attn[v, q]", "c_proj"])
    base = jq.quantize(PARAMS, targets, block_size=32) if quantized else PARAMS
    fresh = jq.init_adapter(key, targets, rank=RANK, dropout=0.1)
    run = jax.jit(jq.lift(apply))
    np.testing.assert_array_equal(run(jq.attach(base, fresh), X), run(base, X))
    adapter = trained(key, targets)
    assert adapter[PATH].a.shape == (LAYERS, 2 * RANK, D)
    assert adapter[PATH].b.shape == (LAYERS, 40, RANK) and adapter[PATH].parts == (Q, V)
    merged = jq.merge(base, adapter)
    assert_trees_close(apply(merged, X), run(jq.attach(base, adapter), X), atol=2e-5)
    kernels = (jq.merge(base), merged)
    before, after = (tree["layers"]["c_attn"]["kernel"] for tree in kernels)
    np.testing.assert_array_equal(before[..., slice(*K)], after[..., slice(*K)])
    assert jnp.all(jnp.any(before != after, axis=(0, 1)) == (jnp.arange(48) // 8 != 3))
    if not quantized:
        assert_trees_close(jq.unmerge(merged, adapter), base, atol=1e-6)


def test_parts_that_were_not_chosen_do_not_move_in_training(key):
    """With decay; unlike those of the block-diagonal pair."""
    targets = find()
    base = jq.quantize(PARAMS, targets, block_size=32)
    model = jq.lift(apply)
    optimizer = adamw(1e-2, weight_decay=0.1)

    @jax.numpy_dtype_promotion("standard")  # as optax needs
    @jax.jit
    def step(adapter: Any, state: Any) -> Any:
        grads = jax.grad(lambda a: jnp.sum(model(jq.attach(base, a), X) ** 2))(adapter)
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    def steps(adapter: Any) -> Any:
        state = optimizer.init(adapter)
        for _ in range(3):
            adapter, state = step(adapter, state)
        return adapter

    adapter = trained(key, targets)
    moved = steps(adapter)[PATH]
    assert not moved.delta()[..., slice(*K)].any()
    assert float(jnp.abs(moved.delta() - adapter[PATH].delta()).max()) > 1e-3
    whole = steps({PATH: adapter[PATH].whole()})[PATH]
    assert whole.delta()[..., slice(*K)].any()  # so the parts are what keeps them still


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_is_that_of_the_whole_pair(key, remat):
    """Values and gradients, under scan, jit and remat."""
    adapter = trained(key, find(), dropout=0.5)
    model = jq.lift(jax.checkpoint(apply) if remat else apply)

    @jax.jit
    def value_and_grad(adapter, dropout_key):
        def loss(adapter):
            return jnp.sum(jnp.sin(model(jq.attach(PARAMS, adapter, dropout_key=dropout_key), X)))

        return jax.value_and_grad(loss)(adapter)

    value, grads = value_and_grad(adapter, key)
    want, whole = value_and_grad({PATH: adapter[PATH].whole()}, key)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grads[PATH].a, whole[PATH].a, atol=1e-5)
    np.testing.assert_allclose(grads[PATH].b[:, :24], whole[PATH].b[:, :24, :RANK], atol=1e-5)
    np.testing.assert_allclose(grads[PATH].b[:, 24:], whole[PATH].b[:, 32:, RANK:], atol=1e-5)
    assert abs(value - value_and_grad(adapter, None)[0]) > 1e-3


def test_stacks_of_adapters_of_different_parts(key):
    """Each row with its own; what an adapter lacks stays zero in training."""
    adapters = [
        trained(key, find()),
        trained(key, find(["c_attn[k]"]), rank_pattern={"c_attn": 2}),
        trained(key, find(["c_attn[v]", "c_proj"])),
    ]
    stacked = jq.stack_adapters(adapters)
    assert stacked[PATH].parts == (Q, K, V) and stacked[PATH].a.shape == (3, LAYERS, 9, D)
    for number, adapter in enumerate(adapters):
        chosen = jq.select_adapter(stacked, number)[PATH]
        np.testing.assert_allclose(chosen.delta(), adapter[PATH].delta(), atol=1e-6)
    model, index = jq.over_rows(jq.lift(apply)), jnp.array([2, 0, -1, 1], jnp.int32)

    def run(stacked):
        return model(jq.attach_many(PARAMS, stacked, index), X)

    got, grads = jax.jit(run)(stacked), jax.jit(jax.grad(lambda s: jnp.sum(run(s) ** 2)))(stacked)
    for row, number in enumerate(index.tolist()):
        tree = jq.attach(PARAMS, adapters[number]) if number >= 0 else PARAMS
        np.testing.assert_allclose(got[row], jq.lift(apply)(tree, X)[row], atol=1e-5)
    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, stacked, grads)
    assert not jq.select_adapter(stepped, 1)[PATH].delta()[..., :24].any()
    assert not jq.select_adapter(stepped, 2)[PATH].delta()[..., :32].any()
    with pytest.raises(InputError, match=r"adapted in rows 0:24 and 0:48 .* do not overlap"):
        jq.stack_adapters([{PATH: adapters[0][PATH]}, trained(key, find(["c_attn"]))])


def test_combinations_are_of_the_whole_updates(key):
    one, two = trained(key, find()), trained(key, find(["c_attn[k]"]))
    mixed = jq.combine_adapters([one, two], [0.5, 2.0], method="cat")[PATH]
    want = 0.5 * one[PATH].delta() + 2.0 * two[PATH].delta()
    np.testing.assert_allclose(mixed.delta(), want, atol=1e-5)
    assert mixed.parts == () and mixed.rank == 3 * RANK


def test_several_output_axes_count_as_one(key):
    """A kernel [d, 3, heads, head_dim], contracted by an einsum."""
    params = {"qkv": normal((D, 3, 2, 8), 1)}

    def f(params, x):
        return jnp.sin(jnp.einsum("bd,dnhk->bnhk", x, params["qkv"]))

    parts = {"qkv": {"q": 16, "k": 16, "v": 16}}
    targets = jq.find_targets(f, params, X, match=["qkv[k]"], parts=parts)
    adapter = trained(key, targets)
    moved = jq.lift(f)(jq.attach(params, adapter), X) != f(params, X)
    assert moved[:, 1].all() and not moved[:, 0].any() and not moved[:, 2].any()


def test_the_table_and_the_summary_say_parts(key):
    targets = find()
    assert repr(targets).splitlines()[2].split("  ")[-2:] == ["linear of q, k, v", "q, v"]
    line = next(x for x in jq.summary(PARAMS, trained(key, targets)).splitlines() if PATH in x)
    assert "3 x 2 parts" in line and f"{LAYERS * RANK * (2 * D + 40):,}" in line


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (["c_attn[q,x]"], r"has no part 'x'; expected some of q, k, v, e.g. 'c_attn\[q,k\]'"),
        (["c_attn[]"], "has no part ''; expected some of q, k, v"),
        (["c_proj[q]"], r"'layers/c_proj/kernel' has no part 'q'; its parts have no names"),
        (["c_atn[q]"], r"target 'c_atn\[q\]' matches no kernel"),
        (["c_attn", "c_attn[q]"], "as a whole and some of its parts: expected one or the other"),
    ],
)
def test_parts_that_are_not_there(match, message):
    with pytest.raises(InputError, match=message):
        find(match)


def test_parts_of_several_entries_are_joined():
    (target,) = find(["c_attn[v]", "layers.c_attn[q]"]).values()
    assert target.chosen == ("q", "v") and target.chosen_rows == (Q, V)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"c_attn": {"q": 24, "k": 16}}, "expected the number of outputs of each, in all the 48"),
        ({"c_attn": {"q": 49, "k": -1}}, "expected the number of outputs of each"),
        ({"attention": WIDTHS}, "target 'attention' matches no kernel of the model: its parts"),
    ],
)
def test_parts_must_be_all_outputs_of_a_kernel(parts, message):
    with pytest.raises(InputError, match=message):
        jq.find_targets(apply, PARAMS, X, parts=parts)


def test_another_name_of_a_target_counts():
    layout = make_layout((2, 8, 4), -2)
    found = Target(
        path="layers/qkv_proj/kernel",
        shape=(2, 8, 4),
        dtype="float32",
        layout=layout,
        alias="transformer.h.attn.c_attn.weight",
    )
    named = name_parts((found,), {"attn.c_attn": {"q": 3, "v": 1}})
    for match in (["c_attn[v]"], ["qkv_proj[v]"]):
        (target,) = select_targets(named, match).values()
        assert target.chosen_rows == ((3, 4),)
    assert list(select_targets(named, r".*c_attn")) == ["layers/qkv_proj/kernel"]
    adapter = jq.init_adapter(
        jax.random.key(0), select_targets(named, "all-linear"), rank_pattern={"c_attn": 2}
    )
    assert adapter["layers/qkv_proj/kernel"].rank == 2


@pytest.mark.parametrize("what", ["pissa", "DoRA"])
def test_what_takes_whole_kernels_alone(key, what):
    adapter = trained(key, find())
    with pytest.raises(InputError, match=f"{what}.* with parts of '{PATH}' as targets: expected"):
        if what == "DoRA":
            jq.add_magnitudes(PARAMS, adapter)
        else:
            jq.init_from_weights(PARAMS, adapter, what)
