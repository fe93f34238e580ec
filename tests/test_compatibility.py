# SPDX-License-Identifier: Apache-2.0
"""The README's table of families and formats is what the tests say that prove it."""

import runpy
import subprocess
import sys

from tests.helpers import ROOT

SCRIPT = ROOT / "docs" / "compatibility.py"


def test_the_table_is_what_tests_and_record_say():
    run = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_cell_says_what_a_test_that_passed_proves():
    proofs = [
        ("tests/a.py::test_x[llama]", "HF in", ("llama", "mistral")),
        ("tests/a.py::test_x[phi3]", "HF in", ("phi3",)),
        ("tests/b.py::test_y", "PEFT in", ("llama",)),
        ("tests/c.py::test_z", "PEFT in", ("llama",)),
    ]
    table = runpy.run_path(str(SCRIPT))["table"]

    def cells(passed: list[str]) -> dict[str, list[str]]:
        lines = table(proofs, passed).splitlines()
        links = dict(line.split(": ") for line in lines if line.startswith("["))
        rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
        found = {row[0].strip(" `"): [cell.strip(" |") for cell in row[1:]] for row in rows[1:]}
        for row in found.values():
            for i, cell in enumerate(row):
                says, _, number = cell.partition("][")
                row[i] = f"{says[1:]} {links['[' + number]}" if cell else ""
        return found

    all_of_them = cells([test for test, *_ in proofs])
    yes = 'yes tests/a.py "test_x"'
    assert [all_of_them[name][0] for name in ("llama", "mistral", "phi3", "qwen2")] == [
        yes, yes, yes, "",
    ]  # fmt: skip
    assert all_of_them["llama"][8] == 'yes tests/b.py "test_y"'
    some = cells(["tests/a.py::test_x[phi3]", "tests/b.py::test_y", "tests/gone.py::test"])
    assert some["llama"][0] == "" and some["phi3"][0] == yes
    assert some["llama"][8] == 'yes tests/b.py "test_y"'
