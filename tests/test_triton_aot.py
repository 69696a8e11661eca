"""Triton kernels compiled for GPUs that are not here: no spills, 16-byte loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROBE = """
import dataclasses, json, sys
from specdec_kernels.triton_kernels import aot
print(json.dumps([dataclasses.asdict(aot.usage(variant, sys.argv[1])) for variant in aot.variants(sys.argv[1])]))
"""


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def usage(target: str) -> list[dict[str, Any]]:
    # Its own process: an interpreted kernel cannot be compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE, target], capture_output=True, text=True, env=environment, timeout=900
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_loads(target):
    kernels = usage(target)
    assert len(kernels) == (31 if target == "sm_90" else 22)
    for kernel in kernels:
        assert kernel["spill_bytes"] == 0, kernel
        if target.startswith("sm_") and kernel["kernel"].startswith(("sample", "verify", "tree_attention bf16")):
            assert kernel["widest_load_bits"] == 128, kernel
