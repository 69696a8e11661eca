"""Time the choice of the number of drafts against fixed numbers of them, on the same texts.

Greedy, and at a temperature by the rule ``coupled``: there a text depends on the logits alone, not on what is drafted,
and the logits are those of the first time the text was decoded. So tokens a second compare like with like.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from specdec_kernels.bench.decoding import Decoder, name_of
from specdec_kernels.bench.machine import machine
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Scores, Statistics, TransformersTarget
from specdec_kernels.ops import RuleName

#: Drafts a step at most; 0 is plain decoding, None chooses step by step.
LENGTHS: tuple[int | None, ...] = (0, 1, 2, 3, 4, 6, None)
RULES: dict[float, RuleName] = {0.0: "token", 0.8: "coupled"}
#: Times each text is decoded each way.
REPEATS = 3


class Replayed(TransformersTarget):
    """A target that scores as ever, which takes the time it takes, and gives the logits that it gave the first time.

    Passes over different numbers of rows round differently; texts would part, and with them what there is to accept.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._table: list[Tensor] = []  # of the text as far as it is known

    def begin(self, *arguments: Any) -> Tensor | None:
        """From the start of the text."""
        self._at = 0
        return super().begin(*arguments)

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Tensor) -> Scores:
        """Of rows behind a wrong draft nothing is asked; the others are those of the text."""
        scores = super().score(tokens, counts)
        if self._at == len(self._table):  # the first time, without drafts
            self._table.append(scores.logits[0, -1].clone())
        for row, logits in enumerate(self._table[self._at : self._at + tokens.shape[1]]):
            scores.logits[0, row] = logits
        return scores

    def keep(self, rows: Tensor) -> None:
        """Follow the text."""
        self._at += int(rows)
        super().keep(rows)


Cell = tuple[float, str, int | None]


def main(out: Path, seeds: int, console: Console) -> None:
    """Decode every prompt with every number of drafts, in turn. Of each the fastest of several times counts, since they
    do the same and what takes longer is other work of the machine; their order differs, since caches remember."""
    decoder = Decoder(console)
    results: dict[Cell, list[Statistics]] = {cell: [] for cell in product(RULES, PROMPTS, LENGTHS)}
    work = [
        (temperature, kind, prompt, seed)
        for temperature, (kind, prompts), seed in product(RULES, PROMPTS.items(), range(seeds))
        for prompt in prompts
        if temperature or not seed  # greedy texts are the same with any seed
    ]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("decoding", total=len(work) * len(LENGTHS) * REPEATS)
        for temperature, kind, prompt, seed in work:
            target = Replayed(decoder.model)
            decode = partial(decoder.decode, prompt, temperature, RULES[temperature], seed=seed, target=target)
            text = decode(num_draft=0, statistics=Statistics())  # to know it, and to warm up
            runs: dict[int | None, list[Statistics]] = {length: [] for length in LENGTHS}
            for repeat in range(REPEATS):
                first = repeat * len(LENGTHS) // REPEATS
                for length in LENGTHS[first:] + LENGTHS[:first]:
                    progress.update(task, description=f"T={temperature:g} {kind} {name_of(length)}", advance=1)
                    runs[length].append(Statistics())
                    if decode(num_draft=length, statistics=runs[length][-1]) != text:
                        raise RuntimeError(f"{name_of(length)} drafts changed the text of {prompt!r}")
            for length, times in runs.items():
                results[temperature, kind, length].append(min(times, key=lambda s: s.decode_seconds))
    console.print(_table(results))
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"temperature": temperature, "kind": kind, "drafts": name_of(length), **_rates(texts)}
        for (temperature, kind, length), texts in results.items()
    ]
    (out / "adaptive.json").write_text(json.dumps({"machine": machine(), "results": rows}, indent=1) + "\n")
    console.print(f"wrote {out / 'adaptive.json'}")


def _rates(texts: list[Statistics]) -> dict[str, float]:
    emitted, steps = sum(s.emitted for s in texts), sum(s.request_steps for s in texts)
    return {
        "tokens_per_second": emitted / sum(s.decode_seconds for s in texts),
        "tokens_per_step": emitted / steps,
        "drafts_per_step": sum(s.proposed for s in texts) / steps,
    }


def _table(results: dict[Cell, list[Statistics]]) -> Table:
    """Tokens a second relative to plain decoding, and adaptive beside the best fixed number."""
    table = Table("T", "kind", "plain/s", *map(name_of, LENGTHS[1:]), "to best")
    for temperature in RULES:
        speed_ups = []
        for kind in PROMPTS:
            rates = {length: _rates(results[temperature, kind, length])["tokens_per_second"] for length in LENGTHS}
            speed_ups.append([rates[length] / rates[0] for length in LENGTHS[1:]])
            cells = [f"{x:.2f}" for x in (*speed_ups[-1], speed_ups[-1][-1] / max(speed_ups[-1][:-1]))]
            table.add_row(f"{temperature:g}", kind, f"{rates[0]:.1f}", *cells)
        means = [mean(column) for column in zip(*speed_ups, strict=True)]
        cells = [f"{x:.2f}" for x in (*means, means[-1] / max(means[:-1]))]
        table.add_row(f"{temperature:g}", "mean", "", *cells, end_section=True)
    return table
