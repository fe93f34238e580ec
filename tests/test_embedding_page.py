# SPDX-License-Identifier: Apache-2.0
"""What is said of embeddings in 4 bits is what was measured."""

import json
import runpy

import pytest

from .helpers import ROOT


def test_the_block_of_the_page_is_that_of_the_record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "benchmarks" / "embedding_cost.py"))
    page = (ROOT / "docs" / "numerics.md").read_text("utf-8")
    block = page.split(script["BEGIN"])[1].split(script["END"])[0]
    record = json.loads(script["RECORD"].read_text("utf-8"))
    assert block == script["render"](record)
    rows = {row["held"]: row for row in record["rows"]}
    plain, layers, everything = (rows[name] for name in script["HELD"])
    assert plain["divergence"] == 0 < layers["divergence"] < everything["divergence"]
    assert plain["mib"] > layers["mib"] > everything["mib"]
