# SPDX-License-Identifier: Apache-2.0
"""The README's table of families and formats, from the tests that prove them.

    python docs/compatibility.py [arguments of pytest]   runs those tests, records, writes the table
    python docs/compatibility.py --check                 the table is what tests and record say

A test proves something by its marker: `@pytest.mark.proves("GGUF in", "qwen3")`, or without a
family where a parameter `family`, or `name` of a golden model, says it. `docs/compatibility.json`
records which of them have passed. Those that need a library which is not installed are skipped and
keep what is recorded of them, so run this in an environment that has them all, or in several.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RECORD = ROOT / "docs" / "compatibility.json"
BEGIN, END = "<!-- written by docs/compatibility.py -->\n", "<!-- end of compatibility -->\n"
COLUMNS = (
    "HF in", "HF out", "bnb in", "bnb out", "GGUF in", "GGUF out", "GGUF LoRA in", "GGUF LoRA out",
    "PEFT in", "PEFT out",
)  # fmt: skip

Proof = tuple[str, str, tuple[str, ...]]
"""A test's id; the column and the families."""


class Collected:
    """A plugin of pytest: the tests that prove something, and how they went."""

    def __init__(self) -> None:
        self.proofs: list[Proof] = []
        self.results: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Reads the markers, before tests are chosen among."""
        for item in items:
            for mark in item.iter_markers("proves"):
                self.proofs.append(proof(item, mark))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the worst of a test's three phases."""
        if report.when == "call" or report.outcome != "passed":
            self.results[report.nodeid] = report.outcome


def proof(item: pytest.Item, mark: pytest.Mark) -> Proof:
    """What a marked test proves."""
    column, *families = mark.args
    if column not in COLUMNS:
        raise pytest.UsageError(f"{item.nodeid} proves '{column}': expected one of {COLUMNS}")
    if not families:
        values: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        families = [values["family"] if "family" in values else model_type(values["name"])]
    return item.nodeid, column, tuple(families)


def model_type(name: str) -> str:
    """The family of a golden model."""
    config = ROOT / "tests" / "golden" / "models" / name / "config.json"
    return json.loads(config.read_text("utf-8"))["model_type"]


def run(arguments: list[str]) -> Collected:
    """Collects or runs the tests that prove something."""
    os.chdir(ROOT)
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.proves" in path.read_text("utf-8")
    )
    plugin = Collected()
    options = ["-m", "proves", "-q", "-p", "no:cacheprovider", *arguments]
    status = pytest.main([*files, *options], plugins=[plugin])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {status!r}")
    return plugin


def table(proofs: list[Proof], passed: list[str]) -> str:
    """The block of the README: a cell says what a test that passed proves, with a link to it."""
    from jax_qlora.interop.hf_families import FAMILIES

    cells: dict[tuple[str, str], str] = {}
    links: dict[str, int] = {}
    for test, column, families in sorted(proofs):
        if test not in passed:
            continue
        file, _, name = test.partition("::")
        link = f'{file} "{name.partition("[")[0]}"'
        for family in families:
            if (family, column) not in cells:
                cells[family, column] = f"[yes][{links.setdefault(link, len(links) + 1)}]"
    lines = [f"| `model_type` | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        row = [cells.get((family, column), "") for column in COLUMNS]
        lines.append(f"| `{family}` | {' | '.join(row)} |")
    lines += ["", *(f"[{number}]: {link}" for link, number in links.items())]
    return "\n".join(lines) + "\n"


def block(page: str) -> tuple[str, str, str]:
    """A page as what stands before, between and after the markers."""
    before, _, rest = page.partition(BEGIN)
    middle, _, after = rest.partition(END)
    return before, middle, after


def main(arguments: list[str]) -> int:
    """Checks, or runs, records and writes."""
    recorded = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else []
    if arguments == ["--check"]:
        _, written, _ = block(README.read_text("utf-8"))
        if written != table(run(["--collect-only", "-q"]).proofs, recorded):
            print("README.md: the table of formats is not what tests and docs/compatibility.json")
            print("say: expected that of `python docs/compatibility.py`. Run it, and commit both.")
            return 1
        return 0
    found = run(arguments)
    there = {test for test, *_ in found.proofs}
    passed = there & set(recorded)
    for test, result in found.results.items():
        if result == "passed":
            passed.add(test)
        elif result == "failed":
            passed.discard(test)
    RECORD.write_text(json.dumps(sorted(passed), indent=1) + "\n", "utf-8")
    before, _, after = block(README.read_text("utf-8"))
    README.write_text(before + BEGIN + table(found.proofs, list(passed)) + END + after, "utf-8")
    return 1 if "failed" in found.results.values() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
