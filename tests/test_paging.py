# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose moments live in host memory.

jax 0.10 cannot compile copies to host memory on a CPU; what needs them runs from jax 0.12 on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_qlora import checkpoint
from jax_qlora.errors import InputError
from jax_qlora.optim import Paging, adamw, make_paging, paged
from jax_qlora.quant import streaming

from .helpers import needs_host, normal

pytestmark = pytest.mark.usefixtures("standard_promotion")
FORMS = [{}, {"state": "bfloat16"}, {"state": "8bit"}]


@pytest.fixture
def standard_promotion():
    """Optax itself mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def params():
    return {"stack": normal((2, 64, 80)), "small": normal((7, 5), 1), "scale": normal((64,), 2)}


def kinds(tree: Any) -> set[tuple[bool, str]]:
    """(whether a scalar, kind of memory) of every leaf."""
    return {(x.ndim == 0, x.sharding.memory_kind) for x in jax.tree.leaves(tree)}


def train(
    optimizer: optax.GradientTransformation,
    params: Any,
    state: Any = None,
    count: int = 4,
    first: int = 0,
) -> Any:
    """Parameters and state after steps of a jitted, donating function."""
    params = jax.tree.map(jnp.copy, params)
    state = optimizer.init(params) if state is None else state

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    where = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
    for i in range(first, first + count):
        gradient = jax.tree.map(lambda x, i=i: normal(x.shape, 10 + i), params)
        params, state = step(params, state, gradient)
    return params, state


def same_bits(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@needs_host
@pytest.mark.parametrize("form", FORMS, ids=["float32", "bfloat16", "8bit"])
def test_moments_live_in_host_memory_and_no_bit_changes(params, form):
    optimizer = adamw(1e-2, weight_decay=0.1, clip_norm=1.0, lora_plus_ratio=2.0, **form)
    there = paged(optimizer)
    start = there.init(params)
    assert kinds(start) == {(True, "device"), (False, "pinned_host")}
    assert jax.tree.structure(start) == jax.tree.structure(optimizer.init(params))
    got, got_state = train(there, params, start)
    assert kinds(got_state) == {(True, "device"), (False, "pinned_host")}
    assert kinds(got) == {(False, "device")}
    want, want_state = train(optimizer, params)
    assert same_bits((got, got_state), (want, want_state))


@needs_host
def test_a_part_of_a_tree_is_paged(params):
    """`paged` composes with masks like any transformation; here one matrix alone is paged."""
    labels = {"stack": "host", "small": "device", "scale": "device"}
    parts: Any = {"host": paged(adamw(1e-2)), "device": adamw(1e-2)}
    got, state = train(optax.partition(parts, labels), params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.inner_states["device"])} == {
        "device"
    }
    assert kinds(state.inner_states["host"]) == {(True, "device"), (False, "pinned_host")}
    parts["host"] = parts["device"]
    assert same_bits(got, train(optax.partition(parts, labels), params)[0])


@needs_host
def test_resumes_from_a_checkpoint_to_the_same_bits(params, tmp_path):
    optimizer = paged(adamw(1e-2, state="8bit"))
    half = train(optimizer, params, count=2)
    checkpoint.save(tmp_path, 2, half, identity={})
    want = train(optimizer, *half, count=2, first=2)
    found = checkpoint.restore(tmp_path, half, identity={})
    assert found is not None
    moved, state = found[1]
    assert kinds(state) == {(True, "device"), (False, "pinned_host")}  # never on the device
    got = train(optimizer, moved, state, count=2, first=2)
    assert kinds(got[1]) == {(True, "device"), (False, "pinned_host")}
    assert same_bits(got, want)


def test_where_state_moves_is_for_the_caller_to_say(params):
    """For a planner, say, that compiles for a device that is not there."""
    seen: list[str] = []

    def note(name: str, tree: Any) -> Any:
        seen.append(name)
        return tree

    spy = Paging(lambda tree: note("to device", tree), lambda tree: note("to host", tree))
    got = train(paged(adamw(1e-2), spy), params, count=1)
    assert seen == ["to host", "to device", "to host"]
    assert same_bits(got, train(adamw(1e-2), params, count=1))


def test_state_on_the_device_stays_as_it_is(params):
    paging = make_paging("device")
    assert paging.to_host(params) is params and paging.to_device(params) is params


def test_a_device_without_host_memory_is_refused_at_once(monkeypatch):
    class Memory:
        kind = "unpinned_host"

    class Device:
        platform, device_kind = "abacus", "wood"

        def addressable_memories(self):
            return [Memory()]

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(
        InputError, match='on abacus .wood.: .*found the kinds unpinned_host .*"8bit"'
    ):
        paged(adamw(1e-2))
    monkeypatch.undo()
    monkeypatch.setattr(streaming, "compiles_transfers", lambda *shardings: False)
    with pytest.raises(InputError, match="Optimizer state with placement .* Use placement"):
        make_paging("host")


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="what jax 0.10 cannot do")
def test_jax_010_says_that_it_cannot_on_a_cpu():
    with pytest.raises(InputError, match="device, pinned_host, unpinned_host and jax 0.10"):
        make_paging("host")
