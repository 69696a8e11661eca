"""Launches that find what was compiled for such arguments: the same kernel that Triton would have found, and the
arguments of this launch. With a stand-in driver, so without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specdec_kernels import _native
from specdec_kernels.bench.host import STAND_IN

pytest.importorskip("triton")

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, y, SIZE: tl.constexpr, FLAG: tl.constexpr):
    pass
"""
CHECK = """
import sys, torch
from kernel import kernel
from specdec_kernels.bench.host import stand_in_driver
launched = []
stand_in_driver(lambda *arguments: launched.append(arguments))
from specdec_kernels.triton_kernels import launch
launch.INTERPRETED, launch.PLATFORM = False, "cuda"
memory = torch.zeros(64)
tensors = [memory, memory[4:], memory[1:], memory[2:], memory.bfloat16(), memory.long(), memory.int(), None]
numbers = [0, 1, 2, 3, 16, 32, -16, -5, 2**31 - 1, 2**31, 2**31 + 16, -2**31, 2**40, 1.0, 0.5, True, False]
for _ in range(2):
    for y in numbers + tensors:
        for x in tensors if y is not None and type(y) is int else tensors[:1]:
            for flag in (False, True):
                launch.launch(kernel, 3, x, y, SIZE=4, FLAG=flag, num_warps=2)
                ours = launched.pop()
                compiled = kernel[(3,)](x, y, SIZE=4, FLAG=flag, num_warps=2)
                theirs = launched.pop()
                assert len(ours) == len(theirs) and not launched
                # The seventh is made anew for who profiles.
                for at, (a, b) in enumerate(zip(ours, theirs)):
                    assert at == 6 or a is b or (not isinstance(a, torch.Tensor) and a == b), (at, x, y)
                assert ours[9] is x and ours[10] is y and ours[11:] == (4, flag)
                key = 0, launch.launch_key(x, y), 4, flag, 2
                assert launch._COMPILED[id(kernel)][key][0] is compiled, (x, y)
found = len(launch._COMPILED[id(kernel)])
assert found == len(launch._COMPILED[id(kernel)]) > 40
launch.launch(kernel, 3, memory, 2**63, SIZE=4, FLAG=True)  # of no known width: Triton looks
assert found == len(launch._COMPILED[id(kernel)]) and launched.pop()[10] == 2**63
print("done")
"""


def test_a_launch_finds_what_triton_would_find(tmp_path: Path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "check.py").write_text(CHECK)
    result = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, env=STAND_IN | {"PYTHONPATH": f"{Path.cwd()}:{tmp_path}"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-3000:]


def test_what_has_no_key():
    assert _native.launch_key(object()) is None
    assert _native.launch_key("text") is None
    assert _native.launch_key(1 << 63) is None
    assert _native.launch_key() == b""
