# SPDX-License-Identifier: Apache-2.0
"""Paths, partition and combine, and dataclasses as pytrees."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given

from jax_qlora import ABSENT, InputError, combine, partition
from jax_qlora.tree import flatten_paths, map_with_path, nbytes, pytree

keys = st.sampled_from("abcdef")
leaves = st.integers() | st.booleans() | st.floats(allow_nan=False)
trees = st.recursive(
    leaves,
    lambda sub: st.dictionaries(keys, sub, max_size=3) | st.lists(sub, max_size=3) | st.tuples(sub),
    max_leaves=8,
)


# --- partition and combine ---------------------------------------------------------------------


@given(trees, st.data())
def test_combining_the_parts_gives_the_tree_back(tree, data):
    mask = jax.tree.map(lambda _: data.draw(st.booleans()), tree)
    selected, rest = partition(tree, mask)
    chosen = [x for x, m in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True) if m]
    assert jax.tree.leaves(selected) == chosen
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree)) - len(chosen)
    assert combine(selected, rest) == combine(rest, selected) == tree
    again = combine(selected, rest)
    assert jax.tree.structure(again) == jax.tree.structure(tree)


def test_a_mask_may_be_a_prefix_or_a_function_of_path_and_leaf():
    tree = {"a": {"w": 1, "b": 2}, "c": 3}
    want = ({"a": {"w": 1, "b": 2}, "c": ABSENT}, {"a": {"w": ABSENT, "b": ABSENT}, "c": 3})
    assert partition(tree, {"a": True, "c": False}) == want
    assert partition(tree, lambda path, _: path.startswith("a/")) == want
    assert partition(tree, lambda _, x: x == 3) == (want[1], want[0])


def test_absent_has_no_leaves_and_survives_transforms():
    selected, _ = partition({"w": jnp.ones(2), "n": jnp.arange(3)}, {"w": True, "n": False})
    grads = jax.jit(jax.grad(lambda t: (t["w"] ** 2).sum()))(selected)
    assert grads["n"] == ABSENT and repr(grads["n"]) == "ABSENT"
    assert len(jax.tree.leaves(grads)) == 1
    assert hash(ABSENT) == hash(grads["n"])


def test_none_is_not_absent():
    tree = {"a": None, "b": 1}
    selected, rest = partition(tree, {"a": None, "b": True})
    assert rest == {"a": None, "b": ABSENT}
    assert combine(selected, rest) == tree


def test_combine_refuses_what_is_present_twice_and_nothing():
    with pytest.raises(InputError, match="'a/w' is present in 2 of the trees to combine"):
        combine({"a": {"w": 1}}, {"a": {"w": 2}})
    with pytest.raises(InputError, match="got no tree"):
        combine()


def test_what_is_absent_everywhere_stays_absent():
    assert combine({"a": ABSENT}, {"a": ABSENT}) == {"a": ABSENT}


# --- paths -------------------------------------------------------------------------------------


class Attention(eqx.Module):
    query: jax.Array
    value: jax.Array


def test_paths_are_keys_indices_and_fields():
    tree = {"layers": [{"w": 1}, {"w": 2}], "a~/b": 3}
    assert flatten_paths(tree) == {"layers/0/w": 1, "layers/1/w": 2, "a~/b": 3}


def test_a_key_or_field_called_value_keeps_its_name():
    x = jnp.ones(1)
    assert list(flatten_paths({"attn": {"query": x, "value": x}, "value": x})) == [
        "attn/query",
        "attn/value",
        "value",
    ]
    assert list(flatten_paths({"value": {"value": x}})) == ["value/value"]
    module = Attention(x, x)
    assert list(flatten_paths({"attn": module})) == ["attn/query", "attn/value"]
    frozen, rest = eqx.partition(module, Attention(False, True))  # type: ignore[arg-type]
    assert list(flatten_paths(rest)) == ["query"]
    assert list(flatten_paths(frozen)) == ["value"]


class Dense(nnx.Module):
    def __init__(self):
        self.value = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def test_the_boxes_of_flax_leave_no_trace():
    want = ["value/bias", "value/kernel"]
    assert list(flatten_paths(nnx.state(Dense()))) == want
    assert list(flatten_paths(Dense())) == want
    assert list(flatten_paths(nnx.to_pure_dict(nnx.state(Dense())))) == want
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    variables = nn.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 2)))
    assert sorted(flatten_paths(variables)) == ["params/bias", "params/kernel"]


def test_inside_a_box_the_path_goes_on():
    pair = nnx.Param({"a": 1, "b": 2})  # type: ignore[arg-type]
    assert list(flatten_paths({"kernel": pair})) == ["kernel/a", "kernel/b"]
    stop = lambda x: isinstance(x, dict) and "a" in x  # noqa: E731
    assert list(flatten_paths({"kernel": pair}, is_leaf=stop)) == ["kernel"]


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(InputError, match="two leaves of the tree have the path 'a/b'"):
        flatten_paths({"a": {"b": 1}, "a/b": 2})


def test_map_with_path_maps_several_trees():
    got = map_with_path(lambda p, x, y: (p, x + y), {"a": [1, 2]}, {"a": [3, 4]})
    assert got == {"a": [("a/0", 4), ("a/1", 6)]}
    state = nnx.state(Dense())
    doubled = map_with_path(lambda p, x: 2 * x if p.endswith("kernel") else x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


# --- pytree ------------------------------------------------------------------------------------


@pytree(static=("n",))
@dataclasses.dataclass(frozen=True)
class Pair:
    a: Any
    b: Any
    n: int

    def __post_init__(self):
        assert self.n > 0, "validated where it is built"


def test_unflattening_goes_around_the_constructor():
    pair = Pair(jnp.ones(2), None, 3)
    assert jax.tree.map(lambda x: True, pair) == Pair(True, None, 3)
    assert jax.tree.structure(pair) != jax.tree.structure(Pair(jnp.ones(2), None, 4))
    out = jax.jit(jax.vmap(lambda p: jax.tree.map(lambda x: x + p.n, p)))(pair)
    assert out.n == 3 and out.a.tolist() == [4, 4]
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(pair)[0]
    assert jax.tree_util.keystr(path) == ".a"


def test_nbytes_counts_arrays_and_shapes():
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2, jnp.uint8), "c": "text", "d": 1.0}
    assert nbytes(tree) == 14
    assert nbytes(jax.eval_shape(lambda: {"a": tree["a"], "b": tree["b"]})) == 14
