# SPDX-License-Identifier: Apache-2.0
"""A model of the zoo with a frozen base and an adapter, and the dense model it must equal."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_qlora as jq
from tests.helpers import normal
from tests.lift import zoo


def random_base(params: Any, targets: jq.Targets, **settings: Any) -> Any:
    """`params` with random codes and constants for the target kernels: nothing is compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda p: jq.quantize(p, targets, **settings), params)

    def fill(abstract: Any, given: Any) -> Any:
        if not isinstance(abstract, jq.QuantizedArray):
            return given
        parts: dict[str, Any] = {"codes": rng.integers(0, 256, abstract.codes.shape, np.uint8)}
        if abstract.absmax_scale is None or abstract.absmax_offset is None:
            parts["absmax"] = rng.uniform(0.2, 0.4, abstract.absmax.shape).astype(np.float32)
        else:
            parts["absmax"] = rng.integers(0, 256, abstract.absmax.shape, np.uint8)
            parts["absmax_scale"] = np.full(abstract.absmax_scale.shape, 0.1, np.float32)
            parts["absmax_offset"] = np.full(abstract.absmax_offset.shape, 0.3, np.float32)
        return dataclasses.replace(abstract, **jax.tree.map(jnp.asarray, parts))

    is_leaf = lambda x: isinstance(x, jq.QuantizedArray)  # noqa: E731
    return jax.tree.map(fill, shapes, params, is_leaf=is_leaf)


def random_adapter(targets: jq.Targets, *, rank: int = 3, seed: int = 0, **settings: Any) -> Any:
    """An adapter whose update is about as large as the kernels: nothing is compiled."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(
        lambda: jq.init_adapter(key, targets, rank=rank, alpha=rank, **settings)
    )
    leaves, treedef = jax.tree.flatten(shapes)
    filled = [normal(x.shape, 100 * seed + i) / 5 for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, filled)


@dataclasses.dataclass
class Case:
    apply: Any
    params: Any
    args: tuple[Any, ...]
    targets: jq.Targets
    base: Any
    adapter: Any

    def lifted(self, adapter: Any, base: Any = None, *args: Any) -> Any:
        tree = jq.attach(self.base if base is None else base, adapter)
        return jq.lift(self.apply)(tree, *(args or self.args))

    def dense(self, adapter: Any, base: Any = None, *args: Any) -> Any:
        tree = jq.merge(self.base if base is None else base, adapter)
        return self.apply(tree, *(args or self.args))


def make(
    name: str,
    dtype: Any = jnp.float32,
    *,
    match: Any = "all-linear",
    quantized: bool = True,
    **settings: Any,
) -> Case:
    apply, params, args = zoo.MODELS[name](dtype)
    targets = jq.find_targets(apply, params, *args, match=match)
    base = random_base(params, targets) if quantized else params
    adapter = random_adapter(targets, **settings)
    return Case(apply, params, args, targets, base, adapter)


def mean_square(out: Any) -> jax.Array:
    """A scalar of everything a function returns."""
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(out)]
    return sum((jnp.square(x).mean() for x in leaves), start=jnp.float32(0))


def distance(got: Any, want: Any) -> float:
    """|got - want| / |want| of whole trees."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    apart = sum(float(np.square(a - b).sum()) for a, b in arrays)
    return (apart / sum(float(np.square(b).sum()) for _, b in arrays)) ** 0.5


def outputs_and_grads(f: Callable[[Any], Any], adapter: Any) -> tuple[Any, Any]:
    """What a model gives, and the gradient of its mean square with respect to the adapter."""

    def loss(adapter: Any) -> tuple[jax.Array, Any]:
        out = f(adapter)
        return mean_square(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)
    return out, grads
