"""The report of a GPU: parts that hang, die or raise cost only themselves, and its dry form runs on a CPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_python
from typer.testing import CliRunner

from specdec_kernels import selftest
from specdec_kernels.bench import report
from specdec_kernels.bench.report_parts import Bench, Setting, tried
from specdec_kernels.cli import main

#: Seconds in which whatever should end has ended, on a machine that does many things at once.
AMPLE = 600.0


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Runs scripts of Python as parts: what was said, and what the files have."""

    def run(scripts, **limits):
        monkeypatch.setattr(report, "part_command", lambda part, dry: [sys.executable, "-c", scripts[part.name]])
        said = []
        parts = [report.Part(name, limits.get(name, AMPLE), None) for name in scripts]
        healthy = report.run(tmp_path, True, said.append, parts)
        written = json.loads((tmp_path / "dry-report.json").read_text())
        text = (tmp_path / "dry-report.md").read_text()
        assert said[:-1] == [f"{name}: {how}" for name, how in written["ended"].items()]
        assert all(f"## {name}: {how}\n" in text for name, how in written["ended"].items())
        return healthy, written["rows"], list(written["ended"].values()), text

    return run


GOOD = """print('{"what": "sum", "is": 2.5}')"""


def runs(pid):
    """Whether there is a process, but for one that ended and nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_that_hangs_is_killed_with_what_it_started(reported, tmp_path, monkeypatch):
    """What it printed before is kept, and the next part reports; a grandchild that holds its output delays nothing. Its
    time is over when it has printed that, whenever this is."""
    hangs = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print('{{"what": "before"}}', flush=True)
time.sleep(3000)
"""
    skipped, add = [], report.Report.add

    def add_and_skip(own, part, row):
        add(own, part, row)
        skipped.extend([AMPLE] * (part == "hangs"))

    monkeypatch.setattr(report.Report, "add", add_and_skip)
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(skipped)))
    healthy, rows, ended, _ = reported({"hangs": hangs, "next": GOOD})
    assert rows == [{"part": "hangs", "what": "before"}, {"part": "next", "what": "sum", "is": 2.5}]
    assert ended[0].startswith("killed after ")
    assert ended[1].startswith("done in ")
    assert not healthy
    pid = (tmp_path / "pid").read_text()
    for _ in range(6000):  # a signal takes its time
        if not runs(pid):
            break
        time.sleep(0.01)
    assert not runs(pid)


def test_a_part_that_says_nothing_is_killed(reported):
    healthy, rows, ended, _ = reported({"silent": "import time; time.sleep(3000)", "next": GOOD}, silent=0.1)
    assert [row["part"] for row in rows] == ["next"]
    assert ended[0].startswith("killed after ")
    assert ended[1].startswith("done in ")
    assert not healthy


def test_a_part_that_fails_is_a_line_with_the_reason(reported):
    raises = """print("7\\nno row"); print('{"what": "before"}'); raise ValueError("seven | is wrong")"""
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    healthy, rows, ended, _ = reported({"raises": raises, "dies": dies, "next": GOOD})
    assert [row["part"] for row in rows] == ["raises", "next"]
    assert ended[0].startswith("failed after ")
    assert ended[0].endswith(" s: ValueError: seven | is wrong")
    assert ended[1].endswith(" s: signal SIGSEGV")
    assert ended[2].startswith("done in ")
    assert not healthy


def test_a_row_that_failed_is_counted(reported):
    failed = """print('{"what": "a", "failed": "the | reference disagrees"}'); print('{"what": "b", "p50": 12345.6}')"""
    healthy, _, ended, text = reported({"some": failed})
    assert ended[0].endswith("; 1 failed")
    assert not healthy
    assert (
        "| what | failed | p50 |\n| --- | --- | --- |\n| a | the \\| reference disagrees |  |\n| b |  | 1.235e+04 |"
        in text
    )
    assert reported({"good": GOOD})[0]


def test_rows_are_there_while_the_part_runs(tmp_path):
    seen = []
    with open(tmp_path / "log", "w") as log:
        waits = f"""
import os, time
print('{{"what": "first"}}', flush=True)
while not os.path.exists({str(tmp_path / "seen")!r}): time.sleep(0.01)
print('{{"what": "second"}}')
"""

        def row(given):
            seen.append(given["what"])
            (tmp_path / "seen").touch()

        how = report.watch([sys.executable, "-c", waits], AMPLE, log, row, {})
    assert seen == ["first", "second"]
    assert how.startswith("done in ")


def test_limits_add_up_to_less_than_five_minutes():
    assert sum(part.limit_s for part in report.PARTS) < 300
    assert len({part.name for part in report.PARTS}) == len(report.PARTS)


def test_one_row_that_cannot_be_had_does_not_end_a_part():
    def broken():
        raise RuntimeError("the reference\n disagrees")

    rows = list(tried([("first", broken), ("second", lambda: {"what": "second"})]))
    assert rows == [{"what": "first", "failed": "RuntimeError: the reference disagrees"}, {"what": "second"}]


