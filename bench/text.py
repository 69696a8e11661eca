"""Time the decoding of text on SmolLM2: what the command line does by default, and the rules, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import Progress

from specdec_kernels.bench.decoding import Decoder, name_of
from specdec_kernels.bench.machine import machine, save
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Statistics
from specdec_kernels.ops import RuleName

#: Drafts a step at most, of the comparison of rules.
RULES: tuple[RuleName, ...] = ("token", "block", "coupled")
RULES_LENGTH = 4


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    temperature: float
    rule: RuleName
    num_draft: int | None

    @property
    def name(self) -> str:
        """A line of the table."""
        return f"T={self.temperature:g} {self.rule} {name_of(self.num_draft)}"


def ways() -> Iterator[Way]:
    """Plain decoding first: the others are compared with it."""
    for num_draft in (0, RULES_LENGTH, None):  # greedy, the rules are one
        yield Way(0.0, "token", num_draft)
    yield Way(0.8, "token", 0)
    for rule in RULES:
        yield Way(0.8, rule, RULES_LENGTH)
    yield Way(0.8, "block", None)


def main(out: Path | None, seeds: int, console: Console, device: str = "cpu") -> None:
    """Decode every prompt in every way, the ways in turn, so that a slow minute of the machine hits them all."""
    chosen, decoder = list(ways()), Decoder(device)
    results = {(way, kind): Statistics() for way in chosen for kind in PROMPTS}
    work = [(kind, prompt, seed) for seed in range(seeds) for kind, prompts in PROMPTS.items() for prompt in prompts]
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("decoding", total=len(work) * len(chosen))
        for (kind, prompt, seed), way in product(work, chosen):
            progress.update(task, description=way.name, advance=1)
            if way.temperature == 0 and seed:
                continue  # nothing would change
            arguments = prompt, way.temperature, way.rule, way.num_draft, seed
            if (kind, prompt, seed) == work[0]:
                decoder.decode(*arguments, Statistics())  # warm up
            decoder.decode(*arguments, results[way, kind])
    _print(console, chosen, results)
    rows = [{**asdict(way), "kind": kind, **asdict(statistics)} for (way, kind), statistics in results.items()]
    save(out, "text", machine(), results=rows)


def _print(console: Console, chosen: list[Way], results: dict[tuple[Way, str], Statistics]) -> None:
    """Speed-up over plain decoding and tokens a step, by kind of prompt."""
    for title in ("speed-up", "tokens a step"):
        lines = Lines(console, {title: "<24", **dict.fromkeys(PROMPTS, ">7"), "mean": ">7"})
        for way in chosen:
            rows = [results[way, kind] for kind in PROMPTS]
            plain = [results[Way(way.temperature, "token", 0), kind] for kind in PROMPTS]
            values = [row.tokens_per_step for row in rows]
            if title == "speed-up":
                values = [row.tokens_per_second / base.tokens_per_second for row, base in zip(rows, plain, strict=True)]
            lines.print(way.name, *(f"{x:.2f}" for x in (*values, mean(values))))
