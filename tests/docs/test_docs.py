"""What the documentation shows runs, its links resolve, and its tables are current."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import versions

import specdec_kernels
from specdec_kernels import ops, workspace
from specdec_kernels.cli.main import app
from specdec_kernels.ops import attention, kv, token_counts, tree_rules, trees

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "training", "bench/results")
    for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize(
    ("module", "least"),
    [
        (ops, 4), (workspace, 2), (trees, 4), (tree_rules, 2), (kv, 1), (attention, 1), (token_counts, 8),
    ],
)  # fmt: skip
def test_docstrings(module, least):
    results = doctest.testmod(module)
    assert results.attempted >= least
    assert results.failed == 0


def test_every_function_says_what_it_raises():
    functions = [x for name in specdec_kernels.__all__ if inspect.isfunction(x := getattr(specdec_kernels, name))]
    assert len(functions) >= 13
    for function in functions:
        said = inspect.getdoc(function).partition("\n\nRaises:\n")[2]
        assert said.startswith("    TypeError, ValueError: "), function
        assert ("RuntimeError" in said) == ("backend" in inspect.signature(function).parameters), function


def run_blocks(page: str) -> list[dict[str, Any]]:
    """The names that each block of Python of a page leaves; each stands alone."""
    text = (ROOT / page).read_text()
    if not torch.cuda.is_available():
        text = text.replace('"cuda"', '"cpu"')
    torch.manual_seed(0)
    scopes: list[dict[str, Any]] = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        scopes.append({})
        exec(block, scopes[-1])
    return scopes


def test_the_readmes_examples():
    chain, ragged, decoded = run_blocks("README.md")
    assert chain["verified"].tokens.shape == (1, 5)
    assert chain["verified"].valid.all()
    assert ragged["verified"].tokens.shape == (2, 5)
    assert ragged["verified"].num_proposed.tolist() == [4, 1]
    for result in decoded["results"]:
        assert result.finished == "stop" or (result.finished == "length" and len(result.tokens) == 32)
    assert decoded["ids"].shape[1] <= 37


def test_the_example_of_trees():
    (step,) = run_blocks("docs/trees.md")
    assert step["verified"].tokens.shape == (1, 3)
    assert step["mask"].shape == (1, 3, 3)
    assert step["positions"].tolist() == [[11, 12, 12]]


def test_the_examples_of_decoding():
    decoded, sourced = run_blocks("docs/decoding.md")
    assert 2 <= decoded["statistics"].emitted <= 36
    assert all(1 <= len(result.tokens) <= 24 for result in sourced["results"])


def test_the_readme_names_the_versions_that_are_compiled():
    readme = (ROOT / "README.md").read_text()
    for name, tried in (("Python", versions.PYTHONS), ("torch", versions.TORCHES), ("Triton", versions.TRITONS)):
        first, last = (".".join(each.split(".")[:2]) for each in (tried[0], tried[-1]))
        assert f"{name} {first} to {last}" in readme
    gcc, clang = (next(each for each in versions.COMPILERS if each.startswith(name)) for name in ("g++", "clang++"))
    assert f"gcc {gcc.split('-')[1]} or clang {clang.split('-')[1]} and later" in readme


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for name in re.findall(
        r"`((?:csrc|tests|docs|bench|examples|training|specdec_kernels|triton_kernels)/[\w./-]+\.\w+)`", text
    ):
        assert (ROOT / name).exists(), name


def features() -> list[list[str]]:
    """The rows of the table of features: feature, what shows it, test."""
    rows = re.findall(r"^\| (.+) \|$", (ROOT / "docs" / "features.md").read_text(), re.MULTILINE)
    return [row.split(" | ") for row in rows if not row.startswith("feature ")]


def test_every_feature_has_a_test_and_something_that_shows_it():
    """A function of that name in the file that is linked; a program, a page, or a command that there is."""
    rows = features()
    assert len(rows) > 30
    command_line = typer.main.get_command(app)
    for feature, shown, tests in rows:
        links = re.findall(r"\[(\w+)\]\(\.\./(tests/[^)]+)\)", tests)
        assert links, feature
        for name, path in links:
            assert f"def {name}(" in (ROOT / path).read_text(), feature
        if command := re.fullmatch(r"`(\w+) (.+)`", shown):
            program, arguments = command[1], shlex.split(command[2])
            if program == "make":
                assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(), feature
            else:
                assert program == "specdec", feature
                called = command_line.commands[arguments[0]]
                called.make_context(arguments[0], arguments[1:])  # an error where it does not take that
        else:
            assert re.fullmatch(r"\[\w+\.(py|md)\]\([\w./#-]+\)", shown), feature


def test_every_example_is_in_the_table_of_features():
    shown = " ".join(row[1] for row in features())
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f"examples/{path.name})" not in shown] == []


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text())
        new |= {(page.parent / link).resolve() for link in links} - reached
    assert {str(page.relative_to(ROOT.resolve())) for page in map(Path.resolve, reached)} == set(PAGES)


@pytest.mark.parametrize("page", ["api.md", "modules.md"])
def test_what_is_written_from_docstrings_is_current(page):
    make = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["PAGES"][page]
    assert (ROOT / "docs" / page).read_text() == make(), "run `make docs`"
