"""Kernels as they are compiled for a GPU, executed on a CPU in orders drawn by chance: every decision as the oracle's,
and all that programs hand each other is ordered. And the machine that executes them notices where it is not."""

from __future__ import annotations

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

HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
.param .u64 kernel_param_0
)
{
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;
"""
#: Lane 0 of each warp goes on; %p1: whether it is of the first warp, %p2: of the first block.
BEGIN = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; ld.param.b64 %rd1, [kernel_param_0];
and.b32 %r3, %r1, 31; setp.ne.b32 %p3, %r3, 0; setp.lt.u32 %p1, %r1, 32; setp.eq.b32 %p2, %r2, 0;
"""
RACES = r"line \d+ races with line \d+"


def run(code, warps=2, blocks=1, functions=""):
    memory = torch.zeros(4, dtype=torch.int32)
    program = ptx.Program(functions + HEAD + BEGIN + code + "}", "kernel")
    for seed in range(20):
        memory.zero_()
        address, regions = memory.data_ptr().to_bytes(8, "little"), ptx.regions([memory])
        program.run((blocks, 1, 1), warps, [address], regions, ptx.Machine(random.Random(seed)), 1024)
    return memory.tolist()


def check_order(code, ordered, expected, **named):
    """What is left in memory where something orders who touches it; else a race is found."""
    if ordered:
        assert run(code, **named) == expected
    else:
        with pytest.raises(RuntimeError, match=RACES):
            run(code, **named)


@pytest.mark.parametrize(("barrier", "ordered"), [("bar.sync 0;", True), ("", False)])
def test_shared_memory_is_handed_over_by_a_barrier(barrier, ordered):
    code = f"""
    @!%p1 bra $reads;
    st.shared.b32 [global_smem+4], 7;
    $reads:
    {barrier}
    or.pred %p4, %p1, %p3;
    @%p4 bra $ends;
    ld.shared.b32 %r4, [global_smem+4];
    st.global.b32 [%rd1+8], %r4;
    $ends:
    ret;
    """
    check_order(code, ordered, [0, 0, 7, 0])


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
    check_order(code, ordered, [5, 1, 5, 0], warps=1, blocks=2)


@pytest.mark.parametrize("fence", ["fence.acq_rel.gpu;", ""])
def test_a_fence_acquires_what_was_seen_before_it_and_releases_what_is_written_behind(fence):
    code = f"""
    @%p3 bra $ends;
    @!%p2 bra $waits;
    st.global.b32 [%rd1], 5;
    {fence}
    atom.global.gpu.relaxed.add.u32 %r4, [%rd1+4], 1;
    bra $ends;
    $waits:
    ld.relaxed.gpu.global.u32 %r4, [%rd1+4];
    setp.eq.b32 %p4, %r4, 0;
    @%p4 bra $waits;
    {fence}
    ld.global.b32 %r5, [%rd1];
    st.global.b32 [%rd1+8], %r5;
    $ends:
    ret;
    """
    check_order(code, fence, [5, 1, 5, 0], warps=1, blocks=2)


@pytest.mark.parametrize("together", ["bar.warp.sync -1;", "shfl.sync.idx.b32 %r7, %r1, 0, 31, -1;", ""])
def test_lanes_of_a_warp_hand_memory_over_by_what_they_do_together(together):
    code = f"""
    shl.b32 %r4, %r3, 2; xor.b32 %r5, %r4, 4;
    st.shared.b32 [%r4], %r3;
    {together}
    ld.shared.b32 %r6, [%r5];
    @!%p3 st.global.b32 [%rd1], %r6;
    ret;
    """
    check_order(code, together, [1, 0, 0, 0], warps=1)


def test_lanes_wait_for_those_that_come_later():
    code = """
    setp.gt.u32 %p4, %r3, 3;
    @%p4 bra $later;
    $sum:
    redux.sync.add.s32 %r4, %r3, -1;
    @!%p3 st.global.b32 [%rd1], %r4;
    ret;
    $later:
    add.s32 %r3, %r3, 1;
    bra $sum;
    """
    assert run(code, warps=1) == [sum(range(32)) + 28, 0, 0, 0]


def test_a_barrier_counts_votes():
    code = """
    { .reg .pred %p1; setp.eq.u32 %p1, %r1, 40; bar.red.or.pred %p4, 0, %p1; }
    @%p3 bra $ends;
    selp.b32 %r4, 1, 0, %p4;
    @%p1 st.global.b32 [%rd1], %r4;
    @!%p1 st.global.b32 [%rd1+4], %r4;
    $ends:
    ret;
    """
    assert run(code) == [1, 1, 0, 0]
    assert run(code.replace("40", "70")) == [0, 0, 0, 0]


#: Of a number and a pair of bytes, their sum.
FUNCTION = """
.func (.param .b32 func_retval0) add(
.param .b32 add_param_0,
.param .align 4 .b8 add_param_1[4]
)
{
.reg .b32 %r<9>; .reg .b16 %rs<3>; .reg .b64 %rd<2>;
mov.b64 %rd1, add_param_1;
ld.param.u8 %rs1, [%rd1+1]; ld.param.u8 %rs2, [add_param_1]; ld.param.b32 %r1, [add_param_0];
cvt.u32.u16 %r2, %rs1; cvt.u32.u16 %r3, %rs2;
add.s32 %r1, %r1, %r2; add.s32 %r1, %r1, %r3;
st.param.b32 [func_retval0+0], %r1;
ret;
}
"""


def test_each_lane_calls_with_parameters_of_its_own():
    call = """
    { .param .b32 param0; st.param.b32 [param0+0], %r3;
    .param .align 4 .b8 param1[4]; st.param.v4.b8 [param1+0], {%rs1, %rs1, %rs1, %rs1};
    .param .b32 retval0;
    call.uni (retval0), add, (param0, param1);
    ld.param.b32 %r4, [retval0+0]; }
    """
    code = f"""
    .reg .b16 %rs<2>;
    cvt.u16.u32 %rs1, %r3;
    setp.gt.u32 %p4, %r3, 7;
    @%p4 bra $others;
    {call}
    bra $sum;
    $others:
    add.s32 %r3, %r3, 100;
    {call}
    $sum:
    redux.sync.add.s32 %r5, %r4, -1;
    @%p3 bra $ends;
    st.global.b32 [%rd1], %r5;
    $ends:
    ret;
    """
    assert run(code, warps=1, functions=FUNCTION) == [3 * sum(range(32)) + 2400, 0, 0, 0]


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("ld.global.b32 %r4, [%rd1+16];", "no tensor has this memory"),
        ("ld.global.b32 %r4, [%rd1+2];", "not aligned"),
        ("ld.shared.b32 %r4, [global_smem+1024];", "beyond shared memory"),
        ("@%p1 bar.sync 0;", "without a warp that has ended"),
        ("@%p3 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "not all lanes"),
        ("shfl.sync.bfly.b32 %r4, %r1, 1, 31, 0xffff;", "not all lanes"),
        ("@%p3 bra $ends; shfl.sync.bfly.b32 %r4, %r1, 1, 31, 1; $ends:", "a lane that is not here"),
        (
            "@%p3 bra $ends; @!%p1 bra $ends; st.global.b32 [%rd1], 1; ld.global.nc.b32 %r4, [%rd1]; $ends:",
            "as constant",
        ),
    ],
)
def test_what_is_wrong_on_a_gpu_is_an_error(code, what):
    with pytest.raises(RuntimeError, match=what):
        run(code + "\nret;")


