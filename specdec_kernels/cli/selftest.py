"""``specdec selftest``: every backend of a device against the oracle, as a report to paste into a bug."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from specdec_kernels import selftest
from specdec_kernels.cli.consoles import print_line
from specdec_kernels.cli.doctor import describe
from specdec_kernels.ops import BACKENDS

#: Lines of what is wrong with a backend that are printed.
MOST_LINES = 20
#: Processes that share a GPU at most.
MOST_PROCESSES = 12


def processes(device: str) -> int:
    """How many test a backend side by side: on a GPU they compile, and the oracle computes, each on a core of its own;
    a CPU backend has threads for all cores."""
    return min(MOST_PROCESSES, os.cpu_count() or 1) if torch.device(device).type == "cuda" else 1


def summary(name: str, device: str, result: selftest.Report, seconds: float) -> str:
    """One line."""
    return (
        f"{name} ({BACKENDS[name].detail}) on {device}: {result.requests} compared, {result.too_close} too close "
        f"to call, {len(result.wrong)} wrong, {seconds:.0f} s"
    )


def report(console: Console, device: str, backends: Sequence[str], count: int) -> bool:
    """Print it; whether every backend agrees with the oracle.

    Raises:
        ValueError: a backend that there is not, or none that runs on ``device``.
        RuntimeError: a backend was asked for that cannot run here, or not on ``device``.
    """
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {', '.join(sorted(unknown))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device cuda cannot be tested: torch sees no GPU")
    kind = torch.device(device)
    for name in backends:
        BACKENDS[name].require(kind)
    runs = [name for name, backend in BACKENDS.items() if not backend.reason and backend.device in ("any", kind.type)]
    describe(console)
    healthy = True
    for name in backends or runs:
        started = time.perf_counter()
        result = selftest.Report()
        for part in selftest.run_in_processes(name, device, count, processes(device)):  # type: ignore[arg-type]
            result.add(part)
        healthy &= not result.wrong
        seconds = time.perf_counter() - started
        print_line(console, summary(name, device, result, seconds))
        for line in result.wrong[:MOST_LINES]:
            print_line(console, "  " + line)
        if len(result.wrong) > MOST_LINES:
            console.print(f"  and {len(result.wrong) - MOST_LINES} more", highlight=False)
    return healthy
