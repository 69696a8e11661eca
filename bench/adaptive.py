"""Time the choice of the number of drafts against fixed numbers of them, on the same texts.

Greedy, and at a temperature by the rule ``coupled``: there a text does not depend on what is drafted, so that tokens a
step and seconds compare like with like. In float32: in bfloat16 passes over different numbers of rows round so
differently that texts part after some tens of tokens.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from specdec_kernels.bench.machine import machine
from specdec_kernels.cli.generate import Session, Settings
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Statistics
from specdec_kernels.ops import RuleName

TOKENS = 96
#: Drafts a step at most; 0 is plain decoding, None chooses step by step.
LENGTHS: tuple[int | None, ...] = (0, 1, 2, 3, 4, 6, None)
RULES: dict[float, RuleName] = {0.0: "token", 0.8: "coupled"}


def main(out: Path, seeds: int, console: Console) -> None:
    """Decode every prompt with every number of drafts, in turn, so that a slow minute of the machine hits them all."""
    sessions = {adaptive: Session(_settings("token", None if adaptive else 0), console) for adaptive in (True, False)}
    ways = list(product(RULES, PROMPTS, LENGTHS))
    results = {way: Statistics() for way in ways}
    parted: list[dict[str, Any]] = []
    work = [
        (temperature, kind, prompt, seed)
        for seed, (temperature, rule), (kind, prompts) in product(range(seeds), RULES.items(), PROMPTS.items())
        for prompt in prompts
        if seed == 0 or temperature > 0  # else nothing would change
    ]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("decoding", total=len(work) * len(LENGTHS))
        for temperature, kind, prompt, seed in work:
            texts: dict[int | None, list[int]] = {}
            for length in LENGTHS:
                progress.update(task, description=f"T={temperature:g} {kind} {_name(length)}", advance=1)
                session = sessions[length is None]
                session.settings = _settings(RULES[temperature], length)
                statistics = results[temperature, kind, length]
                decoded = session.decode(prompt, temperature, length != 0, statistics, seed)
                texts[length] = [token.token for token in decoded]
                same = next((i for i, (a, b) in enumerate(zip(texts[length], texts[0], strict=False)) if a != b), None)
                if same is not None:
                    parted.append({"temperature": temperature, "prompt": prompt, "drafts": _name(length), "at": same})
    console.print(_table(results))
    console.print(f"texts that part from plain decoding's: {len(parted)} of {len(work) * (len(LENGTHS) - 1)}")
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"temperature": temperature, "kind": kind, "drafts": _name(length), "tokens_per_second": s.tokens_per_second,
         "tokens_per_step": s.tokens_per_step}
        for (temperature, kind, length), s in results.items()
    ]  # fmt: skip
    (out / "adaptive.json").write_text(
        json.dumps({"machine": machine(), "results": rows, "parted": parted}, indent=1) + "\n"
    )
    console.print(f"wrote {out / 'adaptive.json'}")


def _name(length: int | None) -> str:
    return "adaptive" if length is None else f"K={length}" if length else "plain"


def _settings(rule: RuleName, num_draft: int | None) -> Settings:
    return Settings("smollm2", None, "auto", num_draft, TOKENS, 0, None, "float32", rule)


def _table(results: dict[tuple[float, str, int | None], Statistics]) -> Table:
    """Tokens a second relative to plain decoding, and adaptive beside the best fixed number."""
    table = Table("T", "kind", "plain tokens/s", *map(_name, LENGTHS[1:]), "adaptive / best")
    for temperature, kind in product(RULES, PROMPTS):
        rates = {length: results[temperature, kind, length].tokens_per_second for length in LENGTHS}
        best = max(rate for length, rate in rates.items() if length)
        table.add_row(
            f"{temperature:g}",
            kind,
            f"{rates[0]:.1f}",
            *(f"{rates[length] / rates[0]:.2f}" for length in LENGTHS[1:]),
            f"{rates[None] / best:.2f}",
        )
    return table
