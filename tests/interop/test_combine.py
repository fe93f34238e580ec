# SPDX-License-Identifier: Apache-2.0
"""Combining adapters in PEFT's format, without the model."""

import json
import shutil

import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora import InputError
from jax_qlora.cli.main import main
from jax_qlora.interop.adapter_files import WEIGHTS_NAME, read_tensors, write_adapter
from jax_qlora.interop.combine import combine_adapter_files
from jax_qlora.interop.peft_config import CONFIG_NAME, read_config
from jax_qlora.lora.combine_factors import Settings
from tests.helpers import GOLDEN

ADAPTERS = GOLDEN / "adapters"
PLAIN, STABLE, PATTERNS = (ADAPTERS / n for n in ("qv_r4", "all_linear_rslora", "patterns"))


@pytest.fixture(scope="module")
def model():
    return jq.load_model(GOLDEN / "models" / "llama", quantization=None)


@pytest.mark.parametrize(
    ("method", "options"),
    [("cat", {}), ("svd", {"rank": 5}), ("ties_svd", {"density": 0.5})],
)
def test_files_combine_as_the_adapters_in_them(model, tmp_path, method, options):
    paths, weights = [STABLE, PATTERNS, PLAIN], [0.7, -0.4, 1.3]
    written = combine_adapter_files(
        tmp_path / "out", paths, weights, Settings(method=method, **options)
    )
    got = jq.load_adapter(tmp_path / "out", model)
    want = jq.combine_adapters(
        [jq.load_adapter(p, model) for p in paths], weights, method=method, **options
    )
    assert got.keys() == want.keys()
    for path, pair in want.items():
        np.testing.assert_allclose(got[path].delta(), pair.delta(), atol=1e-6, err_msg=path)
        assert np.abs(pair.delta()).max() > 1e-3
    assert written.modules == len(read_tensors(tmp_path / "out" / WEIGHTS_NAME)) // 2
    assert written.rank == max(pair.rank for pair in want.values())


def test_targets_stay_short_where_the_adapters_name_them(tmp_path):
    settings = Settings(method="cat")
    combine_adapter_files(tmp_path / "short", [PLAIN, PATTERNS], [1, 1], settings)
    targets = read_config(tmp_path / "short").target_modules
    assert set(targets) == {f"{m}_proj" for m in ("q", "k", "v", "o", "up", "down")}
    first = json.loads((PLAIN / CONFIG_NAME).read_text())
    record = json.loads((tmp_path / "short" / CONFIG_NAME).read_text())
    assert record["base_model_name_or_path"] == first["base_model_name_or_path"]
    # one layer of one module: no short name says that
    text = {**first, "layers_to_transform": [1]}
    tensors = {k: x for k, x in read_tensors(PLAIN / WEIGHTS_NAME).items() if "layers.1." in k}
    write_adapter(tmp_path / "second", tensors, json.dumps(text))
    combine_adapter_files(tmp_path / "full", [tmp_path / "second"], [1], settings)
    names = {k.removeprefix("base_model.model.").rpartition(".lora")[0] for k in tensors}
    assert set(read_config(tmp_path / "full").target_modules) == names


def test_the_command(model, tmp_path, capsys):
    output = tmp_path / "out"
    paths = [str(PLAIN), str(STABLE)]
    command = ["adapters", "combine", str(output), *paths, "--method", "dare_linear_svd"]
    command += ["--weights", "0.5", "-0.25", "--density", "0.5", "--rank", "6", "--json"]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["modules"] == 14 and record["rank"] == 6
    first = read_tensors(output / WEIGHTS_NAME)
    assert main(command) == 2
    assert "is in use" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    second = read_tensors(output / WEIGHTS_NAME)
    assert any(not np.array_equal(first[k], second[k]) for k in first)
    capsys.readouterr()
    equal = ["adapters", "combine", str(tmp_path / "mean"), *paths, "--method", "cat"]
    assert main(equal) == 0
    assert "Combined 2 adapters" in capsys.readouterr().out
    adapters = [jq.load_adapter(p, model) for p in paths]
    want = jq.combine_adapters(adapters, [0.5, 0.5], method="cat")
    for path, pair in jq.load_adapter(tmp_path / "mean", model).items():
        np.testing.assert_allclose(pair.delta(), want[path].delta(), atol=1e-6)


def test_subcommands(capsys):
    assert main(["adapters"]) == 2
    assert "adapters combine OUTPUT" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "--help"])
    assert ended.value.code == 0
    assert "usage: jax-qlora adapters combine" in capsys.readouterr().out
    assert main(["adapters", "combin"]) == 2
    assert "Did you mean 'combine'?" in capsys.readouterr().err


def copy(path, name, **changes):
    shutil.copytree(PLAIN, path / name)
    config = json.loads((PLAIN / CONFIG_NAME).read_text())
    (path / name / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
    return path / name


def test_adapters_that_cannot_be_combined(tmp_path):
    settings = Settings(method="cat")

    def combine(*paths, settings=settings):
        combine_adapter_files(tmp_path / "out", paths, [1.0] * len(paths), settings)

    with pytest.raises(InputError, match="is given 2 times"):
        combine(PLAIN, PLAIN)
    with pytest.raises(InputError, match="no adapter at"):
        combine(PLAIN, tmp_path / "absent")
    with pytest.raises(InputError, match="is a DoRA adapter"):
        combine(PLAIN, ADAPTERS / "dora")
    with pytest.raises(InputError, match="has rank 4, and 3 in adapter_config.json"):
        combine(PLAIN, copy(tmp_path, "rank", r=3))
    with pytest.raises(InputError, match="have ranks 4, 8: expected one rank"):
        combine(PLAIN, STABLE, settings=Settings(method="linear"))
    tensors = read_tensors(PLAIN / WEIGHTS_NAME)
    key = next(iter(tensors))
    config = (PLAIN / CONFIG_NAME).read_text()
    for name, changed, message in (
        ("other", {**tensors, "base_model.model.lm_head.weight": np.ones((2, 2), "f")}, "holds"),
        ("odd", {k: x for k, x in tensors.items() if k != key}, "None and|and None"),
        ("infinite", {**tensors, key: np.full_like(tensors[key], np.inf)}, "not finite"),
    ):
        write_adapter(tmp_path / name, changed, config)
        with pytest.raises(InputError, match=message):
            combine(STABLE, tmp_path / name)
    assert not (tmp_path / "out").exists()
