"""What the documentation shows runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from specdec_kernels import ops

ROOT = Path(__file__).parent.parent


def test_docstrings():
    results = doctest.testmod(ops)
    assert results.attempted >= 4
    assert results.failed == 0


def test_the_readmes_first_example():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    scope: dict[str, object] = {}
    exec(code, scope)
    verified = scope["verified"]
    assert verified.tokens.shape == (1, 5)
    assert bool(verified.valid.all())


@pytest.mark.parametrize("path", ["README.md", "training/README.md", "docs/noise.md"])
def test_links_and_paths_exist(path):
    text = (ROOT / path).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / path).parent / link).exists(), link
    for name in re.findall(
        r"`((?:csrc|tests|docs|bench|training|specdec_kernels|triton_kernels)/[\w./-]+\.\w+)`", text
    ):
        assert (ROOT / name).exists(), name
