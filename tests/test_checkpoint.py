# SPDX-License-Identifier: Apache-2.0
import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_qlora import checkpoint
from jax_qlora.checkpoint import check_identity, fingerprint, restore, save, saved_steps
from jax_qlora.errors import InputError
from jax_qlora.quant import quantize_array, stream
from tests.helpers import needs_host, normal

IDENTITY = {"lora.rank": "4", "base": "ab12"}


@pytest.fixture
def state(key):
    adapter = {
        "layers/q_proj/kernel": {"a": jax.random.normal(key, (2, 4, 8)), "b": jnp.zeros((2, 8, 4))},
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 3,
        "codes": jnp.arange(7, dtype=jnp.uint8),
    }
    return {
        "adapter": adapter,
        "optimizer": optax.adam(1e-3).init(adapter),
        "step": np.int64(7),
    }


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        x, y = jnp.asarray(x), jnp.asarray(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_restores_the_same_bits(tmp_path, state):
    save(tmp_path, 7, state, identity=IDENTITY)
    found = restore(tmp_path, jax.eval_shape(lambda: state), identity=IDENTITY)
    assert found is not None
    assert found[0] == 7
    assert_same_bits(found[1], state)


def test_nothing_saved_yet(tmp_path, state):
    assert restore(tmp_path, state, identity=IDENTITY) is None
    assert restore(tmp_path / "absent", state, identity=IDENTITY) is None


def test_keeps_the_newest(tmp_path, state):
    for step in (1, 2, 10, 3):
        save(tmp_path, step, state, identity=IDENTITY, keep=2)
    assert saved_steps(tmp_path) == [3, 10]
    save(tmp_path, 10, state, identity=IDENTITY, keep=2)  # a step may be saved again
    assert saved_steps(tmp_path) == [3, 10]
    assert {path.name for path in tmp_path.iterdir()} == {"step-000003", "step-000010"}


def test_a_half_written_checkpoint_is_ignored(tmp_path, state, monkeypatch):
    save(tmp_path, 1, state, identity=IDENTITY)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_sync", die)  # orbax has written; the rename never comes
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, state, identity=IDENTITY)
    assert len(list(tmp_path.iterdir())) == 2
    assert saved_steps(tmp_path) == [1]
    found = restore(tmp_path, state, identity=IDENTITY)
    assert found is not None and found[0] == 1
    save(tmp_path, 3, state, identity=IDENTITY, keep=5)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000003"}


def test_another_run_is_refused(tmp_path, state):
    save(tmp_path, 1, state, identity=IDENTITY)
    with pytest.raises(InputError, match="base was ab12, is cd34; lora.rank was 4, is 8. Restore"):
        restore(tmp_path, state, identity={"lora.rank": "8", "base": "cd34"})
    with pytest.raises(InputError, match="lora.rank was 4, is absent"):
        restore(tmp_path, state, identity={"base": "ab12"})


def test_settings_are_compared_before_arrays_are_made(tmp_path, state):
    check_identity(tmp_path, IDENTITY)  # nothing saved yet
    save(tmp_path, 1, state, identity=IDENTITY)
    check_identity(tmp_path, {"lora.rank": "4"})
    with pytest.raises(InputError, match="lora.rank was 4, is 8. Restore"):
        check_identity(tmp_path, {"lora.rank": "8"})


def test_other_arrays_are_refused(tmp_path, state):
    save(tmp_path, 1, state, identity=IDENTITY)
    del state["step"]
    with pytest.raises(InputError, match="holds 'step', which this run does not have"):
        restore(tmp_path, state, identity=IDENTITY)
    state |= {"step": np.int64(7), "extra": np.int64(1)}
    with pytest.raises(InputError, match=r"lacks 'extra' \(1 arrays in all\)"):
        restore(tmp_path, state, identity=IDENTITY)
    del state["extra"]
    state["adapter"]["codes"] = jnp.zeros(3, jnp.uint8)
    with pytest.raises(InputError, match=r"'adapter/codes': expected uint8\[3\], found uint8\[7\]"):
        restore(tmp_path, state, identity=IDENTITY)


def test_a_damaged_checkpoint_is_named(tmp_path, state):
    save(tmp_path, 1, state, identity=IDENTITY)
    path = save(tmp_path, 2, state, identity=IDENTITY)
    for file in (path / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(InputError, match="step-000002' is damaged: .*resume from step 1"):
        restore(tmp_path, state, identity=IDENTITY)
    (path / "meta" / "metadata").unlink()
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(InputError, match="step-000002' is damaged: .*to start again"):
        restore(tmp_path, state, identity=IDENTITY)


def test_a_full_disk_loses_nothing(tmp_path, state, monkeypatch):
    save(tmp_path, 1, state, identity=IDENTITY)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
        with pytest.raises(InputError, match="step-000002'.*No space left on device. Make room"):
            save(tmp_path, 2, state, identity=IDENTITY, keep=1)

    def fail(*args):
        raise ValueError("RESOURCE_EXHAUSTED: no space.")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write", fail)
        with pytest.raises(InputError, match="RESOURCE_EXHAUSTED: no space. Make room"):
            save(tmp_path, 2, state, identity=IDENTITY, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001"}


def test_fingerprint_sees_every_bit(key):
    tree = {"w": jax.random.normal(key, (3, 5)), "codes": jnp.arange(8, dtype=jnp.uint8)}
    first = fingerprint(tree)
    assert first == fingerprint(jax.tree.map(jnp.array, tree))
    assert first != fingerprint({**tree, "w": tree["w"].at[1, 2].add(1e-6)})
    assert first != fingerprint({**tree, "w": tree["w"][::-1]})
    assert first != fingerprint({**tree, "w": tree["w"].T})
    assert first != fingerprint({**tree, "codes": tree["codes"].at[3].set(0)})
    assert first != fingerprint({"v": tree["w"], "codes": tree["codes"]})
    assert fingerprint({"x": jnp.bool_(True)}) != fingerprint({"x": jnp.bool_(False)})
    assert len(first) == 16
    assert fingerprint({"key": key}) != fingerprint({"key": jax.random.key(5)})


@needs_host
def test_fingerprint_of_what_waits_on_the_host():
    """Read a slice at a time, with the same result as on the device, and every bit counts."""
    q = quantize_array(normal((3, 64, 32)))
    there = stream({"w": q})["w"]
    assert fingerprint({"w": there}) == fingerprint({"w": q})
    for name in ("codes", "absmax", "absmax_scale"):
        x = np.asarray(getattr(q, name)).copy()
        x[-1, ...] = x[0]
        other = dataclasses.replace(q, **{name: jnp.asarray(x)})
        assert fingerprint({"w": stream({"w": other})["w"]}) != fingerprint({"w": q})
    text = str(jax.make_jaxpr(checkpoint._checksum, static_argnums=1)(there.codes, True))
    assert "scan" in text and f"u8[{','.join(map(str, q.codes.shape[1:]))}]" in text
