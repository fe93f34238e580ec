# SPDX-License-Identifier: Apache-2.0
"""Plans for TPU chips that are not there."""

import importlib.metadata

import pytest

import jax_qlora as jq
from jax_qlora.costs.gpus import GIB
from jax_qlora.planner import plan, tpu


def test_a_chip_without_its_compiler_is_answered_by_the_formula(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "missing_wheel", lambda: "XLA's TPU compiler is not installed")
    report = jq.fit("tiny", gpu="V5E", seq=32)
    assert report.gpu == "TPU v5 lite" and report.capacity == int(15.75 * GIB)
    assert report.source == "formula" and "TPU compiler is not installed" in report.note


def test_the_wheel_for_tpus_is_named(monkeypatch: pytest.MonkeyPatch):
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(tpu.importlib.metadata, "version", version)
    monkeypatch.setattr(
        tpu.importlib.metadata, "requires", lambda name: ['libtpu==0.0.7.*; extra == "tpu"']
    )
    assert "pip install 'libtpu==0.0.7.*'" in str(tpu.missing_wheel())
    versions["libtpu"] = "0.0.71.1"
    assert "libtpu is 0.0.71.1, jax wants" in str(tpu.missing_wheel())
    versions["libtpu"] = "0.0.7.1"
    assert tpu.missing_wheel() is None


@pytest.mark.skipif(tpu.missing_wheel() is not None, reason="needs the wheel libtpu")
def test_plans_of_the_tpu_compiler():
    """A step that fits, with its moments on the host, and one that does not."""
    report = jq.fit("tiny", gpu="v5e", seq=32, placement="host")
    assert report.source.startswith("XLA's TPU compiler"), report.note
    assert report.fits and report.host_bytes > 0 and report.planned.temporaries > 0
    large = jq.fit("llama-2-7b", gpu="v5e", seq=64, method="full")
    assert large.source.startswith("XLA's TPU compiler"), large.note
    assert large.verdict == "does not fit"
