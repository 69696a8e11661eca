"""Text inside transformers: plain ``generate``, its own prompt lookup and assisted decoding, and ours through
``custom_generate``, in one run of at most eight minutes."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from specdec_kernels.bench.machine import machine, save
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.models import load_drafter, load_target
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import pack_linear
from specdec_kernels.integrations.transformers import generate

#: Prompts of each kind, and texts of each batch.
PER_KIND, ROUNDS, TOKENS = 1, 1, 64
#: After so many seconds no other batch is begun.
SECONDS = 400.0
TEMPERATURES = (0.0, 0.8)
LOOKUPS = (4, 10)
#: Theirs stay at one prompt.
THEIRS = "their "
PLAIN = "plain"
#: Layers that the assistant does without; its first choice is the target's for 0.66 of the tokens.
LEFT_OUT = range(12, 17)


def shortened(model: Any) -> Any:
    """A model without its layers ``LEFT_OUT``: what stands in for a smaller one with the same tokenizer, to compare how
    an assistant is used. With five sixths of the layers it makes nothing faster."""
    config = copy.deepcopy(model.config)
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in LEFT_OUT]
    config.num_hidden_layers = len(kept)
    assistant = type(model)(config).to(model.dtype).eval()
    for name in ("embed_tokens", "norm"):
        getattr(assistant.model, name).load_state_dict(getattr(model.model, name).state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    for own, layer in zip(assistant.model.layers, kept, strict=True):
        own.load_state_dict(model.model.layers[layer].state_dict())
    assistant.generation_config.num_assistant_tokens = LOOKUPS[0]
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return pack_linear(assistant)


class Contenders:
    """Ways to generate, by name, for one model."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_target()
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        drafter = load_drafter("auto", self.model, adaptive=True)
        own = {"custom_generate": generate}
        self.ways: dict[str, dict[str, Any]] = {PLAIN: {}}
        for count in LOOKUPS:
            self.ways[f"{THEIRS}prompt lookup, {count}"] = {"prompt_lookup_num_tokens": count}
            self.ways[f"our prompt lookup, {count}"] = {**own, "prompt_lookup_num_tokens": count}
        assistant = {"assistant_model": shortened(self.model)}
        self.ways[f"{THEIRS}assistant, {LOOKUPS[0]}"] = assistant
        self.ways[f"our assistant, {LOOKUPS[0]}"] = {**own, **assistant, "num_draft": LOOKUPS[0]}
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


def measure(contenders: Contenders, console: Console) -> list[dict[str, Any]]:
    """Every way on every batch, the ways in turn; lines of a table as soon as all batches of a size are done."""
    every = [prompt for kind in PROMPTS.values() for prompt in kind[:PER_KIND]]
    lines = Lines(
        console, {"T": ">3", "batch": ">5", "way": "<22", "tokens/s": ">8", "speed-up": ">8", "texts as plain": ">14"}
    )
    started, results = time.perf_counter(), list[dict[str, Any]]()
    for temperature in TEMPERATURES:
        for batches in ([[prompt] for prompt in every], [every]):
            size = len(batches[0])
            ways = [way for way in contenders.ways if size == 1 or not way.startswith(THEIRS)]
            made = {
                way: {"temperature": temperature, "batch": size, "way": way, "seconds": 0.0, "tokens": 0, "texts": 0,
                      "as_plain": 0}
                for way in ways
            }  # fmt: skip
            for index, batch in enumerate(batches):
                if time.perf_counter() - started > SECONDS:
                    notes.print(f"out of time: temperature {temperature}, batch {size} has {index} of {len(batches)}")
                    break
                inputs = contenders.encode(batch)
                if index == 0:
                    for way in ways:
                        contenders.run(way, inputs, temperature, seed=0, tokens=4)  # warm up
                _add(contenders, made, inputs, temperature, index)
                notes.print(f"temperature {temperature}, batch {size}: {index + 1} of {len(batches)}")
            base = made[PLAIN]
            for each in made.values():
                if not each["texts"]:
                    continue
                each["tokens_per_second"] = each["tokens"] / each["seconds"]
                each["speed_up"] = each["tokens_per_second"] * base["seconds"] / base["tokens"]
                results.append(each)
                equal = "" if temperature else f"{each['as_plain']} of {each['texts']}"
                lines.print(
                    f"{temperature}", f"{size}", each["way"], f"{each['tokens_per_second']:.1f}",
                    f"{each['speed_up']:.2f}x", equal,
                )  # fmt: skip
    return results


def _add(contenders: Contenders, made: dict[str, Any], inputs: Any, temperature: float, turn: int) -> None:
    """Measure every way on one batch, plainly first, the others in an order that goes round."""
    ways, plain = list(made), list[list[int]]()
    for round_ in range(ROUNDS):
        begin = 1 + (turn + round_) % (len(ways) - 1)
        for way in [PLAIN, *ways[begin:], *ways[1:begin]]:
            seconds, tokens, texts = contenders.run(way, inputs, temperature, seed=round_)
            plain = texts if way == PLAIN and not plain else plain
            own = made[way]
            own["seconds"] += seconds
            own["tokens"] += tokens
            own["texts"] += len(texts)
            own["as_plain"] += sum(a == b for a, b in zip(texts, plain, strict=True))


def main(out: Path | None, console: Console) -> None:
    """Measure and print a table; write ``transformers.json`` where there is a directory for it."""
    results = measure(Contenders(), console)
    save(out, "transformers", {**machine(), "transformers": transformers.__version__}, results=results)
