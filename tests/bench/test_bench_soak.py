"""What the soak of the scheduler finds where there is something to be found. The soak is in test_scheduler.py."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest

from specdec_kernels.bench import soak as soak_module
from specdec_kernels.bench.soak import FLAT_BYTES, Report, Sample, Soak
from specdec_kernels.decode.guarded import GuardedSession
from specdec_kernels.decode.scheduler import Scheduler
from specdec_kernels.decode.submission import Submission


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
    assert problem.startswith("memory rose by 12.6 MB in the second half")


def test_a_kilobyte_of_every_request_is_told_within_an_hour():
    """Of 13,701 requests, as bench/results/soak.txt has them."""
    hour = Report(samples=[Sample(count, 364_800, 319_700_000 + 1024 * count) for count in range(0, 13_702, 100)])
    (problem,) = hour.problems()
    assert problem.startswith("memory rose by 5.3 MB in the second half")


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


def test_a_drafter_that_ends_requests_is_found(monkeypatch):
    """Also once a pass of the target has failed, whose error ends those that ran in that pass and no others."""
    soak = Soak(quiet_every=20)
    soak.report.faults["target"] += 1
    monkeypatch.setattr(GuardedSession, "_attempt", lambda self, what, call: call())
    soak.run(60, 0.0)
    ended = sum(count for ending, count in soak.report.endings.items() if "FaultError" in ending)
    found = [each for each in soak.report.problems() if "ended by 'FaultError'" in each]
    assert 0 < len(found) <= ended


def test_a_request_that_is_lost_is_told(monkeypatch):
    """And not waited for, once no scheduler has it."""
    submit, lost = Scheduler.submit, SimpleNamespace(done=False, cancel=lambda: None)
    calls = itertools.count()
    soak = Soak(quiet_every=20)
    monkeypatch.setattr(
        Scheduler, "submit",
        lambda *given, **named: lost if next(calls) == 5 else submit(*given, **named),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        soak.run(30, 0.0)
    left, counts = soak.report.problems()
    assert left.endswith(" did not end")
    report = soak.report
    assert counts == f"{report.arrived} requests arrived, {report.refused} were refused, but {report.ended} ended"
    assert report.ended == report.arrived - report.refused - 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--load", "0"], "--load must be in (0, 1], got 0"),
        (["--load", "2"], "--load must be in (0, 1], got 2"),
        (["--load", "nan"], "--load must be in (0, 1], got nan"),
        (["--out", "/nowhere/soak.txt"], "--out must be a file in a folder that is there, got /nowhere/soak.txt"),
        (["--out", "."], "--out must be a file in a folder that is there, got ."),
    ],
)
def test_what_cannot_be_is_said_before_it_runs(monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["soak", *options])
    monkeypatch.setattr(soak_module, "Soak", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        soak_module.main()
    assert said in capsys.readouterr().err


def test_a_scheduler_that_goes_on_for_ever_is_told(monkeypatch):
    soak = Soak()
    monkeypatch.setattr(soak_module, "MOST_STEPS", 20)
    monkeypatch.setattr(Scheduler, "step", lambda self: True)
    while not soak.under_way:
        soak._arrive()
    soak._look(0.0)
    left, *_, counts = soak.report.problems()
    assert left.endswith(" did not end")
    assert counts.endswith("but 0 ended")
