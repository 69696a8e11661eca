"""One report of a GPU: what is installed, whether every backend is right, and how fast it is, in under five minutes.

    python -m specdec_kernels.bench.report --out results           # all parts; --dry: on a CPU, tiny, to try it
    python -m specdec_kernels.bench.report --part versions         # one part, its rows as lines of JSON

Every part is a process of its own, which is killed with all that it started when its time is over. Rows are written as
soon as a part prints them: what hangs or dies costs its own results and no others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from specdec_kernels.bench import report_parts
from specdec_kernels.bench.report_parts import Row, Setting


@dataclass(frozen=True)
class Part:
    """A function that yields rows, and the seconds that it may take, the start of its process among them."""

    name: str
    limit_s: float
    rows: Callable[[Setting], Iterator[Row]]


#: In the order in which they run; what is likely to fail comes late. Their limits add up to less than five minutes.
PARTS = (
    Part("versions", 20, report_parts.versions),
    Part("self-test reference", 25, partial(report_parts.self_test, backend="reference", count=24)),
    Part("self-test cuda", 40, partial(report_parts.self_test, backend="cuda", count=60)),
    Part("chains cuda", 35, partial(report_parts.chains, backend="cuda")),
    Part("trees cuda", 30, partial(report_parts.trees, backend="cuda")),
    Part("masks and attention", 20, report_parts.masks_and_attention),
    Part("text", 35, report_parts.text),
    Part("self-test triton", 50, partial(report_parts.self_test, backend="triton", count=36)),
    Part("chains and trees triton", 40, report_parts.triton),
)
#: On a CPU Triton is interpreted and the CUDA programs are emulated, which has to be set before they are imported; what
#: is tiny takes one thread.
DRY = {"SPECDEC_EMULATE_CUDA": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def part_command(part: Part, dry: bool) -> list[str]:
    """What runs a part."""
    return [sys.executable, "-m", "specdec_kernels.bench.report", "--part", part.name, *(["--dry"] if dry else [])]


# --- a part, in its own process ---------------------------------------------------------------------------------------


def print_rows(part: Part, setting: Setting) -> None:
    """One line of JSON a row. What else writes to the standard output finds the standard error there."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)
        for row in part.rows(setting):
            print(json.dumps(row), file=lines, flush=True)


# --- all parts --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What is known so far; every change is written to ``stem.json`` and ``stem.md``."""

    stem: Path
    rows: list[Row] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)
    """How each part ended."""

    def add(self, part: str, row: Row) -> None:
        """A row, as soon as it is there."""
        self.rows.append({"part": part, **row})
        self.write()

    def end(self, part: str, how: str) -> str:
        """How a part ended, and how many of its rows say that something failed."""
        failures = sum(row["part"] == part and "failed" in row for row in self.rows)
        self.ended[part] = how + (f"; {failures} failed" if failures else "")
        self.write()
        return self.ended[part]

    @property
    def healthy(self) -> bool:
        """Whether every part came to its end and nothing failed in it."""
        return all(how.startswith("done") and not how.endswith("failed") for how in self.ended.values())

    def write(self) -> None:
        """Whole files, put in place at once: a reader never sees a half."""
        for suffix, text in (
            (".json", json.dumps(vars(self) | {"stem": self.stem.name}, indent=1)),
            (".md", self.text),
        ):
            new = self.stem.with_name(self.stem.name + suffix + ".new")
            new.write_text(text + "\n")
            new.replace(self.stem.with_name(self.stem.name + suffix))

    @property
    def text(self) -> str:
        """A table a part."""
        lines = [f"# {self.stem.name}", ""]
        for part in dict.fromkeys([*(row["part"] for row in self.rows), *self.ended]):
            rows = [
                {key: value for key, value in row.items() if key != "part"} for row in self.rows if row["part"] == part
            ]
            lines += [f"## {part}: {self.ended.get(part, 'running')}", "", *table(rows), ""]
        return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)] if rows else []
    lines += [[shown(row.get(name)) for name in names] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return ""
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def watch(command: Sequence[str], limit_s: float, log: IO[str], row: Callable[[Row], None], env: dict[str, str]) -> str:
    """Run a command, hand on the rows that it prints, and say how it ended; its standard error goes to ``log``."""
    log.flush()
    begin, started = log.tell(), time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, env=os.environ | env, start_new_session=True
    )
    assert process.stdout is not None
    pipe, waiting, open_ = process.stdout.fileno(), b"", True
    os.set_blocking(pipe, False)
    try:
        while open_ and (left := started + limit_s - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left)[0]:
                break
            piece = os.read(pipe, 1 << 16)
            open_ = bool(piece)
            *lines, waiting = (waiting + piece).split(b"\n")
            for found in filter(None, map(parsed, lines)):
                row(found)
        try:
            code = process.wait(max(0.0, started + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"killed after {time.monotonic() - started:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has left behind
        process.wait()
        process.stdout.close()
    seconds = time.monotonic() - started
    return f"done in {seconds:.0f} s" if code == 0 else f"failed after {seconds:.0f} s: {_last_line(log, begin, code)}"


def parsed(line: bytes) -> Row | None:
    """A row; None for what a library prints while it is imported."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _last_line(log: IO[str], begin: int, code: int) -> str:
    """Of what a part has written to the log, or the signal that it died of."""
    with open(log.name, errors="replace") as written:
        written.seek(begin)
        lines = [line for line in written.read().splitlines() if line.strip()]
    died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return lines[-1].strip() if lines and code > 0 else died


def run(out: Path, dry: bool, say: Callable[[str], None], parts: Sequence[Part] = PARTS) -> bool:
    """Run all parts, one after the other; whether all of them are well. ``say`` is told how each ended."""
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU to report on: torch sees none; --dry runs without one")
    gpu = "dry" if dry else torch.cuda.get_device_name()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()) + "-report"))
    started = time.monotonic()
    with open(report.stem.with_name(report.stem.name + ".log"), "w") as log:
        for part in parts:
            how = watch(part_command(part, dry), part.limit_s, log, partial(report.add, part.name), DRY if dry else {})
            say(f"{part.name}: {report.end(part.name, how)}")
    say(f"{time.monotonic() - started:.0f} s in all; {report.stem}.md, .json, .log")
    return report.healthy


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    given = parser.parse_args()
    if given.part is None:
        if given.out is None:
            parser.error("--out must name the directory of the report")
        sys.exit(not run(given.out, given.dry, print))
    part = next(part for part in PARTS if part.name == given.part)
    print_rows(part, Setting("cpu" if given.dry else "cuda", given.dry))


if __name__ == "__main__":
    main()
