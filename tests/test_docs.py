"""What the documentation shows runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from specdec_kernels import ops
from specdec_kernels.ops import attention, head, kv, tree_rules, trees, workspace

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("module", "least"), [(ops, 4), (trees, 4), (tree_rules, 2), (kv, 1), (attention, 1), (head, 1), (workspace, 2)]
)
def test_docstrings(module, least):
    results = doctest.testmod(module)
    assert results.attempted >= least
    assert results.failed == 0


def test_the_readmes_first_example():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(blocks[0], scope)
    verified = scope["verified"]
    assert verified.tokens.shape == (1, 5)
    assert bool(verified.valid.all())
    tree = next(block for block in blocks if "verify_tree" in block)
    exec(tree, scope)
    assert scope["verified"].tokens.shape == (1, 3)


@pytest.mark.parametrize("path", ["README.md", "training/README.md", "docs/noise.md", "docs/integrations.md"])
def test_links_and_paths_exist(path):
    text = (ROOT / path).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / path).parent / link).exists(), link
    for name in re.findall(
        r"`((?:csrc|tests|docs|bench|training|specdec_kernels|triton_kernels)/[\w./-]+\.\w+)`", text
    ):
        assert (ROOT / name).exists(), name
