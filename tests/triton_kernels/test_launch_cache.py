"""Launches that find what was compiled for such arguments: the same kernel that Triton would have found, and the
arguments of this launch; and its scratch. With a stand-in driver, so without a GPU."""

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
stand_in_driver(lambda *_: lambda *arguments: launched.append(arguments))
from specdec_kernels.triton_kernels import launch
launch.INTERPRETED, launch.PLATFORM = False, "cuda"
memory = torch.zeros(64)
tensors = [memory, memory[4:], memory[1:], memory[2:], memory.bfloat16(), memory.long(), memory.int(), None]
numbers = [0, 1, 2, 3, 16, 32, -16, -5, 2**31 - 1, 2**31, 2**31 + 16, -2**31, 2**40, 1.0, 0.5, True, False]
for _ in range(2):
    for y in numbers + tensors:
        for x in tensors if y is not None and type(y) is int else tensors[:1]:
            for flag in (False, True):
                launch.launch(kernel, 3, x, y, FLAG=flag, SIZE=4, num_warps=2)
                ours = launched.pop()
                compiled = kernel[(3,)](x, y, SIZE=4, FLAG=flag, num_warps=2)
                theirs = launched.pop()
                assert len(ours) == len(theirs) and not launched
                # The seventh is made anew for who profiles.
                for at, (a, b) in enumerate(zip(ours, theirs)):
                    assert at == 6 or a is b or (not isinstance(a, torch.Tensor) and a == b), (at, x, y)
                assert ours[9] is x and ours[10] is y and ours[11:] == (4, flag)
                key = 0, launch.launch_key(x, y), flag, 4, 2
                assert launch._COMPILED[id(kernel)][key][0] is compiled, (x, y)
found = len(launch._COMPILED[id(kernel)])
assert found == len(launch._COMPILED[id(kernel)]) > 40
launch.launch(kernel, 3, memory, 2**63, SIZE=4, FLAG=True)  # of no known width: Triton looks
assert found == len(launch._COMPILED[id(kernel)]) and launched.pop()[10] == 2**63
print("done")
"""


LAUNCHERS = """
import torch
from triton.runtime.jit import JITFunction
from specdec_kernels import sample, sample_children, triton_kernels, verify_chain, verify_tree
from specdec_kernels.bench import host
from specdec_kernels.contract import MaskFormat
host._stand_in("triton")
looked, found = [], []
class Compiled:
    def __init__(self, kernel):
        self.names = kernel.arg_names
    def __getitem__(self, grid):
        return lambda *arguments: found.append((self, grid, dict(zip(self.names, arguments, strict=True))))
def look(kernel, *arguments, grid, warmup, **named):
    looked.append((Compiled(kernel), (*grid, 1, 1), dict(zip(kernel.arg_names, arguments)) | named))
    return looked[-1][0]
JITFunction.run = look
target, keys, tokens = torch.zeros(3, 4, 1000), torch.arange(3), torch.zeros(3, 4, dtype=torch.int64)
parents, common = torch.arange(-1, 3).repeat(3, 1), dict(seed=keys, position=keys, backend="triton")
mask = torch.full((3, 32), -1, dtype=torch.int32)
calls = [
    lambda: verify_chain(target, tokens[:, 1:], **common),
    lambda: verify_chain(target, tokens[:, 1:], rule="block", logprobs=True, **common),
    lambda: verify_tree(target, tokens, parents, **common),
    lambda: verify_tree(target, tokens, parents, target, draft_temperature=1.0, rule="traversal", siblings="iid",
                        **common),
    lambda: sample(target[:, 0], bitmask=mask, row=keys, **common),
    lambda: sample_children(target[:, 0], 2, method="race", row=keys, **common),
]
for call in calls:
    first, again = call(), call()
    (_, grid, arguments), (compiled, same_grid, same) = looked.pop(), found.pop()
    assert not looked and not found, "one launch a call, and one look for two"
    options = {"num_warps": 8, "maxnreg": arguments["maxnreg"]}
    assert grid == same_grid and arguments.keys() == same.keys() | options.keys()
    results = [x.data_ptr() for x in (*first, *again) if x.numel()]
    assert len(set(results)) == len(results), "each result has memory of its own"
    for name, value in same.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == arguments[name].dtype and value.stride() == arguments[name].stride()
            assert (value.data_ptr() != arguments[name].data_ptr()) == (value.data_ptr() in results), name
        else:
            assert value == arguments[name], name
mask, tree = torch.empty(1, 1024, 70_000, dtype=torch.bool, device="meta"), torch.zeros(1, 1024, dtype=torch.int64)
triton_kernels.tree_mask(mask, tree, None, MaskFormat.DENSE)
((_, grid, _),) = looked
assert grid[0] > 65_535 >= max(grid[1:]), "a GPU has more programs than that in the first dimension alone"
print("done")
"""
SCRATCH = """
import torch
from types import SimpleNamespace
from triton.runtime.driver import driver
from specdec_kernels.bench.host import stand_in_driver
stand_in_driver(lambda *_: lambda *_: None)
from specdec_kernels.triton_kernels import launch
launch.INTERPRETED = False
real = launch._new_scratch
launch._new_scratch = lambda device, *sizes: real(torch.device("cpu"), *sizes)
first, second = (SimpleNamespace(type="cuda", index=index) for index in (0, 1))
capturing = False
torch.cuda.is_current_stream_capturing = lambda: capturing
own = launch.scratch(first, 3, 5, 7)
assert [(x.shape[0], x.dtype) for x in own] == [(3, torch.int32), (5, torch.float64), (7, torch.float32)]
assert launch.scratch(first, 2, 5, 1) is own and not own[0].any()
for larger in ((4, 1, 1), (1, 6, 1), (1, 1, 8)):
    grown = launch.scratch(first, *larger)
    assert grown is not own and launch.scratch(first, 3, 5, 7) is grown and not grown[0].any()
    own = grown
assert [x.shape[0] for x in own] == [4, 6, 8], "what a call asks for takes nothing from another"
assert launch.scratch(second, 3, 5, 7) is not own
driver.active.get_current_stream = lambda device: 8
other = launch.scratch(first, 3, 5, 7)
assert other is not own and launch.scratch(first, 3, 5, 7) is other
capturing = True
of_graph = launch.scratch(first, 3, 5, 7)
assert of_graph is not other and launch.scratch(first, 3, 5, 7) is not of_graph
capturing = False
assert launch.scratch(first, 3, 5, 7) is other, "a graph's is not kept"
launch.INTERPRETED = True
assert launch.scratch(first, 3, 5, 7) is not other
print("done")
"""


@pytest.mark.parametrize("check", [CHECK, LAUNCHERS, SCRATCH], ids=["launch", "launchers", "scratch"])
def test_launches_without_a_gpu(tmp_path: Path, check: str):
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "check.py").write_text(check)
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
