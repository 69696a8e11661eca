"""Hold a backend against the float64 oracle, decision by decision.

    python -m specdec_kernels.selftest cpu

The oracle uses the same noise, so a backend must return its tokens wherever no decision was closer than
:data:`EPSILON`; nothing here is a matter of chance.
"""

from __future__ import annotations

from specdec_kernels.ops import BackendName
from specdec_kernels.selftest import chains, trees
from specdec_kernels.selftest.common import DRAFT_KINDS, EPSILON, KNOWN_ANSWERS, Report, known_answers

__all__ = ["DRAFT_KINDS", "EPSILON", "KNOWN_ANSWERS", "Report", "chains", "known_answers", "run", "trees"]


def run(backend: BackendName | None = None, device: str = "cpu", count: int = 120) -> Report:
    """The coupled suite: ``count`` random batches of chains, half as many of trees."""
    report = Report()
    if not known_answers(backend, device):
        report.wrong.append("the Philox known answers are wrong")
    for index, chain in enumerate(chains.cases(count)):
        chains.check_verified(report, chain, index, backend, device)
        chains.check_sampled(report, chain, index, backend, device)
    for index, tree in enumerate(trees.cases(count // 2)):
        trees.check_verified(report, tree, index, backend, device)
        trees.check_children(report, tree, index, backend, device)
    return report
