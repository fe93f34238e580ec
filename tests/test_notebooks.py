# SPDX-License-Identifier: Apache-2.0
"""Notebooks are their reviewed text, and run from the first cell to the last in smoke mode."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

TEXTS = sorted((ROOT / "colab").glob("*.py"))


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_notebook_is_its_text_without_outputs(text: Path):
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    want = [(cell.cell_type, cell.source) for cell in jupytext.read(text).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == want, (
        "run `make notebooks`"
    )
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.filterwarnings("default")  # of the notebook machinery; the kernel is another process
@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_notebook_runs_in_smoke_mode(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMOKE", str(ROOT / "tests" / "golden" / "models" / "llama"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
