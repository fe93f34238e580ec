# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled programs: where it is, what turns it off, and that it is used."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jax_qlora.cli.compiled import MAX_BYTES, keep_compiled
from tests.helpers import ROOT

kept_on_a_cpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.10 complains of what it loads on a CPU"
)


@pytest.fixture
def config(monkeypatch, tmp_path):
    """A configuration of jax as it is outside of tests, and an empty home; nothing is compiled."""
    names = ["dir", "max_size"]
    before = {name: getattr(jax.config, f"jax_compilation_cache_{name}") for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.delenv("JAX_QLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield jax.config
    for name, value in before.items():
        jax.config.update(f"jax_compilation_cache_{name}", value)
    jax.config.update("jax_enable_compilation_cache", False)


@kept_on_a_cpu
def test_it_is_in_the_users_cache_and_bounded(config, tmp_path):
    assert keep_compiled() == tmp_path / "jax-qlora" / "compiled"
    assert config.jax_compilation_cache_dir == str(tmp_path / "jax-qlora" / "compiled")
    assert config.jax_compilation_cache_max_size == MAX_BYTES


def test_jaxs_own_settings_rule(config, tmp_path):
    config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert keep_compiled() is None
    assert config.jax_compilation_cache_dir == str(tmp_path / "mine")
    config.update("jax_compilation_cache_dir", None)
    config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None and config.jax_compilation_cache_dir is None


def test_an_old_jax_keeps_nothing_on_a_cpu_but_does_on_a_gpu(config, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 0))
    assert keep_compiled() is None and not (tmp_path / "jax-qlora").exists()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert keep_compiled() == tmp_path / "jax-qlora" / "compiled"


@kept_on_a_cpu
def test_a_cache_that_cannot_be_made_is_none(config, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled() is None and config.jax_compilation_cache_dir is None


PROGRAM = """
import sys
import jax
from jax_qlora.cli.compiled import keep_compiled

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
keep_compiled()
assert float(jax.jit(lambda x: x * 3 + 1)(2.0)) == 7.0
print(sum(name.endswith("cache_hits") for name in hits), len(hits))
"""


@kept_on_a_cpu
def test_the_next_process_compiles_nothing_and_hears_nothing(tmp_path: Path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    environment.pop("JAX_QLORA_CACHE", None)
    hits = []
    for _ in range(2):
        command = [sys.executable, "-W", "error", "-c", PROGRAM]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        assert "AOT" not in run.stderr and "not supported" not in run.stderr
        hits.append(int(run.stdout.split()[0]))
    assert hits[0] == 0 and hits[1] > 0
    assert list((tmp_path / "jax-qlora" / "compiled").iterdir())
