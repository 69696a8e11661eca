"""The C++ under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from builds import sanitized
from forms import some

from specdec_kernels._native import build_facts
from specdec_kernels.ops import BACKENDS


def test_facts_of_the_build():
    facts = build_facts()
    assert facts["torch"] == torch.__version__
    assert facts["sanitized"] is False
    assert facts["compiler"]


# What the sanitized library is put through: the coupled suite, short tiles, nan, bad ids, many threads.
EXERCISE = """
import os, torch, specdec_kernels as s
from specdec_kernels import selftest
from specdec_kernels.ops import trees
for backend in ["cpu", "cuda"] if os.environ["SPECDEC_CPU_ISA"] == "scalar" else ["cpu"]:  # "cuda" has none
    wrong = selftest.run(backend, count=COUNT).wrong
    assert not wrong, wrong
for vocab in (1, 127, 128, 129, 5000):
    for value in (0.0, float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            target = torch.zeros(3, 3, vocab, dtype=dtype)
            target[1, 0, vocab // 2] = value
            tokens = torch.zeros(3, 2, dtype=torch.int64)
            for temperature in (0.0, 1e-4, 0.7):
                for draft in (None, target[:, :2]):
                    heat = None if draft is None else 1.0
                    keys = {"seed": 1, "position": 1, "temperature": temperature}
                    s.verify_chain(target, tokens, draft, draft_temperature=heat, **keys)
for nodes in (1, 9, 33, 65):
    parents = torch.arange(-1, nodes - 1).repeat(3, 1)
    parents[1, nodes // 2 + 1 :] = -1
    for format in trees._FORMATS:
        if nodes <= 32 or format != "sglang_qlen_only_packed":
            flat = format in ("dense", "additive", "flashinfer", "sglang_full")
            for backend in ("cpu", "cuda"):
                s.tree_mask(parents, format, context_lens=torch.tensor([0, 3, 8]) if flat else None, backend=backend)
    path = torch.tensor([[0, *range(2, nodes, 2)] + [-1] * ((nodes - 1) // 2)] * 3)
    caches = [torch.zeros(3, 2, nodes + 8, 5) for _ in range(2)]
    for backend in ("cpu", "cuda"):
        s.compact_kv(caches, path, torch.tensor([0, 3, 8]), backend=backend)
    rows = torch.randn(2, 300)
    for how in ("top", "iid", "without_replacement", "race"):
        s.sample_children(rows, nodes, how, seed=1, position=1)
for rows, outputs, inputs in ((1, 36, 72), (3, 100, 37), (0, 1, 1), (2, 0, 5), (2, 33, 0)):
    weight, scale = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs)
    assert torch.ops.specdec.eight_bit_product(torch.randn(rows, inputs), weight, scale).isfinite().all()
try:
    s.verify_chain(torch.zeros(1, 2, 5), torch.tensor([[5]]), seed=1, position=1)
except ValueError:
    print("done")
"""


@pytest.mark.slow
def test_threads_of_a_cpu_wait_for_each_other():
    """Chains by several threads of their own, under the thread sanitizer; controls are among the mutants."""
    build = sanitized("specdec_threads_check")
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(
        [build / "specdec_threads_check"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert (result.returncode, result.stdout) == (0, "the same\n"), result.stderr[-3000:]


#: The widest that runs here, and the one that the emulated CUDA is run beside.
def in_brief(parameters):
    return parameters["isa"] in ("scalar", BACKENDS["cpu"].detail.removeprefix("C++, "))


@pytest.mark.slow
@pytest.mark.brief(kept=in_brief)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_sanitizers_find_nothing(isa):
    build = sanitized("specdec_cpu", "specdec_cuda_emulated")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    result = subprocess.run(
        [sys.executable, "-c", EXERCISE.replace("COUNT", str(some(10, 60)))],
        env={
            **os.environ,
            "SPECDEC_LIBRARY": str(build / "libspecdec_cpu.so"),
            "SPECDEC_CPU_ISA": isa,
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "halt_on_error=1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "run on this machine" in result.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "done"
