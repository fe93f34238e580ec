# SPDX-License-Identifier: Apache-2.0
"""Models of other libraries, unchanged: lifted equals dense, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from tests.lift import zoo
from tests.lift.cases import distance, make, mean_square, outputs_and_grads
from tests.lift.walk import dense_weights, weight_sizes

pytestmark = pytest.mark.usefixtures("standard_promotion")

# path ends of the targets of "all-linear", and of the output head
TARGETS = {
    "nnx_decoder": ("query key value out up down", "head"),
    "nnx_tied": ("query key value out up down", "embed"),
    "linen_model": ("query key value out DenseGeneral_0 DenseGeneral_1", "Dense_0"),
    "eqx_model": ("query_proj key_proj value_proj output_proj 0 1", "head"),
    "haiku_model": (
        "linear linear_1 attention/query attention/key attention/value attention/linear",
        "linear",
    ),
    "einsum_kernels": ("qkv out mixed ends left swapped", ""),
    "experts": ("router up down", ""),
    "chosen_experts": ("w v", ""),
    "loops": ("python fori while carried shared", ""),
    "branches": ("a b c", ""),
    "custom_rules": ("a b", ""),
    "rearranged": ("a b c", ""),
}
# kernels that a gradient does not reach: behind a while_loop, in the branch not taken
UNREACHED = {"loops": {"while", "carried"}, "branches": {"b"}}


@pytest.fixture
def standard_promotion():
    """The libraries mix dtypes themselves."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_kernel_is_found(name):
    apply, params, args = zoo.MODELS[name]()
    targets = jq.find_targets(apply, params, *args)
    modules = [path.removesuffix("/kernel").removesuffix("/weight") for path in targets]
    modules = [m.removesuffix("/w") if m != "w" else m for m in modules]
    wanted, head = TARGETS[name]
    assert len(modules) == len(wanted.split())
    for end in wanted.split():
        assert any(m == end or m.endswith(("/" + end, "_" + end)) for m in modules), end
    heads = [t.path for t in targets.found if t.head]
    assert len(heads) == bool(head) and all(head in path for path in heads)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_lifted_equals_dense_forward_and_backward(name):
    case = make(name)

    out, grads = outputs_and_grads(case.lifted, case.adapter)
    want, want_grads = outputs_and_grads(case.dense, case.adapter)
    assert jax.tree.structure(out) == jax.tree.structure(want)
    assert distance(out, want) < 2e-6
    assert distance(grads, want_grads) < 1e-5  # x W + x A B against x (W + A B), in float32
    still = {path for path, pair in grads.items() if not (np.any(pair.a) and np.any(pair.b))}
    assert still == UNREACHED.get(name, set())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_no_dense_weight_is_made(name):
    case = make(name)
    sizes = weight_sizes(case.targets)
    loss = lambda adapter: mean_square(case.lifted(adapter))  # noqa: E731
    assert dense_weights(jax.grad(loss), case.adapter, sizes=sizes) == []
    assert dense_weights(case.lifted, case.adapter, sizes=sizes) == []


@pytest.mark.parametrize("name", ["nnx_decoder", "experts", "einsum_kernels"])
def test_the_walk_finds_dense_weights_where_there_are_some(name):
    case = make(name)
    sizes = weight_sizes(case.targets)
    assert dense_weights(case.dense, case.adapter, sizes=sizes)
    inside = dense_weights(case.lifted, case.adapter, sizes=sizes, exempt="")
    assert inside, "the kernels are decoded inside the matmul"


@pytest.mark.parametrize("name", ["nnx_tied", "linen_model"])
def test_a_dense_base_with_an_adapter(name):
    """LoRA without quantization, of the head and the embedding too."""
    case = make(name, match=r".*", quantized=False)
    assert any(t.kind == "embedding" for t in case.targets.values())
    grads = jax.jit(jax.grad(lambda a: mean_square(case.lifted(a))))(case.adapter)
    want = jax.jit(jax.grad(lambda a: mean_square(case.dense(a))))(case.adapter)
    assert distance(grads, want) < 1e-5


@pytest.mark.parametrize("name", ["eqx_model", "haiku_model"])
def test_a_quantized_embedding_and_head(name):
    case = make(name, match=r".*")
    out, want = jax.jit(case.lifted)(case.adapter), jax.jit(case.dense)(case.adapter)
    assert distance(out, want) < 2e-6


@pytest.mark.parametrize("name", ["nnx_decoder", "linen_model", "eqx_model"])
def test_bfloat16(name):
    """Each operand is rounded as in the dense model; the order of sums differs."""
    case = make(name, jnp.bfloat16)
    quantized = {t.dtype for t in case.targets.values()}
    assert quantized == {"bfloat16"}
    out, want = jax.jit(case.lifted)(case.adapter), jax.jit(case.dense)(case.adapter)
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, want)
    assert distance(out, want) < 4e-2


@pytest.mark.parametrize("name", ["nnx_tied", "linen_model", "eqx_model", "haiku_model"])
def test_ordinary_trees_are_the_functions_own_affair(name):
    apply, params, args = zoo.MODELS[name]()
    lifted, plain = jax.make_jaxpr(jq.lift(apply)), jax.make_jaxpr(apply)
    assert str(lifted(params, *args)) == str(plain(params, *args))
