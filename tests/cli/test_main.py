# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest

from jax_qlora.cli import main as main_module
from jax_qlora.cli.main import COMMANDS, main
from jax_qlora.errors import InputError

from ..helpers import ROOT

RUN = [sys.executable, "-m", "jax_qlora"]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: jax-qlora {command}" in text and len(text) > 400


def test_help_is_quick_and_needs_no_trainer():
    code = "import sys; from jax_qlora.cli.main import main; main(['--help']); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"flax", "optax", "orbax", "transformers", "matplotlib", "datasets", "tyro", "rich"}
    assert not heavy & set(result.stdout.split())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jax-qlora 0.")


def test_an_unknown_command_is_named(capsys):
    assert main(["tain"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 'tain' is no command. Did you mean 'train'?")
    assert captured.out == ""


def stands_for_train(monkeypatch, error):
    class Module:
        @staticmethod
        def run(args):
            raise error

    monkeypatch.setattr(main_module.importlib, "import_module", lambda name: Module)


def test_bad_input_is_one_message_and_status_2(monkeypatch, capsys):
    stands_for_train(monkeypatch, InputError("'x.toml': no such key."))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "error: 'x.toml': no such key.\n"


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    stands_for_train(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_missing_package_is_named(monkeypatch, capsys):
    stands_for_train(monkeypatch, ModuleNotFoundError("No module named 'optax'", name="optax"))
    assert main(["train"]) == 2
    assert "needs the package 'optax'" in capsys.readouterr().err
    stands_for_train(monkeypatch, ModuleNotFoundError("no", name="jax_qlora.interop.gone"))
    with pytest.raises(ModuleNotFoundError):
        main(["train"])


def test_a_reader_that_leaves_is_no_error():
    """`jax-qlora download | head -1` prints no traceback."""
    command = " ".join(RUN) + " download | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in result.stderr and "smollm2" in result.stdout


def test_download_lists_what_there_is_and_refuses_the_rest(capsys):
    assert main(["download"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out
    assert main(["download", "smollm2-135m-instuct"]) == 2
    assert "Did you mean 'smollm2-135m-instruct'?" in capsys.readouterr().err


def test_download_prints_where(monkeypatch, tmp_path, capsys):
    from jax_qlora.interop import download as module

    monkeypatch.setattr(module, "download", lambda name: tmp_path / name)
    assert main(["download", "a", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "a": str(tmp_path / "a"),
        "b": str(tmp_path / "b"),
    }
    assert main(["download", "a"]) == 0
    assert capsys.readouterr().out == f"a: {tmp_path / 'a'}\n"
