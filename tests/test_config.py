# SPDX-License-Identifier: Apache-2.0
import dataclasses
import inspect
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_qlora import config as config_module
from jax_qlora.config import (
    Config,
    LoraConfig,
    OptimConfig,
    Range,
    check_config,
    flat_settings,
    from_table,
    load_config,
    run_identity,
    to_toml,
)
from jax_qlora.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda p: p.name
)
def test_every_shipped_config_parses(path):
    config = load_config(path)
    assert config.output.startswith("runs/")
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#") and f"jax-qlora train configs/{path.name}" in header


def test_every_field_is_documented():
    for cls in vars(config_module).values():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls not in (Range, Config):
            source = inspect.getsource(cls)
            assert source.count('"""') == 2 * (1 + len(dataclasses.fields(cls))), cls


def test_file_over_defaults(tmp_path):
    path = write(tmp_path, 'method = "lora"\n[lora]\nrank = 4\n[optim]\nlearning_rate = 2e-4\n')
    config = load_config(path)
    assert config.method == "lora"
    assert config.lora == LoraConfig(rank=4)
    assert config.optim.learning_rate == 2e-4
    assert config.seed == 0


def test_an_integer_is_a_number_and_a_list_becomes_a_tuple():
    config = from_table({"lora": {"alpha": 8, "targets": ["q_proj"]}})
    assert config.lora.alpha == 8.0 and isinstance(config.lora.alpha, float)
    assert config.lora.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lora]\nrnak = 4", r"run.toml'.*unknown key 'lora.rnak'. Did you mean 'lora.rank'\?"),
        ("[lroa]\nrank = 4", r"unknown key 'lroa'. Did you mean 'lora'\?"),
        ("learning_rate = 1e-3", r"key 'learning_rate'. Did you mean 'optim.learning_rate'\?"),
        ('[lora]\nrank = "8"', r"run.toml': lora.rank: expected an integer, found \"8\""),
        ("[lora]\nrank = true", r"lora.rank: expected an integer, found true"),
        ("[lora]\nrank = 0", r"lora.rank: expected at least 1 where nothing else trains, found 0"),
        ("[lora]\ndropout = 1.5", r"lora.dropout: expected a number at least 0 and at most 0.999"),
        ("[lora]\nrslora = 1", r"lora.rslora: expected true or false, found 1"),
        ("[lora]\ntargets = 3", r"lora.targets: expected a string or a list of strings, found 3"),
        ("[lora]\ntrainable_token_indices = 3", r"indices: expected a list of integers, found 3"),
        ("[lora]\ntrainable_token_indices = [-1]", r"indices: expected a number at least 0, found"),
        ("[lora]\ntrainable_token_indices = [3, 3]", r"indices: expected each once, found 3 twice"),
        ('[data]\nnew_tokens = [""]', r"data.new_tokens: expected tokens, found an empty text"),
        ('method = "full"\n[lora]\nbias = "all"', r"lora.bias: expected method \"qlora\" or"),
        ("[lora]\ntargets = [3]", r"lora.targets: expected a string or a list of strings"),
        ("[lora]\nrank_pattern = 3", r"lora.rank_pattern: expected a table of names to numbers"),
        ("[lora.rank_pattern]\nv = 0", r"lora.rank_pattern.v: expected a number at least 1"),
        ("lora = 3", r"lora: expected a table \[lora\], found 3"),
        ('method = "qlra"', r"method: expected one of \"qlora\".*Did you mean 'qlora'\?"),
        ("[quant]\nblock_size = 48", r"quant.block_size: expected one of 32, 64, 128, 256, found"),
        ("[optim]\nlearning_rate = 0", r"optim.learning_rate: expected a number above 0, found 0"),
        ("[optim]\nlearning_rate = nan", r"optim.learning_rate: expected a number above 0"),
        ("[optim]\nlearning_rate = inf", r"optim.learning_rate: expected a number above 0"),
        ("[data]\neval_source = 3", r"data.eval_source: expected a string, found 3"),
        ("[train]\nsteps = 10", r"optim.warmup_steps: expected fewer than train.steps = 10"),
        ("method = qlora", r"run.toml' is not valid TOML: .*line 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match="(?s)" + message):
        load_config(write(tmp_path, text))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    text = '[lora]\nrnak = 4\nalpha = 0\n[train]\nsteps = "ten"\n[eval]\nevery = 0\n'
    with pytest.raises(InputError) as raised:
        load_config(write(tmp_path, text))
    first, *rest = str(raised.value).splitlines()
    assert first.endswith("run.toml': 4 settings are wrong:")
    assert [line.split(":")[0] for line in rest] == [
        "  unknown key 'lora.rnak'. Did you mean 'lora.rank'? Known here",
        "  lora.alpha",
        "  train.steps",
        "  eval.every",
    ]


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="No settings file at '.*absent.toml'"):
        load_config(tmp_path / "absent.toml")
    write(tmp_path, "")
    with pytest.raises(InputError, match="No settings file at '.*run'. Did you mean '.*run.toml'"):
        load_config(tmp_path / "run")
    with pytest.raises(InputError, match="No settings file"):
        load_config(tmp_path)


def test_check_config_names_the_source():
    config = dataclasses.replace(Config(), lora=LoraConfig(rank=-1))
    with pytest.raises(InputError, match="^command line: lora.rank: expected a number at least 0"):
        check_config(config, where="command line")


@given(
    st.fixed_dictionaries(
        {
            "rank": st.integers(1, 512),
            "alpha": st.floats(1e-3, 1e3),
            "rslora": st.booleans(),
            "targets": st.one_of(st.text(), st.lists(st.text()).map(tuple)),
            "rank_pattern": st.dictionaries(st.text(), st.integers(1, 9)),
        }
    )
)
def test_what_is_saved_reads_back(lora):
    config = from_table({"lora": lora})
    assert from_table(tomllib.loads(to_toml(config))) == config


def test_defaults_read_back(tmp_path):
    assert load_config(write(tmp_path, to_toml(Config()))) == Config()


def test_identity_leaves_out_what_only_observes():
    config = Config()
    elsewhere = dataclasses.replace(
        config, output="other", eval=dataclasses.replace(config.eval, every=3)
    )
    assert run_identity(elsewhere) == run_identity(config)
    other = dataclasses.replace(config, optim=OptimConfig(learning_rate=1.0))
    differ = {k for k, v in run_identity(other).items() if run_identity(config)[k] != v}
    assert differ == {"optim.learning_rate"}
    assert set(run_identity(config)) < set(flat_settings(config))
