# SPDX-License-Identifier: Apache-2.0
"""The page of the step benchmark: written from a record, every measured side on it."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "speed.py"))


def test_the_page_is_what_was_measured():
    record = json.loads((ROOT / "docs" / "speed.json").read_text("utf-8"))
    text = (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert SCRIPT["page"](record) == text


def test_page_and_picture():
    names = "layers hidden intermediate heads kv_heads vocab batch seq rank cpus rounds"
    rows = [
        {
            "dtype": dtype,
            "remat": remat,
            "side": side,
            "step_s": 1.25 + number,
            "nf4_ratio": 0.75,
            "start_s": 5.0,
            "peak_mib": 512.0,
            "train_peak_mib": 400.0,
            "versions": "library 1.2",
        }
        for dtype in ("float32", "bfloat16")
        for remat in ("none", "full")
        for number, side in enumerate(("jax_qlora NF4", "Qwix"))
    ]
    record = {"about": dict.fromkeys(names.split(), 2) | {"machine": "some kind"}, "rows": rows}
    page = SCRIPT["page"](record)
    assert "| float32, kept | jax_qlora NF4 | 1.250 | 0.75 | 5.0 | 512 | 400 |" in page
    assert "| bfloat16, recomputed | Qwix | 2.250 | 0.75 | 5.0 | 512 | 400 |" in page
    assert "measured on 2 CPUs of some kind." in page and "| Qwix | library 1.2 |" in page
    assert SCRIPT["picture"](record).startswith(b"\x89PNG")
