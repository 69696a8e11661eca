"""Triton kernels compiled as the launchers launch them, for GPUs that are not here: no spills, 16-byte loads."""

from __future__ import annotations

import pytest
import versions


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_spills_and_wide_loads(target):
    everything = target == "sm_90"
    found = versions.kernels(target, *([] if everything else ["--largest"]))
    assert len(found) == (32 if everything else 23)
    assert not versions.flaws(found)


@pytest.mark.parametrize("version", [versions.TRITONS[0], versions.TRITONS[-1]])
def test_the_oldest_and_the_newest_triton(version):
    found = versions.kernels("sm_90", "--largest", triton=versions.unpacked("triton", version))
    assert len(found) == 23
    assert not versions.flaws(found)
