"""Triton kernels compiled as the launchers launch them, for GPUs that are not here: no spills in loops, 16-byte
loads.

A kernel takes a compiler seconds: ``make test`` compiles the largest of each kind for one GPU, and smaller ones for the
others and by other Tritons; ``make test-all`` all of them.
"""

from __future__ import annotations

from itertools import product

import pytest
import versions
from forms import EVERYTHING

pytestmark = pytest.mark.slow

KINDS = (
    "noise_words", "tree_mask dense", "tree_attention", "compact_kv paged", "sample bf16 full",
    "sample_children without_replacement full",
    "verify_chain block bf16 statistics full", "verify_tree traversal statistics full",
)  # fmt: skip


def check(targets, calls, everything, triton=None):
    """``calls``, or what ``everything`` names."""
    found = versions.kernels(*targets, *(everything if EVERYTHING else ("--calls", *calls)), triton=triton)
    assert {(each["target"], each["call"]) for each in found} >= set(product(targets, calls))
    assert not versions.flaws(found)
    if EVERYTHING and not everything:
        chains = {each["variant"] for each in found if each["call"].startswith("verify_chain token bf16")}
        assert len(chains) == 2, "one kernel for all kinds of drafts, and one where logits are processed"
        assert len({each["variant"] for each in found}) == 28


def test_no_spills_and_wide_loads():
    check(["sm_90"], KINDS, ())


def test_other_gpus():
    check(["sm_80", "sm_100", "gfx942"], ["sample bf16 full"], ["--largest"])


@pytest.mark.parametrize("version", [versions.TRITONS[0], versions.TRITONS[-1]])
def test_the_oldest_and_the_newest_triton(version):
    calls = ["verify_chain token bf16 statistics"]
    check(["sm_90"], calls, ["--largest"], triton=versions.unpacked("triton", version))
