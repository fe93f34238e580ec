# SPDX-License-Identifier: Apache-2.0
"""Which changes of settings are named when a step does not fit."""

from typing import Any

import pytest

from jax_qlora.config import Config, from_table, replaced
from jax_qlora.costs.advice import cheapest_changes, verdict
from jax_qlora.costs.formula import Bytes, estimate
from jax_qlora.costs.gpus import GIB
from jax_qlora.models.presets import LLAMA_2_7B
from jax_qlora.train.start import find_decoder_targets

TARGETS = find_decoder_targets(LLAMA_2_7B, Config())


def need(config: Config, seq: int) -> Bytes:
    return estimate(LLAMA_2_7B, config, None if config.method == "full" else TARGETS, seq=seq)


def changes(config: Config, limit: float, *, seq: int = 512, **options: Any):
    return cheapest_changes(need, config, seq=seq, limit=limit, **options)


def test_words_for_what_fits():
    assert verdict(7 * GIB, 8 * GIB) == "fits"
    assert verdict(7 * GIB + 1, 8 * GIB) == "tight" == verdict(8 * GIB, 8 * GIB)
    assert verdict(8 * GIB + 1, 8 * GIB) == "does not fit"


def test_the_cheapest_that_fit_each_in_its_mildest_form():
    config = from_table({"train": {"batch_size": 8}})

    def bytes_with(seq: int = 512, **values: Any) -> int:
        settings = {key.replace("__", "."): value for key, value in values.items()}
        return need(replaced(config, settings), seq).device

    limit = bytes_with(train__batch_size=2, train__accumulate=4)
    found = changes(config, limit, count=9)
    assert str(found[0]) == "train.batch_size = 2, train.accumulate = 4"
    assert bytes_with(train__batch_size=4, train__accumulate=2) > limit
    values = {key: value for x in found for key, value in x.settings.items()}
    assert all(x.needed.device <= limit for x in found)
    longest = values["data.max_length"]  # one notch milder does not fit
    assert longest % 32 == 0 and bytes_with(longest) <= limit < bytes_with(longest + 32)
    stages = ["none", "dots", "full", "offload"]
    for milder in stages[: stages.index(values["train.remat"])]:
        assert bytes_with(train__remat=milder) > limit
    alone = [("optim.placement", "host"), ("optim.state", "8bit"), ("quant.streamed", True),
             ("lora.rank", 1)]  # fmt: skip
    for key, strongest in alone:  # what is not named does not suffice
        assert (key in values) == (need(replaced(config, {key: strongest}), 512).device <= limit)
    assert changes(config, limit) == found[:3]


def test_what_changes_no_result_comes_first():
    config = from_table({"train": {"batch_size": 1}, "lora": {"rank": 64}})
    short = need(config, 512).device - 200 * (1 << 20)
    named = [next(iter(x.settings)) for x in changes(config, short, count=9)]
    assert named == [
        "optim.placement", "optim.state", "train.remat", "quant.streamed", "quant.embeddings",
        "lora.rank", "data.max_length",
    ]  # fmt: skip
    assert [next(iter(x.settings)) for x in changes(config, short)] == named[:3]


def test_without_host_memory_of_its_own_nothing_is_sent_there():
    config = from_table({"train": {"batch_size": 1}, "lora": {"rank": 64}})
    short = need(config, 512).device - 200 * (1 << 20)
    named = [str(x) for x in changes(config, short, host=False, count=9)]
    assert named and not any("host" in x or "offload" in x or "streamed" in x for x in named)


def test_changes_add_up_where_none_suffices():
    config = from_table({"train": {"batch_size": 8}, "lora": {"rank": 64}})
    least = {"train.batch_size": 1, "optim.placement": "host", "train.remat": "offload"}
    limit = need(replaced(config, least), 512).device
    (both,) = changes(config, limit)
    assert least == {key: both.settings[key] for key in least}
    assert both.needed.device <= limit
    assert need(replaced(config, both.settings), 512).device == both.needed.device
    assert changes(config, GIB // 4) == []


def test_full_fine_tuning_is_shown_the_way_to_an_adapter():
    config = from_table({"method": "full", "train": {"batch_size": 1, "remat": "full"}})
    (first, *_) = changes(config, 16 * GIB)
    assert str(first) == 'method = "lora"' and first.cost.startswith("an adapter trains")


def test_nothing_is_advised_that_a_run_would_refuse():
    """cuDNN's attention takes rows whole; the rank of an adapter to go on from is given."""
    table = {"train": {"attention": "cudnn", "remat": "none"}, "lora": {"adapter": "somewhere"}}
    found = changes(from_table(table), 8 * GIB, count=20)
    settings = {key for change in found for key in change.settings}
    assert settings and not settings & {"lora.rank", "train.layer_chunk"}
    assert all(c.settings.get("train.remat", "dots") == "dots" for c in found)


@pytest.mark.parametrize("batch", [pytest.param(6, marks=pytest.mark.slow), 7])
def test_parts_of_a_batch_are_equal(batch):
    """And so every optimizer step sees as many examples as before."""
    config = from_table({"train": {"batch_size": batch, "accumulate": 2}})
    seen = 0
    for limit in (6, 8, 11, 15, 20, 26):
        for change in changes(config, limit * GIB):
            if "train.accumulate" in change.settings:
                parts = change.settings["train.batch_size"] * change.settings["train.accumulate"]
                assert parts == 2 * batch
                seen += 1
    assert seen


def test_every_change_is_a_setting_that_can_be_written():
    """What is printed can be put into the TOML file or the command line as it is."""
    import tomllib

    config = from_table({"train": {"batch_size": 8}, "quant": {"double_quant": False}})
    for x in changes(config, 12 * GIB, count=9):
        lines = str(x).replace(", ", "\n")
        table: dict[str, Any] = tomllib.loads(lines)
        merged = replaced(config, x.settings)
        for section, values in table.items():
            for key, value in values.items():
                assert getattr(getattr(merged, section), key) == value