def test_a_wrong_answer_is_not_timed(monkeypatch):
    from specdec_kernels.bench import report_parts, trees

    bench, setting = Bench(Setting("cpu", True)), Setting("cpu", True)
    monkeypatch.setattr(Bench, "row", lambda *_, **__: pytest.fail("it was timed"))

    def wrong(function):
        def altered(*given, **named):
            backend = named.get("backend") or (given[2] if len(given) > 2 else None)
            result = function(*given, **named)
            return result._replace(tokens=result.tokens + 1) if backend == "cuda" else result

        return altered

    for module, name in ((report_parts, "fused"), (report_parts, "sample"), (trees, "fused")):
        monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    case = report_parts.sized(setting, "cuda")[0]
    for call in (
        lambda: report_parts.chain(bench, case, "cuda"),
        lambda: report_parts.draws(bench, 2, 100, "cuda"),
        lambda: report_parts.tree(bench, "walk", 1, 100, "cuda"),
    ):
        with pytest.raises(RuntimeError, match="the reference disagrees"):
            call()


def test_all_of_it_runs_dry(tmp_path, monkeypatch):
    """As in CI: every part on a CPU, by the command line, though not each in a process of its own. How long it takes is
    not looked at."""

    def watch_here(command, limit_s, log, row, env):
        assert command == [sys.executable, "-m", "specdec_kernels.bench.report", "--part", command[4], "--dry"]
        part = next(part for part in report.PARTS if part.name == command[4])
        for each in part.rows(Setting("cpu", True)):
            row(json.loads(json.dumps(each)))
        return "done in 0 s"

    monkeypatch.setattr(report, "watch", watch_here)
    result = CliRunner().invoke(main.app, ["gpu-report", "--dry", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "dry-report.json").read_text())
    assert result.exit_code == 0, (written["ended"], result.output)
    assert list(written["ended"]) == [part.name for part in report.PARTS]
    assert not [row for row in written["rows"] if "failed" in row]
    compiled = [row["what"] for row in written["rows"] if row["what"].startswith("compiled")]
    assert compiled == ["compiled chains: 1 calls, 0 failed", "compiled trees: 1 calls, 0 failed"]
    parts = {row["part"] for row in written["rows"]}
    assert parts == set(written["ended"])
    assert "CUDA C++, emulated" in (tmp_path / "dry-report.md").read_text()


def test_a_part_runs_in_a_process_where_every_backend_runs(tmp_path):
    """Without a GPU, Triton is interpreted there and CUDA emulated."""
    assert report.run(tmp_path, True, lambda line: None, [replace(report.PARTS[0], limit_s=AMPLE)])
    written = json.loads((tmp_path / "dry-report.json").read_text())
    assert list(written["ended"]) == ["versions"]
    backends = {row["what"]: row["does not run"] for row in written["rows"] if row["what"].startswith("backend")}
    assert backends == dict.fromkeys(["backend reference", "backend cpu", "backend cuda", "backend triton"])


def test_processes_share_the_cases_of_the_self_test():
    """Each case is taken by one of them; with few forms, each form too."""
    for forms in (None, 6):
        shares = [list(selftest.Selection(forms, process, 4).of(21)) for process in range(4)]
        assert sorted(pair for share in shares for pair in share) == [
            (index, index % (forms or 21)) for index in range(21)
        ]
        forms_used = [{form for _, form in share} for share in shares]
        assert sum(map(len, forms_used)) == (forms or 21)
    whole = selftest.run("cpu", count=5)
    parts = selftest.Report()
    for process in range(2):
        parts.add(selftest.run("cpu", "cpu", 5, process, 2))
    assert (parts.requests, parts.too_close, parts.wrong) == (whole.requests, whole.too_close, [])


def test_a_form_comes_again_with_other_values():
    """What Triton compiles for stays the same, and the rest does not."""

    def compiled_for(case):
        given = {
            name: value is not None for name, value in case.options.items() if name not in ("top_k", "top_p", "min_p")
        }
        tensors = [x if x is None else (x.dtype, x.shape[1:], x.stride()) for x in (case.draft, case.stats)]
        return case.target.dtype, case.target.stride(), case.tokens.dtype, case.options["rule"], given, tensors

    for cases in (selftest.chains.cases, selftest.trees.cases):
        found = list(cases(12, selection=selftest.Selection(6)))
        for first, again in zip(found[:6], found[6:], strict=True):
            assert compiled_for(first) == compiled_for(again)
            assert not first.options["seed"].equal(again.options["seed"])


def test_a_check_that_raises_is_a_line_with_the_cause(monkeypatch):
    """As where Triton cannot compile a kernel: what it says first is that there is an error; others are tried."""

    def fails(*_, **__):
        try:
            raise TypeError("no\nNoneType")
        except TypeError as cause:
            raise RuntimeError("at line 12:") from cause

    monkeypatch.setattr(selftest.chains, "verify_chain", fails)
    found = selftest.run("cpu", count=2)
    assert found.wrong == [f"verify_chain case {index}: TypeError: NoneType" for index in range(2)]
    assert found.requests > 0


def test_the_self_test_runs_in_processes():
    parts = list(selftest.run_in_processes("reference", "cpu", 2, 2))
    assert len(parts) == 2
    assert sum(part.requests for part in parts) == selftest.run("reference", count=2).requests
    assert not any(part.wrong for part in parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_command_says_so(tmp_path):
    result = run_python("-m", "specdec_kernels.cli.main", "gpu-report", "--out", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == "error: there is no GPU to report on: torch sees none; --dry runs without one\n"
