"""The CUDA C++ where there is no GPU: compiled, linked, loaded; its programs on the CPU, by one thread and by many."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import budget
import pytest
import torch
from builds import sanitized
from forms import some
from processes import run_python

from specdec_kernels import DraftVocabulary, sample, verify_chain, verify_tree
from specdec_kernels.ops.backends import BACKENDS, NATIVE_LIBRARY

LIBRARY = NATIVE_LIBRARY.with_name("libspecdec_cuda.so")


def test_the_library_loads_and_says_why_it_does_not_run():
    if torch.cuda.is_available():
        pytest.skip("it does")
    code = """
import torch, specdec_kernels as s
try:
    s.sample(torch.zeros(1, 3), seed=1, position=1, backend="cuda")
except RuntimeError as error:
    print(error)
print("CUDA" in torch._C._dispatch_dump("specdec::sample"))
"""
    result = run_python("-c", code, SPECDEC_EMULATE_CUDA="")
    assert result.stdout.splitlines() == ["backend='cuda' cannot run here: there is no GPU", "True"], result.stderr
    result = run_python("-c", code, SPECDEC_EMULATE_CUDA="", SPECDEC_LIBRARY="/nowhere/libspecdec_cpu.so")
    assert "libspecdec_cuda.so was not built (it takes nvcc)" in result.stdout
    result = run_python("-c", code, SPECDEC_EMULATE_CUDA="2")
    assert "SPECDEC_EMULATE_CUDA must be 1 or threads, got '2'" in result.stdout


@pytest.mark.parametrize("driver", [0, 12090, 13000, 14020])
def test_a_driver_that_is_older_than_the_library(tmp_path, driver):
    """Each call would fail; so Triton is chosen, which compiles for the driver that there is."""
    library = tmp_path / "libcuda.so.1"
    source = f'extern "C" int cuDriverGetVersion(int* version) {{ *version = {driver}; return 0; }}'
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc++", "-", "-o", library],
        input=source, text=True, check=True,
    )  # fmt: skip
    code = f"""
import ctypes
from specdec_kernels.ops import backends
ctypes.CDLL({str(library)!r})
backends._HAS_GPU = True
print(backends._cuda().reason)
"""
    own = ctypes.CDLL(str(LIBRARY)).specdec_cuda_version() // 1000
    older = f"the driver is for CUDA {driver // 1000}, the library for {own}: it takes a newer driver, or an older nvcc"
    result = run_python("-c", code, SPECDEC_EMULATE_CUDA="")
    assert result.stdout == (f"{older}\n" if driver < 1000 * own else "\n"), result.stderr


def test_machine_code():
    """Registers and instructions are as the table says: ``python tests/helpers/budget.py --write`` makes it anew. There
    is nothing that should go, such as what is spilled in a loop."""
    found = budget.kernels(LIBRARY)
    assert budget.TABLE.read_text().splitlines() == budget.lines(found)
    assert {budget.short(kernel.name): wrong for kernel in found if (wrong := kernel.wrong())} == {}


def test_no_other_gpu_spills_where_rows_are_measured():
    """Whatever GPUs the library is compiled for; that of the table spills in no loop. Each has a compiler of its own:
    that for Blackwell keeps in memory what one path into a loop has loaded and another has not."""
    spilled = {
        (architecture, budget.short(kernel.name)): names
        for architecture in ("sm_80", "sm_100")
        for kernel in budget.kernels(LIBRARY, architecture)
        if (names := budget.spills(name for body in kernel.measuring() for name in body))
    }
    assert spilled == {}


def test_what_is_wrong_with_machine_code_is_seen():
    loop = ["LDG.E.EF.128 R4, desc[UR4][R2.64]", "MUFU.EX2 R1, R1", "DADD R2, R2, R4", "STL [R1], R2", "@P0 BRA 0x10"]
    code = [(16 * (index + 1), text) for index, text in enumerate([*loop, "LD.E R2, [R4.64]", "EXIT"])]
    kernel = budget.Kernel("verify_chain_kernelINS_8BFloat16E", 65, code)
    assert kernel.eight_ids() == [5.0]
    assert kernel.wrong() == [
        "65 registers", "LD.E anywhere", "STL in a loop", "DADD in a loop with exponentials",
    ]  # fmt: skip
    loop = ["STL [R1], R2", "LDL R2, [R1]", "@P0 BRA 0x20", "EXIT"]  # before it no store counts
    code = [(16 * (index + 1), text) for index, text in enumerate(loop)]
    assert budget.Kernel("kernel", 64, code).wrong() == ["LDL in a loop"]


SELFTEST = """
import torch
torch.set_num_threads(1)
from specdec_kernels import selftest
report = selftest.run("cuda", count={count})
print(report.requests, report.wrong[:3])
"""


MASKS = """
import torch
from specdec_kernels import tree_mask
from specdec_kernels.ops.trees import _FORMATS
for nodes in (9, 33):
    parents = torch.full((2, nodes), -1)
    parents[0, 1:7], parents[1, 1:9] = torch.tensor([0, 0, 1, 1, 3, 2]), torch.arange(8)
    for format in _FORMATS:
        context = None if "packed" in format or "qlen" in format else torch.tensor([70, 3])
        if nodes <= 32 or format != "sglang_qlen_only_packed":
            ours, others = (tree_mask(parents, format, context_lens=context, backend=name) for name in ("cuda", "cpu"))
            assert torch.equal(ours, others), (nodes, format)
