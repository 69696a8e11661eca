"""The programs of examples/ run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_python

EXAMPLES = sorted((Path(__file__).parent.parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    run = run_python(str(path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