def test_what_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match=r"brev\.b32"):
        run("brev.b32 %r4, %r1; ret;")


@pytest.mark.slow
def test_as_the_reference():
    versions.compiling(ptx.__file__, "triton", "calls", *CALLS)


@pytest.mark.slow
@pytest.mark.brief(kept=lambda parameters: False)
@pytest.mark.parametrize("version", [versions.TRITONS[0], versions.TRITONS[-1]])
def test_by_the_oldest_and_the_newest_triton(version):
    versions.compiling(ptx.__file__, "triton", "calls", *CALLS, triton=versions.unpacked("triton", version))


@pytest.mark.slow
def test_tree_attention():
    """By all kinds of products of matrices that the compiler chooses among."""
    tests = "tests/ops/test_tree_attention.py"
    command = "-m", "pytest", "-p", "no:cacheprovider", tests, "-k", "triton"
    assert " passed" in versions.compiling(*command, SPECDEC_TEST_PTX="triton")


@pytest.mark.slow
@pytest.mark.brief(kept=lambda parameters: False)
@pytest.mark.parametrize("arguments", [("chains", 60, 600, 2500, 20_000), ("trees", 48, 240, 2500, 20_000)])
def test_against_the_oracle(arguments):
    """Kernels are compiled for an hour."""
    ptx.hold_against_the_oracle("triton", *arguments)
