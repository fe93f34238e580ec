# SPDX-License-Identifier: Apache-2.0
"""Convolutions in PEFT's format, and names of modules for a tree of another library."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_qlora as jq
from tests.helpers import assert_trees_close, normal
from tests.lift.cases import random_adapter
from tests.tiny import tiny_model

PARAMS = {
    "first": {"kernel": normal((3, 2, 4, 8), 1)},  # as flax has it
    "second": {"weight": normal((6, 8, 1, 3), 2)},  # as equinox has it
    "blocks": {"kernel": normal((2, 3, 6, 6), 3)},  # two layers along a signal
    "out": {"kernel": normal((6, 5), 4)},
}
NAMES = {"first/kernel": "net.0", "second/weight": "net.1", "out/kernel": "out"}
X = normal((2, 7, 7, 4), 5)


def convolve(x: jax.Array, w: jax.Array, order: str, **settings: Any) -> jax.Array:
    spec = ("NHWC", order, "NHWC") if w.ndim == 4 else ("NWC", order, "NWC")
    return jax.lax.conv_general_dilated(
        x, w, (1,) * (w.ndim - 2), "VALID", dimension_numbers=spec, **settings
    )


def apply(params: Any, x: jax.Array) -> jax.Array:
    x = convolve(x, params["first"]["kernel"], "HWIO")
    x = convolve(x, params["second"]["weight"], "OIHW").mean(1)
    for kernel in params["blocks"]["kernel"]:
        x = x + jnp.pad(convolve(x, kernel, "WIO"), ((0, 0), (1, 1), (0, 0)))
    return x.mean(1) @ params["out"]["kernel"]


@pytest.fixture(scope="module")
def targets() -> Any:
    return jq.find_targets(apply, PARAMS, X, match=".*")


def test_the_factors_of_a_convolution_are_convolutions_in_torchs_order(
    targets: Any, tmp_path: Path
):
    adapter = random_adapter(targets)
    saved = jq.save_adapter(tmp_path / "a", adapter, targets, names=NAMES)
    assert saved.modules == 4
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    shapes = {k.removeprefix("base_model.model."): x.shape for k, x in tensors.items()}
    assert shapes == {
        "net.0.lora_A.weight": (3, 4, 3, 2),
        "net.0.lora_B.weight": (8, 3, 1, 1),
        "net.1.lora_A.weight": (3, 8, 1, 3),
        "net.1.lora_B.weight": (6, 3, 1, 1),
        "blocks.kernel.lora_A.weight": (2, 3, 6, 3),
        "blocks.kernel.lora_B.weight": (2, 6, 3, 1),
        "out.lora_A.weight": (3, 6),
        "out.lora_B.weight": (5, 3),
    }
    for path, order in (("first/kernel", (3, 2, 0, 1)), ("second/weight", (0, 1, 2, 3))):
        a, b = (tensors[f"base_model.model.{NAMES[path]}.lora_{f}.weight"] for f in "AB")
        delta = np.einsum("or,rihw->oihw", b[:, :, 0, 0], a) * adapter[path].scale
        np.testing.assert_allclose(adapter[path].delta().transpose(order), delta, atol=1e-6)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0", "1", "kernel", "out"]
    assert_trees_close(jq.load_adapter(tmp_path / "a", targets, names=NAMES), adapter)


def test_magnitudes_of_a_convolution_are_torchs(targets: Any, tmp_path: Path):
    adapter = jq.add_magnitudes(PARAMS, random_adapter(targets.select(["first", "out"])))
    jq.save_adapter(tmp_path / "a", adapter, targets, names=NAMES)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors["base_model.model.net.0.lora_magnitude_vector"].shape == (1, 8, 1, 1)
    assert_trees_close(jq.load_adapter(tmp_path / "a", targets, names=NAMES), adapter)


def test_names_that_are_no_names(targets: Any, tmp_path: Path):
    adapter = random_adapter(targets)
    with pytest.raises(jq.InputError, match="names has a module for 'third/kernel', which the"):
        jq.save_adapter(tmp_path / "a", adapter, targets, names={"third/kernel": "net.2"})
    both = {"first/kernel": "net", "second/weight": "net"}
    with pytest.raises(jq.InputError, match="'first/kernel' and 'second/weight' are both named"):
        jq.save_adapter(tmp_path / "a", adapter, targets, names=both)
    model = tiny_model()
    with pytest.raises(jq.InputError, match="for a decoder of this library: expected none"):
        jq.save_adapter(tmp_path / "a", {}, model, names={"lm_head/kernel": "head"})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(feature_group_count=2), "'w' is in groups, where its update in PEFT sees all input"),
        (dict(rhs_dilation=(2, 1)), "'w' is dilated, where its update in PEFT is not dilated"),
    ],
)
def test_convolutions_whose_updates_are_others_in_peft(settings: Any, match: str, tmp_path: Path):
    params = {"w": normal((2, 2, 4 // settings.get("feature_group_count", 1), 6), 1)}
    f = lambda p, x: convolve(x, p["w"], "HWIO", **settings)  # noqa: E731
    targets = jq.find_targets(f, params, X, match=["w"])
    with pytest.raises(jq.InputError, match=match):
        jq.save_adapter(tmp_path / "a", random_adapter(targets), targets)
    plain = dataclasses.replace(targets.found[0], conv=None)
    plain = jq.Targets((plain,), (plain,))
    jq.save_adapter(tmp_path / "a", random_adapter(targets), plain)
    with pytest.raises(jq.InputError, match=match):
        jq.load_adapter(tmp_path / "a", targets)


def test_a_kernel_cut_up_before_its_use(tmp_path: Path):
    f = lambda p, x: convolve(x, p["w"].reshape(3, 2, 4, 6), "HWIO")  # noqa: E731
    params = {"w": normal((6, 4, 6), 1)}
    targets = jq.find_targets(f, params, X, match=["w"])
    adapter = random_adapter(targets)
    got = jq.lift(f)(jq.attach(params, adapter), X)
    np.testing.assert_allclose(got, f(jq.merge(params, adapter), X), atol=1e-5)
    with pytest.raises(jq.InputError, match="kernel of the convolution 'w' .* is cut up before"):
        jq.save_adapter(tmp_path / "a", adapter, targets)
