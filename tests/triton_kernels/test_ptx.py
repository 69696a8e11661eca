"""Kernels as they are compiled for a GPU, executed on a CPU in orders drawn by chance: every decision as the oracle's,
and all that programs hand each other is ordered. And the machine that executes them notices where it is not."""

from __future__ import annotations

import json
import random

import ptx
import pytest
import torch
import versions
from forms import EVERYTHING

from specdec_kernels import selftest

#: Of the self-test on a GPU: programs that share rows, that follow a path, and that wait for each other.
CALLS = ["sample", "verify_chain token", "verify_tree recursive"]
if EVERYTHING:
    CALLS = [name for name, _ in selftest.gpu.calls("reference", torch.arange(3)) if "workspace" not in name]

HEAD = ".visible .entry kernel(\n.param .u64 kernel_param_0\n)\n"
#: Lane 0 of each warp goes on; %p1: whether it is of the first warp, %p2: of the first block.
BEGIN = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; ld.param.b64 %rd1, [kernel_param_0];
and.b32 %r3, %r1, 31; setp.ne.b32 %p3, %r3, 0; setp.lt.u32 %p1, %r1, 32; setp.eq.b32 %p2, %r2, 0;
"""


def run(code, warps=2, blocks=1):
    memory = torch.zeros(4, dtype=torch.int32)
    program = ptx.Program(HEAD + BEGIN + code)
    for seed in range(20):
        memory.zero_()
        program.run((blocks, 1, 1), warps, 1024, [memory.data_ptr()], [memory], ptx.Machine(random.Random(seed)))
    return memory.tolist()


@pytest.mark.parametrize(("barrier", "ordered"), [("bar.sync 0;", True), ("", False)])
def test_shared_memory_is_handed_over_by_a_barrier(barrier, ordered):
    code = f"""
    @!%p1 bra $reads;
    st.shared.b32 [global_smem+4], 7;
    $reads:
    {barrier}
    @%p1 bra $ends;
    ld.shared.b32 %r4, [global_smem+4];
    st.global.b32 [%rd1+8], %r4;
    $ends:
    ret;
    """
    if ordered:
        assert run(code) == [0, 0, 7, 0]
    else:
        with pytest.raises(RuntimeError, match=r"line \d+ races with line \d+"):
            run(code)


@pytest.mark.parametrize(
    ("writes", "reads", "ordered"),
    [
        ("release", "acquire", True), ("acq_rel", "acq_rel", True),
        ("relaxed", "acquire", False), ("release", "relaxed", False),
    ],
)  # fmt: skip
def test_memory_is_handed_over_by_a_release_and_an_acquire(writes, reads, ordered):
    code = f"""
    @%p3 bra $ends;
    @!%p2 bra $waits;
    st.global.b32 [%rd1], 5;
    atom.global.gpu.{writes}.add.u32 %r4, [%rd1+4], 1;
    bra $ends;
    $waits:
    atom.global.gpu.{reads}.add.u32 %r4, [%rd1+4], 0;
    setp.eq.b32 %p4, %r4, 0;
    @%p4 bra $waits;
    ld.global.b32 %r5, [%rd1];
    st.global.b32 [%rd1+8], %r5;
    $ends:
    ret;
    """
    if ordered:
        assert run(code, warps=1, blocks=2) == [5, 1, 5, 0]
    else:
        with pytest.raises(RuntimeError, match=r"line \d+ races with line \d+"):
            run(code, warps=1, blocks=2)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("ld.global.b32 %r4, [%rd1+16];", "no tensor has this memory"),
        ("ld.global.b32 %r4, [%rd1+2];", "not aligned"),
        ("ld.shared.b32 %r4, [global_smem+1024];", "beyond shared memory"),
        ("@%p1 bar.sync 0;", "without a warp that has ended"),
        ("@%p3 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "not all lanes"),
    ],
)
def test_what_is_wrong_on_a_gpu_is_an_error(code, what):
    with pytest.raises(RuntimeError, match=what):
        run(code + "\nret;")


def test_what_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match=r"brev\.b32"):
        run("brev.b32 %r4, %r1; ret;")


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_as_the_reference(name):
    versions.compiling(ptx.__file__, "calls", name)


@pytest.mark.slow
@pytest.mark.brief(kept=lambda parameters: False)
@pytest.mark.parametrize("version", [versions.TRITONS[0], versions.TRITONS[-1]])
def test_by_the_oldest_and_the_newest_triton(version):
    versions.compiling(ptx.__file__, "calls", *CALLS, triton=versions.unpacked("triton", version))


@pytest.mark.slow
def test_tree_attention():
    """By all kinds of products of matrices that the compiler chooses among."""
    tests = "tests/ops/test_tree_attention.py"
    command = "-m", "pytest", "-p", "no:cacheprovider", tests, "-k", "triton"
    assert " passed" in versions.compiling(*command, SPECDEC_TEST_PTX="1")


@pytest.mark.slow
@pytest.mark.brief(kept=lambda parameters: False)
@pytest.mark.parametrize("arguments", [("chains", 60, 600, 2500, 20_000), ("trees", 48, 240, 2500, 20_000)])
def test_against_the_oracle(arguments):
    """Kernels are compiled for an hour."""
    report = json.loads(versions.compiling(ptx.__file__, *arguments))
    assert not report["wrong"]
    assert report["requests"] > arguments[2]
    assert report["too_close"] <= report["requests"] / 10
