"""Hold a backend against the float64 oracle, decision by decision: ``specdec selftest``.

The oracle uses the same noise, so a backend must return its tokens wherever no decision was closer than
:data:`EPSILON`; nothing here is a matter of chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specdec_kernels.ops import BACKENDS, BackendName
from specdec_kernels.selftest import chains, gpu, heads, trees
from specdec_kernels.selftest.common import DRAFT_KINDS, EPSILON, KNOWN_ANSWERS, VOCABS, Report, known_answers

__all__ = [
    "DRAFT_KINDS",
    "EPSILON",
    "KNOWN_ANSWERS",
    "Report",
    "chains",
    "gpu",
    "heads",
    "known_answers",
    "run",
    "trees",
]

#: What a GPU is tried with beside the small ones: here several programs work on a row.
LARGE_VOCABS = (32_000, 128_256, 151_936)


def ways(on_gpu: bool) -> Iterator[None]:
    """Once; on a GPU once more with the CUDA C++ on clusters of blocks, which small batches would not be given."""
    yield
    if on_gpu:
        with gpu.clusters("1"):
            yield


def run(backend: BackendName | None = None, device: str = "cpu", count: int = 120) -> Report:
    """The coupled suite: ``count`` random batches of chains, half as many of trees and of hidden states; on a GPU a few
    large ones too, and what only a GPU can show."""
    report = Report()
    if not known_answers(backend, device):
        report.wrong.append("the Philox known answers are wrong")
    on_gpu = torch.device(device).type == "cuda"
    for vocabs, batches in ((VOCABS, count), (LARGE_VOCABS, count // 8 if on_gpu else 0)):
        for index, chain in enumerate(chains.cases(batches, vocabs)):
            for _ in ways(on_gpu):
                chains.check_verified(report, chain, index, backend, device)
            chains.check_sampled(report, chain, index, backend, device)
        for index, tree in enumerate(trees.cases(batches // 2, vocabs)):
            trees.check_verified(report, tree, index, backend, device)
            trees.check_children(report, tree, index, backend, device)
        if backend is None or "verify_chain_lm_head" in BACKENDS[backend].functions:
            for index, head in enumerate(heads.cases(batches // 2, vocabs)):
                heads.check(report, head, index, backend, device)
    if on_gpu and backend != "reference":  # PyTorch launches as it likes
        for _ in ways(on_gpu):
            gpu.check(report, backend, device)
    return report
