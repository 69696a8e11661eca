"""Text inside transformers: plain ``generate``, its own prompt lookup, and ours through ``custom_generate``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from specdec_kernels.bench.machine import machine
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.models import load_drafter, load_target
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.integrations.transformers import generate

#: Prompts of each kind, and texts of each batch.
PER_KIND, ROUNDS, TOKENS = 1, 1, 64
TEMPERATURES = (0.0, 0.8)
LOOKUPS = (4, 10)
#: Theirs stays at one prompt.
THEIRS = "their prompt lookup"


class Contenders:
    """Ways to generate, by name, for one model."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_target()
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        drafter = load_drafter("auto", self.model, adaptive=True)
        own = {"custom_generate": generate}
        self.ways: dict[str, dict[str, Any]] = {"plain": {}}
        for count in LOOKUPS:
            self.ways[f"{THEIRS}, {count}"] = {"prompt_lookup_num_tokens": count}
            self.ways[f"our prompt lookup, {count}"] = {**own, "prompt_lookup_num_tokens": count}
        self.ways["our trained drafter"] = {**own, "drafter": drafter, "num_draft": 16, "rule": "block"}

    def encode(self, prompts: list[str]) -> Any:
        """Templated prompts as a batch."""
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )

    def run(
        self, way: str, inputs: Any, temperature: float, seed: int, tokens: int = TOKENS
    ) -> tuple[float, int, list[list[int]]]:
        """(seconds, tokens, texts)."""
        torch.manual_seed(seed)
        end, sampling = self.tokenizer.eos_token_id, {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}  # type: ignore[dict-item]
        started = time.perf_counter()
        out = self.model.generate(
            **inputs, max_new_tokens=tokens, eos_token_id=end, pad_token_id=end, **sampling, **self.ways[way]
        )
        seconds = time.perf_counter() - started
        texts = [
            row[: row.index(end) + 1] if end in row else row for row in out[:, inputs["input_ids"].shape[1] :].tolist()
        ]
        return seconds, sum(map(len, texts)), texts


def measure(contenders: Contenders) -> list[dict[str, Any]]:
    """Every way on every batch in turn, in an order that goes round."""
    every = [prompt for kind in PROMPTS.values() for prompt in kind[:PER_KIND]]
    batches = [[prompt] for prompt in every] + [every]
    results: dict[tuple[float, int, str], dict[str, Any]] = {}
    turn = 0
    for temperature in TEMPERATURES:
        for batch in batches:
            inputs = contenders.encode(batch)
            ways = [way for way in contenders.ways if len(batch) == 1 or not way.startswith(THEIRS)]
            if batch is batches[0] or len(batch) > 1:
                for way in ways:
                    contenders.run(way, inputs, temperature, seed=0, tokens=4)  # warm up
            plain: list[list[int]] = []
            for round_ in range(ROUNDS):
                turn += 1
                order = ways if round_ == 0 else ways[turn % len(ways) :] + ways[: turn % len(ways)]
                for way in order:
                    seconds, tokens, texts = contenders.run(way, inputs, temperature, seed=round_)
                    plain = texts if way == "plain" and not plain else plain
                    made = results.setdefault(
                        (temperature, len(batch), way),
                        {"temperature": temperature, "batch": len(batch), "way": way, "seconds": 0.0, "tokens": 0,
                         "texts": 0, "as_plain": 0},
                    )  # fmt: skip
                    made["seconds"] += seconds
                    made["tokens"] += tokens
                    made["texts"] += len(texts)
                    made["as_plain"] += sum(a == b for a, b in zip(texts, plain, strict=True))
            notes.print(f"temperature {temperature}, batch {len(batch)}: done")
    for (temperature, size, _), made in results.items():
        base = results[temperature, size, "plain"]
        made["tokens_per_second"] = made["tokens"] / made["seconds"]
        made["speed_up"] = made["tokens_per_second"] * base["seconds"] / base["tokens"]
    return list(results.values())


def main(out: Path | None, console: Console) -> None:
    """Measure and print a table; write ``transformers.json`` where there is a directory for it."""
    results = measure(Contenders())
    lines = Lines(
        console, {"T": ">3", "batch": ">5", "way": "<22", "tokens/s": ">8", "speed-up": ">8", "texts as plain": ">14"}
    )
    for each in results:
        equal = "" if each["temperature"] else f"{each['as_plain']} of {each['texts']}"
        lines.print(
            f"{each['temperature']}", f"{each['batch']}", each["way"], f"{each['tokens_per_second']:.1f}",
            f"{each['speed_up']:.2f}x", equal,
        )  # fmt: skip
    if out is not None:
        record = {"machine": {**machine(), "transformers": transformers.__version__}, "results": results}
        (out / "transformers.json").write_text(json.dumps(record, indent=1) + "\n")
