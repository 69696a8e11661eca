"""Triton kernels compiled as the launchers launch them, for GPUs that are not here: no spills, 16-byte loads."""

from __future__ import annotations

import pytest
import versions


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_spills_and_wide_loads(target):
    everything = target == "sm_90"
    found = versions.kernels(target, *([] if everything else ["--largest"]))
    assert len(found) == (29 if everything else 19)
    assert not versions.flaws(found)
    if everything:
        chains = {each["variant"] for each in found if each["call"].startswith("verify_chain token bf16")}
        assert len(chains) == 2, "one kernel for all kinds of drafts, and one where logits are processed"
        assert len({each["variant"] for each in found}) == 26


@pytest.mark.parametrize("version", [versions.TRITONS[0], versions.TRITONS[-1]])
def test_the_oldest_and_the_newest_triton(version):
    found = versions.kernels("sm_90", "--largest", triton=versions.unpacked("triton", version))
    assert len(found) == 19
    assert not versions.flaws(found)
