"""The programs of examples/ run as they stand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    run = run_python(path, PYTHONPATH=found)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
