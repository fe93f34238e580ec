# SPDX-License-Identifier: Apache-2.0
import pytest

from jax_qlora.cli.settings import ensure_downloaded, read_settings
from jax_qlora.config import Config, from_table
from jax_qlora.errors import InputError


def read(*args):
    return read_settings(list(args), prog="jax-qlora train", description="Train.")


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = "lora"\n[lora]\nrank = 4\nrslora = true\n[optim]\nb1 = 0.5\n')
    return str(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(toml):
    assert read() == Config()
    assert read(toml).lora.rank == 4
    config = read(toml, "--lora.rank", "8", "--output=runs/x", "--train.batch-size", "2")
    assert (config.method, config.lora.rank, config.output) == ("lora", 8, "runs/x")
    assert (config.lora.rslora, config.optim.b1, config.train.batch_size) == (True, 0.5, 2)
    assert config.lora.alpha == Config().lora.alpha


@pytest.mark.parametrize("value", ["false", "False"])
def test_booleans_are_spelled_as_in_toml(toml, value):
    assert read(toml, "--lora.rslora", value).lora.rslora is False
    assert read(toml, f"--lora.rslora={value}").lora.rslora is False
    assert read("--data.source", "true").data.source == "true"


def test_lists_and_tables():
    assert read("--lora.targets", "q_proj", "v_proj").lora.targets == ("q_proj", "v_proj")
    assert read("--lora.targets", "all-linear").lora.targets == "all-linear"
    assert read("--lora.rank_pattern", "v_proj", "8").lora.rank_pattern == {"v_proj": 8}
    assert read("--data.new_tokens", "<tool>", "</tool>").data.new_tokens == ("<tool>", "</tool>")
    assert read("--lora.trainable_token_indices", "5", "7").lora.trainable_token_indices == (5, 7)
    assert read("--data.eval_source", "held.jsonl").data.eval_source == "held.jsonl"


def test_every_setting_can_be_given_on_the_command_line():
    """By the name it has in TOML, with its own default."""
    from jax_qlora.config import flat_settings

    args = []
    for key, value in flat_settings(Config()).items():
        if value not in (None, {}, ()):
            args += [f"--{key}", str(value)]
    assert read(*args) == Config()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora.rnk", "8"], "Perhaps you meant"),
        (["--lora.rank", "eight"], "--lora.rank"),
        (["--method", "qlra"], "qlora"),
        (["--lora.rslora", "maybe"], "--lora.rslora"),
        (["extra.toml2", "again"], "No settings file"),
        (["--lora.rank", "8", "run.toml"], "'run.toml': expected one settings file, before all"),
    ],
)
def test_bad_options_are_named(args, message, capsys):
    with pytest.raises((SystemExit, InputError)) as ended:
        read(*args)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    else:
        assert message in str(ended.value)


def test_ranges_hold_on_the_command_line_too(toml):
    with pytest.raises(
        InputError, match="^command line: train.steps: expected a number at least 1"
    ):
        read(toml, "--train.steps", "0")


def test_only_packages_are_fetched(monkeypatch):
    from jax_qlora.interop import download as module

    fetched = []
    monkeypatch.setattr(module, "download", fetched.append)
    ensure_downloaded("smollm2-135m-instruct", "runs/mine", "modern-english", "data.jsonl")
    assert fetched == ["smollm2-135m-instruct", "modern-english"]


def test_settings_survive_a_tour_through_every_form(toml):
    config = read(toml)
    assert (
        from_table({"method": "lora", "lora": {"rank": 4, "rslora": True}, "optim": {"b1": 0.5}})
        == config
    )
