"""Time every case, side by side in one run; write JSON and a plot where a directory is named."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from specdec_kernels.bench.cases import Case, Inputs, cases, inputs
from specdec_kernels.bench.clocks import percentiles
from specdec_kernels.bench.contenders import contenders, fused
from specdec_kernels.bench.machine import machine, require_plots, save
from specdec_kernels.cli.consoles import Lines, notes, print_line

#: Hand-tuned PyTorch, of which the fastest counts.
LEAN = ("lean rows", "lean rows, searched", "lean batch", "lean batch, searched", "lean filtered")
#: Rounds of the fast contenders, and of the slow ones.
MOST_ROUNDS, SECONDS, SLOW_ROUNDS = 400, 2.0, 7
#: Of what *stream* takes for equally many bytes the 80th percentile over the 20th, where a machine does nothing else.
QUIET = 1.5


def check(case: Case, buffers: list[Inputs]) -> None:
    """Refuse to time a wrong answer: the reference has to give the same tokens."""
    for x in buffers[:2]:
        got, want = fused(case, x), fused(case, x, "reference")
        if not torch.equal(got.tokens, want.tokens):
            raise RuntimeError(
                f"{case.name}: the reference disagrees: {got.tokens.tolist()} and {want.tokens.tolist()}"
            )


def turns(names: Sequence[str], buffers: int) -> Iterator[tuple[str, int]]:
    """Who reads which buffer, without end: always the next one, so that between two uses of a byte all buffers are read
    once, whoever used it; each time around another of the names begins, so that all of them read every buffer."""
    for lap in count():
        for index in range(buffers):
            yield names[(lap + index) % len(names)], index


def measure(case: Case) -> dict[str, Any]:
    """All contenders on the same buffers, in turn."""
    buffers = inputs(case, lambda x: fused(case, x).num_accepted.long())
    check(case, buffers)
    chosen = {name: [prepared(case, x) for x in buffers] for name, prepared in contenders(case).items()}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    fast = [name for name in ("fused", "stream", "token rule") if name in chosen]
    started, least = time.perf_counter(), max(2 * len(buffers), MOST_ROUNDS // 4)
    streamed: dict[int, list[float]] = defaultdict(list)
    for name, index in turns(fast, len(buffers)):
        rounds = min(len(times[each]) for each in fast)
        if rounds >= least and (rounds >= MOST_ROUNDS or time.perf_counter() - started >= SECONDS):
            break
        times[name].append(timed(chosen[name][index]))
        if name == "stream":
            streamed[case.bytes_read(buffers[index])].append(times[name][-1])
    for name, calls in chosen.items():
        if name not in fast:
            calls[-1]()
            times[name] = [timed(calls[i % len(buffers)]) for i in range(SLOW_ROUNDS)]
    results = {name: percentiles(seconds) for name, seconds in times.items()}
    bytes_read = sum(case.bytes_read(x) for x in buffers) / len(buffers)
    lean = [results[name]["p50"] for name in LEAN if name in results]
    return {
        "case": case.name,
        **vars(case),
        "accepted": float(torch.cat([x.target_rows for x in buffers]).float().mean() - 1),
        "bytes": bytes_read,
        "gigabytes_per_second": bytes_read / results["fused"]["p50"] / 1e3,
        "microseconds": results,
        "stream_spread": spread(streamed),
        "over_streaming": results["fused"]["p50"] / results["stream"]["p50"],
        "faster_than_lean": min(lean) / results["fused"]["p50"] if lean else None,
        "over_token_rule": None if case.plain else results["fused"]["p50"] / results["token rule"]["p50"],
    }


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: dict[int, list[float]]) -> float:
    """The 80th percentile over the 20th of calls that read different numbers of bytes, each beside those of its own."""
    ordered = percentiles([each / median(alike) for alike in times.values() for each in alike])
    return ordered["p80"] / ordered["p20"]


def table(console: Console) -> Lines:
    """Microseconds: ours, reading the same rows, and the fastest of PyTorch; JSON has the rest."""
    return Lines(
        console,
        {"V": ">6", "K": ">2", "B": ">2", "dtype": "<8", "drafts": "<10", "us": ">6", "stream": ">6", "ratio": ">5",
         "PyTorch": ">7", "faster": ">6"},
    )  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A case in that table."""
    times = {name: f"{time['p50']:,.0f}" for name, time in row["microseconds"].items()}
    lean = min((row["microseconds"][name]["p50"] for name in LEAN if name in times), default=None)
    drafts = "block" if row["rule"] == "block" else "filtered" if row["filtered"] else row["kind"]
    shape = [str(row[name]) for name in ("vocab", "num_draft", "batch", "dtype")]
    faster = ["", ""] if lean is None else [f"{lean:,.0f}", f"{row['faster_than_lean']:.0f}x"]
    return [*shape, drafts, times["fused"], times["stream"], f"{row['over_streaming']:.2f}", *faster]


def plot(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Times at V = 128,256 and K = 8, the floor beside them."""
    from matplotlib import pyplot

    shown = [r for r in rows if (r["vocab"], r["num_draft"], r["kind"]) == (128_256, 8, "statistics")]
    names = ("stream", "fused", *LEAN[:4], "batched", "transformers")  # without filters
    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    for offset, name in enumerate(names):
        at = [(i, r["microseconds"][name]["p50"]) for i, r in enumerate(shown) if name in r["microseconds"]]
        axes.bar([i + 0.1 * (offset - 3.5) for i, _ in at], [t for _, t in at], 0.1, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shown)), [f"B={r['batch']}\n{r['dtype']}" for r in shown])
    axes.set_ylabel("microseconds a call, median, cold cache")
    axes.set_title(f"verify_chain, V=128,256, K=8, T=0.7 - {where['processor']}, {where['cores']} threads")
    axes.legend(ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(out: Path | None, quick: bool, console: Console) -> None:
    """Run the grid."""
    if out is not None:
        require_plots()
    rows, lines = [], table(console)
    for case in cases(quick):
        with notes.status(case.name):
            rows.append(measure(case))
        lines.print(*cells(rows[-1]))
    if (worst := max(rows, key=lambda row: row["stream_spread"]))["stream_spread"] > QUIET:
        print_line(
            notes,
            "warning: the machine was not quiet, and ratios say little: p80 / p20 of stream, for equally many bytes, "
            f"must be at most {QUIET}, got {worst['stream_spread']:.1f} at {worst['case']}",
        )
    where = machine()
    console.print(where)
    save(out, "cpu", where, results=rows)
    if out is not None:
        plot(rows, where, out / "cpu.png")