"""


@pytest.mark.slow
def test_by_many_threads():
    """A block of two warps, as threads that wait for each other."""
    result = run_python("-c", MASKS + SELFTEST.format(count=some(4, 12)), SPECDEC_EMULATE_CUDA="threads")
    assert result.stdout.strip().endswith(" []"), result.stdout + result.stderr
    assert int(result.stdout.split()[0]) > some(30, 100)


#: Rows in two slices, and several blocks that cooperate on a request, whose counters are given back.
BLOCKS = """
from specdec_kernels import verify_chain, verify_tree
target = 3 * torch.randn(2, 4, 8300, generator=torch.Generator().manual_seed(0))
target[:, :, :3] += 9  # drafts that are accepted, so that several blocks judge rows of a request
ids, parents = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 1]])
noise = {"seed": torch.tensor([1, 2]), "position": torch.tensor([3, 4])}
for verify, rules, drafts in (
    (verify_chain, ("token", "block", "coupled"), (ids,)),
    (verify_tree, ("walk", "recursive", "traversal", "coupled"), (torch.cat([ids[:, :1], ids], 1), parents)),
):
    for rule in rules:
        ours, others = (verify(target, *drafts, rule=rule, backend=x, **noise).tokens for x in ("cuda", "reference"))
        assert torch.equal(ours, others), rule
"""


@pytest.mark.slow
def test_threads_wait_for_each_other():
    """And blocks, under the thread sanitizer; the controls, without the places where they do, are among the mutants."""
    build = sanitized("specdec_cuda_emulated_threads")
    runtime = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    library = str(build / "libspecdec_cpu.so")
    environment = {
        "SPECDEC_EMULATE_CUDA": "threads", "SPECDEC_LIBRARY": library, "LD_PRELOAD": runtime.stdout.strip(),
        "OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "halt_on_error=1", "SPECDEC_EMULATED_PROCESSORS": "2",
    }  # fmt: skip
    # Not forked: the sanitizer has to be there first.
    command = [sys.executable, "-c", SELFTEST.format(count=some(2, 8)) + BLOCKS]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode, " []" in result.stdout) == (0, True), result.stderr[-3000:]


def test_by_several_blocks():
    """Rows cut into chunks, measured by blocks that come one after the other; mutants of what they tell each other are
    among those of CUDA."""
    result = run_python(
        "-c", SELFTEST.format(count=40), SPECDEC_EMULATE_CUDA="1", SPECDEC_EMULATED_PROCESSORS="3",
    )  # fmt: skip
    assert result.stdout.strip().endswith(" []"), result.stdout + result.stderr


@pytest.fixture
def emulate(monkeypatch):
    """A function that makes the GPU one of so many multiprocessors, on which blocks run in an order of their own."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is what it is")
    forget_devices = ctypes.CDLL(str(BACKENDS["cuda"].library)).specdec_emulated_forget_devices

    def emulated(processors, order):
        monkeypatch.setenv("SPECDEC_EMULATED_PROCESSORS", str(processors))
        monkeypatch.setenv("SPECDEC_EMULATED_ORDER", str(order))
        forget_devices()

    yield emulated
    forget_devices()


def test_results_do_not_depend_on_the_launch(emulate):
    """How many blocks a row or a request has, nor the order they come in."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 4, 9001, generator=generator) * 2
    draft = target[:, :3] + torch.randn(3, 3, 9001, generator=generator)
    keys = {"seed": torch.arange(3), "position": torch.arange(3) + 7}
    tokens = torch.stack([sample(draft[:, i], **keys, row=i).tokens for i in range(3)], 1)
    target[1, 1, 4] = torch.nan
    vocabulary = DraftVocabulary(torch.randperm(9001, generator=generator)[:3000], 9001)
    for rule in ("token", "block", "coupled"):
        for options in ({}, {"top_k": 30, "top_p": 0.9}, {"temperature": 0.0}, {"draft_to_target": vocabulary}):
            rows = draft[..., vocabulary.draft_to_target] if "draft_to_target" in options else draft
            found = []
            for processors, order in ((1, 0), (3, 0), (40, 0), (40, 1), (3, 2)):
                emulate(processors, order)
                found.append(
                    verify_chain(
                        target,
                        tokens,
                        rows,
                        draft_temperature=1.0,
                        **keys,
                        **options,
                        rule=rule,
                        logprobs=True,
                        backend="cuda",
                    )
                )
            for each in found[1:]:
                for of_first, of_this in zip(found[0], each, strict=True):
                    assert torch.equal(of_first.nan_to_num(7.0), of_this.nan_to_num(7.0)), (rule, options)


@pytest.mark.parametrize("rule", ["walk", "recursive", "traversal", "coupled"])
def test_trees_do_not_depend_on_the_launch(emulate, rule):
    """Nor on whether rows are measured ahead, by how many blocks."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 4, 9001, generator=generator) * 2
    draft = target + torch.randn(5, 4, 9001, generator=generator)
    keys = {"seed": torch.arange(5), "position": torch.arange(5) + 7}
    tokens = torch.stack([sample(draft[:, max(0, i - 1)], **keys, row=i).tokens for i in range(4)], 1)
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 0, -1], [-1, -1, -1, -1], [-1, 0, 0, 0]])
    target[1, 1, 4] = torch.nan
    drafted = {} if rule in ("walk", "coupled") else {
        "draft_logits": draft, "draft_temperature": 1.0, "siblings": "without_replacement",
    }  # fmt: skip
    for options in ({}, {"top_k": 30, "top_p": 0.9}, {"temperature": 0.0}):
        found = []
        for processors, order in ((1, 0), (3, 0), (40, 0), (40, 1), (200, 2)):
            emulate(processors, order)
            named = {**keys, **drafted, **options, "rule": rule, "logprobs": True}
            found.append(verify_tree(target, tokens, parents, **named, backend="cuda"))
        for each in found[1:]:
            for of_first, of_this in zip(found[0], each, strict=True):
                assert torch.equal(of_first.nan_to_num(7.0), of_this.nan_to_num(7.0)), options
