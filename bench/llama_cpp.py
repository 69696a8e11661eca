"""Text of llama.cpp: its own loop and prompt lookup, as llama-cpp-python has them, and ours around it, in one run of at
most eight minutes.

What is timed is the work of the process over its threads, so that what else a machine does is not in it; but work that
one thread does alone counts for its share only. So the results have the time by the clock too.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from torch import get_num_threads

from specdec_kernels.bench.machine import machine, save
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.models import load_drafter, load_gguf, smollm2_gguf
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import stream
from specdec_kernels.extras import brought_by

TOKENS, ROUNDS = 64, 3
#: After so many seconds no other round is begun.
SECONDS = 400.0
TEMPERATURES = (0.0, 0.8)
LOOKUPS = (4, 10)
PLAIN = "plain"


class Contenders:
    """Ways to decode one GGUF file, by name."""

    def __init__(self) -> None:
        with brought_by("llama"):
            import llama_cpp
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.target, self.tokenizer = load_gguf(smollm2_gguf())
        self.ours: dict[str, tuple[Any, int]] = {PLAIN: (None, 0)}
        for count in LOOKUPS:
            self.ours[f"n-grams, {count}"] = load_drafter("lookup", self.target), count
        self.ours["n-grams, adaptive"] = load_drafter("lookup", self.target, adaptive=True), 16
        self.ours["trained drafter, 2"] = load_drafter("model", self.target), 2
        self.ours["trained drafter, adaptive"] = load_drafter("model", self.target, adaptive=True), 16
        self.ours["EAGLE-3, adaptive"] = load_drafter("eagle3", self.target, adaptive=True), 16
        self.ours["both, adaptive"] = load_drafter("auto", self.target, adaptive=True), 16

        def theirs(lookup: int | None) -> Any:
            threads = get_num_threads()
            draft = None if lookup is None else LlamaPromptLookupDecoding(num_pred_tokens=lookup)
            return llama_cpp.Llama(
                str(self.target.path), n_ctx=512, n_threads=threads, n_threads_batch=threads, flash_attn=True,
                draft_model=draft, verbose=False,
            )  # fmt: skip

        self.theirs = {"their loop": theirs(None)}
        self.theirs |= {f"their prompt lookup, {count}": theirs(count) for count in LOOKUPS}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a user's message."""
        message = [{"role": "user", "content": prompt}]
        ids: list[int] = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids

    def run(self, way: str, ids: list[int], temperature: float, seed: int) -> tuple[list[int], float, float]:
        """The text, its tokens a second of work, and those a second by the clock, the prompt not counted."""
        if way in self.ours:
            drafter, most = self.ours[way]
            text = stream(
                self.target, [ids], drafter=drafter, num_draft=most, temperature=temperature, seed=seed, rule="block",
                max_new_tokens=TOKENS,
            )  # fmt: skip
            started = _now()
            tokens = [token.token for token in text]
            return tokens, *_rates(len(tokens), started)
        model, tokens, first = self.theirs[way], [], None
        model.reset()
        model.set_seed(seed)
        for token in model.generate(ids, temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
            first = first or _now()  # its first token comes with the prompt
            tokens.append(token)
            if len(tokens) == TOKENS or token in self.target.stop_tokens:
                break
        return tokens, *_rates(len(tokens) - 1, first or _now())


def _now() -> tuple[float, float]:
    """Seconds that every thread has worked in the mean, and those of the clock."""
    return time.process_time() / get_num_threads(), time.perf_counter()


def _rates(tokens: int, started: tuple[float, float]) -> tuple[float, float]:
    """Tokens a second of either since then."""
    work, clock = (tokens / max(1e-9, now - then) for now, then in zip(_now(), started, strict=True))
    return work, clock


def measure(contenders: Contenders, console: Console) -> list[dict[str, Any]]:
    """Every way on one prompt of every kind, the ways in turn; of the rounds the median speed, and the median ratio to
    our plain loop of the same round. Lines of a table as soon as a kind is done."""
    lines = Lines(console, {"T": ">3", "kind": "<5", "way": "<26", "tokens/s": ">8", "over ours, plain": ">16"})
    results: list[dict[str, Any]] = []
    ways = [*contenders.theirs, *contenders.ours]
    ends = time.monotonic() + SECONDS
    for temperature in TEMPERATURES:
        for kind, (prompt, *_) in PROMPTS.items():
            ids = contenders.encode(prompt)
            rounds = []
            for seed in range(ROUNDS):
                if time.monotonic() > ends:
                    notes.print(f"out of time: temperature {temperature}, {kind} has {seed} of {ROUNDS} rounds")
                    break
                order = ways[seed:] + ways[:seed]
                made = {way: contenders.run(way, ids, temperature, seed) for way in order}
                rounds.append(made)
            for way in ways if rounds else ():
                speed = median(made[way][1] for made in rounds)
                ratio = median(made[way][1] / made[PLAIN][1] for made in rounds)
                results.append(
                    {
                        "temperature": temperature,
                        "kind": kind,
                        "way": way,
                        "rounds": len(rounds),
                        "tokens_per_second": speed,
                        "tokens_per_second_by_the_clock": median(made[way][2] for made in rounds),
                        "speed_up": ratio,
                        "as_theirs": sum(made[way][0] == made["their loop"][0] for made in rounds),
                    }
                )
                lines.print(f"{temperature:g}", kind, way, f"{speed:.1f}", f"{ratio:.2f}x")
    return results


def main(out: Path | None, console: Console) -> None:
    """Measure and print a table; write ``llama_cpp.json`` where there is a directory for it."""
    results = measure(Contenders(), console)
    save(out, "llama_cpp", {**machine(), "threads": get_num_threads()}, results=results)
