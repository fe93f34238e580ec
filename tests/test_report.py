# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import stat
import time

import numpy as np
import pytest
from rich.console import Console

from jax_qlora.errors import InputError
from jax_qlora.report import (
    Display,
    Metrics,
    draw_losses,
    read_metrics,
    write_json,
    write_page,
    write_text,
)
from jax_qlora.report.figure import smooth

RECORDS = [
    {"step": 0, "held_out_loss": 2.0},
    {"step": 1, "loss": 1.9},
    {"step": 2, "loss": 1.5},
    {"step": 2, "held_out_loss": 1.4},
]


def test_metrics_are_appended_and_read_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = Metrics(path)
    for record in RECORDS:
        metrics.add(**record)
        assert read_metrics(path) == metrics.records
    assert metrics.add(step=3, loss=float("nan")) == metrics.records[-1]
    assert read_metrics(path)[-1] == {"step": 3, "loss": None}


def test_a_resumed_record_drops_what_will_happen_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for record in RECORDS:
        first.add(**record)
    assert Metrics(path, resume_step=1).records == RECORDS[:2]
    assert read_metrics(path) == RECORDS[:2]
    assert Metrics(path).records == []
    assert read_metrics(path) == []


def test_a_line_cut_short_is_left_out_and_another_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(
        InputError, match="metrics.jsonl' line 2: expected a JSON object with a step"
    ):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match="line 1: expected a JSON object with a step"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"loss": float("inf"), "text": "é", "list": [1.5, (2,)]})
    assert json.loads(path.read_text()) == {"loss": None, "text": "é", "list": [1.5, [2]]}
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"a.json' \(3 bytes\): .*No space left on device. Make"):
        write_text(path, "new")
    assert json.loads(path.read_text())["text"] == "é"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_metrics_file_that_cannot_be_written(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.unlink()
    metrics.path.mkdir()
    with pytest.raises(InputError, match="Cannot write '.*metrics.jsonl'"):
        metrics.add(step=1)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_loss_curve_is_a_picture_from_the_first_record_on(count):
    picture = draw_losses(RECORDS[:count], title="a run")
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000


def test_smoothing_has_no_bias():
    np.testing.assert_allclose(smooth(np.full(5, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(2.0, 1.0, 500)
    assert abs(smooth(noisy)[-1] - 2.0) < 1.0
    assert smooth(noisy)[20:].std() < 0.5


def test_the_page_needs_nothing_else_and_escapes(tmp_path):
    path = tmp_path / "report.html"
    sample = {"prompt": "<b>thou</b>", "base": "&", "tuned": "you", "reference": "You."}
    write_page(
        path,
        title="a <run>",
        figures={"loss": "2.0 → 1.4"},
        picture=draw_losses(RECORDS, title="a run"),
        samples=[sample],
        notes=["One run."],
        settings='model = "x"',
    )
    text = path.read_text()
    assert "a &lt;run&gt;" in text and "&lt;b&gt;thou&lt;/b&gt;" in text and "<b>thou" not in text
    assert "2.0 → 1.4" in text and "data:image/png;base64,iVBOR" in text
    assert "http" not in text and "<script" not in text


def test_a_log_gets_plain_lines():
    file = io.StringIO()
    with Display(Console(file=file, width=40)) as show:
        show.print("[not markup] " + "x" * 60)
        with show.phase("Training", 3) as phase:
            for step in (1, 2, 3):
                phase.update(step, f"loss {step}")
        with show.phase("Held-out loss", 2, brief=True) as phase:
            phase.update(1)
        show.field("prompt", "[/] verse")
    lines = file.getvalue().splitlines()
    assert lines == [
        "[not markup] " + "x" * 60,
        "Training: 3",
        "Training 1/3  loss 1",
        "Training 3/3  loss 3",
        "    prompt  [/] verse",
    ]


def test_a_terminal_gets_a_bar():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with Display(console) as show, show.phase("Training", 4, done=2) as phase:
        phase.update(3, "loss 1.25")
        show.print("stays")
        time.sleep(0.3)  # it is drawn ten times a second
    assert "loss 1.25" in file.getvalue() and "3/4" in file.getvalue()
    assert "stays" in file.getvalue()
