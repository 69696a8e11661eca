"""What the soak of the scheduler finds where there is something to be found. The soak is in test_scheduler.py."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from specdec_kernels.bench.soak import FLAT_BYTES, Report, Sample, Soak
from specdec_kernels.decode.scheduler import Submission


def report(objects: list[int], own: list[int]) -> Report:
    """Of a hundred requests between two quiet moments."""
    samples = [Sample(100 * index, *each) for index, each in enumerate(zip(objects, own, strict=True))]
    return Report(arrived=100, refused=40, endings=Counter({"plain: length": 60}), samples=samples)


def test_flat_memory_is_no_problem():
    """It may rise as long as not all has been there, and fall at any time."""
    assert report([0, 900, 1000, 1010, 1000, 1020], [0, 8 << 20, 9 << 20, 9 << 20, 3 << 20, 8 << 20]).problems() == []
    assert report([], []).problems() == []


def test_what_is_kept_of_requests_is_told():
    assert report([500 * index for index in range(8)], [0] * 8).problems() == [
        "2000 more objects were kept after 400 more requests"
    ]
    rising = [index * FLAT_BYTES for index in range(8)]
    (problem,) = report([0] * 8, rising).problems()
    assert problem.startswith("memory rose by 25.2 MB in the second half")


def test_what_is_lost_is_told():
    lost = report([], [])
    lost.endings["plain: length"] -= 1
    assert lost.problems() == ["100 requests arrived, 40 were refused, but 59 ended"]


PUT = Submission.put


def other(submission, token):
    """Another token."""
    PUT(submission, token._replace(token=(token.token + 1) % 10))


def kept(submission, token, found=[]):  # noqa: B006
    """The right one, and something is kept of it."""
    found.append([submission])
    PUT(submission, token)


@pytest.mark.parametrize(("fault", "problem"), [(other, "ended by"), (kept, "objects were kept")])
def test_a_scheduler_with_a_fault_is_found(monkeypatch, fault, problem):
    soak = Soak(quiet_every=20)
    monkeypatch.setattr(Submission, "put", fault)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        soak.run(80, 0.0)
    assert any(problem in each for each in soak.report.problems())
