# SPDX-License-Identifier: Apache-2.0
"""Uses the core as a program of its own, with nothing but jax and numpy; prints `ok`.

`tests/test_project.py` runs it with every other library hidden, `.ci/run` in an environment that
has only the wheel. With `--hide` it hides them itself.
"""

import importlib.metadata
import importlib.resources
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ALLOWED = {"jax", "jaxlib", "jax_qlora", "ml_dtypes", "numpy", "opt_einsum", "scipy"}


class OnlyAllowed(PathFinder):
    """Finds the standard library, this package, jax, numpy, and what jax itself needs."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top in ALLOWED or top in sys.stdlib_module_names or top.startswith("_"):
            return super().find_spec(fullname, path, target)
        return None


if "--hide" in sys.argv:
    sys.meta_path = [OnlyAllowed if finder is PathFinder else finder for finder in sys.meta_path]

import jax
import jax.numpy as jnp

import jax_qlora as jq


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


def main() -> None:
    k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": jax.random.normal(k1, (3, 64, 64)) / 8,
        "head": jax.random.normal(k2, (64, 16)) / 8,
    }
    x = jax.random.normal(k3, (4, 64))

    targets = jq.find_targets(apply, params, x, match=["layers", "head"])
    base = jq.quantize(params, targets)
    adapter = jq.init_adapter(k4, targets, rank=4)
    model = jq.lift(apply)

    def loss(adapter, x):
        return jnp.mean((model(jq.attach(base, adapter), x) - 1.0) ** 2)

    before = loss(adapter, x)
    step = jax.jit(jax.grad(loss))
    for _ in range(20):
        adapter = jax.tree.map(lambda p, g: p - 0.1 * g, adapter, step(adapter, x))
    assert loss(adapter, x) < before
    merged = apply(jq.merge(base, adapter), x)
    assert jnp.allclose(merged, model(jq.attach(base, adapter), x), atol=1e-4)

    package = sys.modules["jax_qlora"]
    assert package.__version__ == importlib.metadata.version("jax-qlora")
    assert (importlib.resources.files("jax_qlora") / "py.typed").is_file()
    extra = {"flax", "optax", "orbax", "torch", "transformers", "jaxtyping"} & set(sys.modules)
    assert not extra, f"the core imported {sorted(extra)}"
    print("ok", jax.__version__)


if __name__ == "__main__":
    main()
