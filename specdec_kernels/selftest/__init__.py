"""Hold a backend against the float64 oracle, decision by decision: ``specdec selftest``.

The oracle uses the same noise, so a backend must return its tokens wherever no decision was closer than
:data:`EPSILON`; nothing here is a matter of chance.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from specdec_kernels.ops import BackendName
from specdec_kernels.selftest import chains, gpu, trees
from specdec_kernels.selftest.common import (
    DRAFT_KINDS,
    EPSILON,
    KNOWN_ANSWERS,
    VOCABS,
    Report,
    Selection,
    known_answers,
    root_line,
)

__all__ = [
    "DRAFT_KINDS",
    "EPSILON",
    "KNOWN_ANSWERS",
    "Report",
    "Selection",
    "chains",
    "gpu",
    "known_answers",
    "root_line",
    "run",
    "run_in_processes",
    "trees",
]

#: What a GPU is tried with beside the small ones: here several programs work on a row.
LARGE_VOCABS = (32_000, 128_256, 151_936)
#: Forms of chains and of trees for what compiles: rules times kinds of drafts, each two times for chains; of large ones
#: each rule.
FORMS, LARGE_FORMS = (18, 12), (3, 4)


def check_known_answers(report: Report, backend: BackendName | None, device: str) -> None:
    """Philox itself."""
    if not known_answers(backend, device):
        report.wrong.append("the Philox known answers are wrong")


def check_chains(
    report: Report, backend: BackendName | None, device: str, batches: int, vocabs: tuple[int, ...], selected: Selection
) -> None:
    """Chains, and draws from their first rows."""
    for (index, _), chain in zip(selected.of(batches), chains.cases(batches, vocabs, selected), strict=True):
        report.attempt(f"verify_chain case {index}", chains.check_verified, chain, index, backend, device)
        report.attempt(f"sample case {index}", chains.check_sampled, chain, index, backend, device)


def check_trees(
    report: Report, backend: BackendName | None, device: str, batches: int, vocabs: tuple[int, ...], selected: Selection
) -> None:
    """Trees, and children of their roots."""
    for (index, form), tree in zip(selected.of(batches), trees.cases(batches, vocabs, selected), strict=True):
        report.attempt(f"verify_tree case {index}", trees.check_verified, tree, index, backend, device)
        report.attempt(f"sample_children case {index}", trees.check_children, tree, index, backend, device, form)


def run(
    backend: BackendName | None = None, device: str = "cpu", count: int = 120, process: int = 0, processes: int = 1
) -> Report:
    """The coupled suite: ``count`` random batches of chains, half as many of trees; on a GPU a few large ones too, and
    what only a GPU can show. Of several processes each does its part.

    On a GPU Triton is given every rule and kind of drafts in all dtypes, but few of their combinations: a kernel takes
    it seconds to compile, and of a few hundred combinations most would be compiled for one batch. The others get all.
    """
    report = Report()
    if process == 0:
        report.attempt("noise_words", check_known_answers, backend, device)
    on_gpu = torch.device(device).type == "cuda"
    compiles = on_gpu and backend == "triton"
    small = VOCABS, count, FORMS, process
    large = LARGE_VOCABS, count // 8 if on_gpu else 0, LARGE_FORMS, processes - 1 - process  # who has fewer small ones
    for vocabs, batches, forms, own in (small, large):
        of_chains, of_trees = (Selection(number if compiles else None, own, processes) for number in forms)
        check_chains(report, backend, device, batches, vocabs, of_chains)
        check_trees(report, backend, device, batches // 2, vocabs, of_trees)
    if on_gpu and backend != "reference":  # PyTorch launches as it likes
        report.attempt("on a GPU", gpu.check, backend, device, Selection(None, process, processes))
    return report


def run_in_processes(backend: BackendName, device: str, count: int, processes: int) -> Iterator[Report]:
    """The same by several processes side by side, and what each found as soon as it ends; one that dies is a line. One
    alone is this one."""
    if processes == 1:
        yield run(backend, device, count)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for done in as_completed(
            pool.submit(run, backend, device, count, process, processes) for process in range(processes)
        ):
            error = done.exception()
            yield done.result() if error is None else Report(wrong=[f"a process: {type(error).__name__}: {error}"])
