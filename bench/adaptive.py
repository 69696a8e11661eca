"""Time the choice of the number of drafts against fixed numbers of them, on the same texts.

Greedy, and at a temperature by the rule ``coupled``: there a text depends on the logits alone, not on what is drafted,
and the logits are those of the first time the text was decoded. So all ways take the same text apart into steps, and a
step over as many rows is the same work in each of them: it is given the time that such steps took in the median of the
whole run. What else the machine did while one way had its turn falls on all of them, and choices pay as they were made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from specdec_kernels.bench.decoding import Decoder, name_of
from specdec_kernels.bench.machine import machine, save
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Scores, Statistics, TargetSession, TransformersTarget
from specdec_kernels.ops import RuleName
from specdec_kernels.ops.trees import tree_positions

#: Drafts a step at most; 0 is plain decoding, None chooses step by step.
LENGTHS: tuple[int | None, ...] = (0, 1, 2, 3, 4, 6, None)
RULES: dict[float, RuleName] = {0.0: "token", 0.8: "coupled"}
#: Times each text is decoded each way.
REPEATS = 2


class Replayed(TransformersTarget):
    """A target that scores as always, which takes the time it takes, and gives the logits that it gave the first time.

    Passes over different numbers of rows round differently; texts would part, and with them what there is to accept.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.table: list[Tensor] = []  # of the text as far as it is known

    def begin(self, *arguments: Any, **named: Any) -> ReplayedSession:
        """From the start of the text."""
        return ReplayedSession(super().begin(*arguments, **named), self.table)


class ReplayedSession:
    """One stream of it, of a batch of one."""

    def __init__(self, session: TargetSession, table: list[Tensor]) -> None:
        self._session, self._table, self._at = session, table, 0
        self.features, self.max_rows, self.select = session.features, session.max_rows, session.select

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        """Rows behind a wrong draft do not matter; the others are those of the text."""
        scores = self._session.score(tokens, counts)
        if self._at == len(self._table):  # the first time, without drafts
            self._table.append(scores.logits[0, -1].clone())
        for row, logits in enumerate(self._table[self._at : self._at + tokens.shape[1]]):
            scores.logits[0, row] = logits
        return scores

    @torch.inference_mode()
    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        """Likewise: only the nodes of the text are visited, and behind them it goes on as it did."""
        scores = self._session.score_tree(tokens, parents)
        for node, depth in enumerate(tree_positions(parents)[0].tolist()):
            if self._at + depth < len(self._table):
                scores.logits[0, node] = self._table[self._at + depth]
        return scores

    def commit(self, counts: Sequence[int]) -> None:
        """Follow the text."""
        self._at += counts[0]
        self._session.commit(counts)

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Likewise."""
        self._at += len(paths[0])
        self._session.commit_path(paths)


@dataclass
class Timed(Statistics):
    """Statistics that keep the steps of a batch of one apart."""

    passes: list[tuple[int, float]] = field(default_factory=list)
    """Of every step the rows it scored, and the seconds of all but the drafting."""

    def count(self, proposed: int, accepted: int, depth: int | None = None) -> None:
        """And note what the step took."""
        super().count(proposed, accepted, depth)
        before = sum(taken for _, taken in self.passes)
        self.passes.append((1 + proposed, self.decode_seconds - self.seconds["draft"] - before))


Cell = tuple[float, str, int | None]
#: Of every text the times it was decoded.
Texts = list[list[Timed]]


def main(out: Path | None, seeds: int, console: Console) -> None:
    """Decode every prompt with every number of drafts, in turn, several times and in another order each time."""
    decoder = Decoder()
    results: dict[Cell, Texts] = {cell: [] for cell in product(RULES, PROMPTS, LENGTHS)}
    work = [
        (temperature, kind, prompt, seed)
        for temperature, (kind, prompts), seed in product(RULES, PROMPTS.items(), range(seeds))
        for prompt in prompts
        if temperature or not seed  # greedy texts are the same with any seed
    ]
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("decoding", total=len(work) * len(LENGTHS) * REPEATS)
        for temperature, kind, prompt, seed in work:
            target = Replayed(decoder.model)
            decode = partial(decoder.decode, prompt, temperature, RULES[temperature], seed=seed, target=target)
            text = decode(num_draft=0, statistics=Statistics())  # to know it, and to warm up
            for length in LENGTHS:
                results[temperature, kind, length].append([])
            for repeat in range(REPEATS):
                first = repeat * len(LENGTHS) // REPEATS
                for length in LENGTHS[first:] + LENGTHS[:first]:
                    progress.update(task, description=f"T={temperature:g} {kind} {name_of(length)}", advance=1)
                    statistics = Timed()
                    if decode(num_draft=length, statistics=statistics) != text:
                        raise RuntimeError(f"{name_of(length)} drafts changed the text of {prompt!r}")
                    results[temperature, kind, length][-1].append(statistics)
    costs = _seconds_by_rows(run for texts in results.values() for text in texts for run in text)
    rates = {cell: _rates(texts, costs) for cell, texts in results.items()}
    _print(console, {cell: rate["tokens_per_second"] for cell, rate in rates.items()})
    rows = [
        {"temperature": temperature, "kind": kind, "drafts": name_of(length), **rate}
        for (temperature, kind, length), rate in rates.items()
    ]
    save(out, "adaptive", machine(), seconds_by_rows=costs, results=rows)


def _seconds_by_rows(runs: Iterable[Timed]) -> dict[int, float]:
    """The median time of a step over so many rows, whoever asked for it."""
    seconds = defaultdict(list)
    for run in runs:
        for rows, taken in run.passes:
            seconds[rows].append(taken)
    return {rows: median(seconds[rows]) for rows in sorted(seconds)}


def _rates(texts: Texts, costs: dict[int, float]) -> dict[str, float]:
    """Tokens a second with steps at what they cost, and as they were timed; drafting is the median of a text's."""
    runs = [run for text in texts for run in text]
    emitted, steps = sum(run.emitted for run in runs), sum(run.request_steps for run in runs)
    passes = sum(costs[rows] for run in runs for rows, _ in run.passes)
    drafting = sum(len(text) * median(run.seconds["draft"] for run in text) for text in texts)
    return {
        "tokens_per_second": emitted / (passes + drafting),
        "timed_tokens_per_second": emitted / sum(run.decode_seconds for run in runs),
        "tokens_per_step": emitted / steps,
        "drafts_per_step": sum(run.proposed for run in runs) / steps,
    }


def _print(console: Console, tokens_per_second: dict[Cell, float]) -> None:
    """Tokens a second relative to plain decoding, and adaptive beside the best fixed number."""
    drafted = {name_of(length): ">8" if length is None else ">5" for length in LENGTHS[1:]}
    lines = Lines(console, {"T": ">3", "kind": "<5", "plain/s": ">7", **drafted, "to best": ">7"})
    for temperature in RULES:
        speed_ups = []
        for kind in PROMPTS:
            plain, *others = (tokens_per_second[temperature, kind, length] for length in LENGTHS)
            speed_ups.append([rate / plain for rate in others])
            cells = [f"{x:.2f}" for x in (*speed_ups[-1], speed_ups[-1][-1] / max(speed_ups[-1][:-1]))]
            lines.print(f"{temperature:g}", kind, f"{plain:.1f}", *cells)
        means = [mean(column) for column in zip(*speed_ups, strict=True)]
        cells = [f"{x:.2f}" for x in (*means, means[-1] / max(means[:-1]))]
        lines.print(f"{temperature:g}", "mean", "", *cells)
