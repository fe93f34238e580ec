# SPDX-License-Identifier: Apache-2.0
"""What the project promises about itself: metadata, documentation, configs, layers."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_qlora as jq
from tests.helpers import ROOT

MODULES = sorted((ROOT / "jax_qlora").rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("jax_qlora", "tests", "benchmarks", "colab", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert importlib.metadata.version("jax-qlora") == version == jq.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## \[(Unreleased|{version})\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "jax_qlora" / "py.typed").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_name_their_license(path: Path):
    lines = path.read_text().splitlines()
    head = lines if "colab" in path.parts else lines[:1]  # a notebook's text starts with its header
    assert "# SPDX-License-Identifier: Apache-2.0" in head


def test_the_core_needs_only_jax_and_numpy():
    run = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "tests" / "core_alone.py", "--hide"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ok")


def test_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_public_name_is_documented():
    undocumented = [
        name
        for name in dir(jq)
        if name[0].islower() and name != "jaxtyping"  # put there by the tests' import hook
        if not (getattr(jq, name).__doc__ or "")
    ]
    assert not undocumented


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Public functions and methods, without those defined inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def raises(function: ast.FunctionDef) -> bool:
    """Whether the function's own body raises something new."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            todo.extend(ast.iter_child_nodes(node))
    return False


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_functions_say_what_they_raise(path: Path):
    silent = [
        function.name
        for function in functions(ast.parse(path.read_text()))
        if raises(function) and "Raises:" not in (ast.get_docstring(function) or "")
    ]
    assert not silent, f"no `Raises:` in the docstring of {', '.join(silent)}"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [(page, i) for page in PAGES for i in range(len(python_blocks(page)))]


@pytest.mark.parametrize(("page", "i"), SNIPPETS, ids=lambda x: getattr(x, "name", None))
def test_snippets_run(page: Path, i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(page)[i], f"{page.name}[{i}]", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    targets += re.findall(r'(?:src|href)="([^"#]+)"', page.read_text())
    broken = [
        target
        for target in targets
        if not target.startswith(("http", "mailto")) and not (page.parent / target).exists()
    ]
    assert not broken
