"""Requests with Poisson arrivals: one at a time, in static batches, and in batches that they join as they come.

Each with drafts and without, on the same requests at the same times; greedy and in float32, so that every text is that
of its request alone, which is checked. The requests come half as fast again as one at a time could be served, which is
measured first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec_kernels.bench.machine import machine, save
from specdec_kernels.bench.serving import Request, Served, Service, quantile
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.models import SMOLLM2, load_drafter, load_target
from specdec_kernels.decode import Drafter, Sampling, Statistics, Target, TransformersTarget

#: Two hundred questions, each of them short.
QUESTIONS = (
    "What is {}?", "Name three facts about {}.", "Write a haiku about {}.", "Explain {} to a child.",
    "Why do people like {}?", "Write the first sentence of a story about {}.", "Give a definition of {}.",
    "What should a beginner know about {}?", "Describe {} in one sentence.", "Ask me a question about {}.",
)  # fmt: skip
TOPICS = (
    "the moon", "bread", "chess", "rivers", "bicycles", "snow", "the violin", "tea", "volcanoes", "maps", "bees",
    "clocks", "glass", "the desert", "lighthouses", "paper", "owls", "bridges", "salt", "gardens",
)  # fmt: skip
#: Tokens of an answer: at least, at most.
LENGTHS = (4, 16)
#: Requests that are decoded together at most; drafts of each a step at most.
BATCH, NUM_DRAFT = 8, 16
#: How fast requests come, compared with how fast they can be served alone, and how many tell how fast that is.
LOAD, TRIED = 1.5, 5
#: Logits that are closer than this may change places by rounding: passes over other numbers of rows round otherwise.
ROUNDING = 0.01
WAYS = {"one at a time": (1, False), "static batches": (BATCH, False), "dynamic batches": (BATCH, True)}


def questions(tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
    """So many different requests, which are there from the start."""
    rng = random.Random(seed)
    asked = [question.format(topic) for question, topic in product(QUESTIONS, TOPICS)]
    if not 0 < count <= len(asked):
        raise ValueError(f"requests must be in [1, {len(asked)}], got {count}")
    found = []
    for text in rng.sample(asked, count):
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        found.append(Request(ids, rng.randint(*LENGTHS)))
    return found


def arriving(requests: Sequence[Request], rate: float, seed: int = 0) -> list[Request]:
    """The same, so many a second, with exponential times between them."""
    rng, moment, found = random.Random(seed), 0.0, []
    for request in requests:
        moment += rng.expovariate(rate)
        found.append(replace(request, arrives=moment))
    return found


def measure(
    target: Target,
    drafters: dict[str, Drafter | None],
    requests: Sequence[Request],
    seconds: float,
    margin: Any,
) -> list[dict[str, Any]]:
    """Serve the requests in every way, in so many seconds at most, of which warming up and trying how fast they are
    served are a part; ``margin(history, token, other)`` says how far apart the target's logits of two tokens are.

    Raises:
        RuntimeError: a text is not that of its request alone, or there is no time for any.
    """
    end = time.perf_counter() + seconds

    def left() -> float:
        return end - time.perf_counter()

    sampling = Sampling(temperature=0.0)
    for drafter in drafters.values():  # warm up: what is made at first use, and the costs that a drafter measures
        for most, dynamic in WAYS.values():
            short = [replace(request, max_new_tokens=4) for request in requests[: min(most, 2)]]
            Service(target, drafter, NUM_DRAFT, sampling=sampling, most=most, dynamic=dynamic).serve(short, left())
    tried = Service(target, sampling=sampling).serve(requests[:TRIED], left())
    if not all(own.finished for own in tried) or left() <= 0:
        raise RuntimeError(f"no request could be served in {seconds:g} s, which trying took: allow more --seconds")
    rate = LOAD * len(tried) / tried[-1].times[-1]
    coming = arriving(requests, rate)
    notes.print(f"{len(coming)} requests, {rate:.2f} a second", highlight=False)
    results: list[dict[str, Any]] = []
    texts: list[Served] = []
    cells = list(product(drafters.items(), WAYS.items()))
    for index, ((drafts, drafter), (way, (most, dynamic))) in enumerate(cells):
        service = Service(target, drafter, NUM_DRAFT, sampling=sampling, most=most, dynamic=dynamic)
        statistics = Statistics()
        with notes.status(f"{way}, {drafts}"):
            served = service.serve(coming, left() / (len(cells) - index), statistics)
        if not any(own.finished for own in served):
            raise RuntimeError(f"no request could be served in its share of {seconds:g} s: allow more --seconds")
        texts = texts or served  # the first way is one at a time, without drafts
        results.append({"way": way, "drafts": drafts, "rate": rate, **figures(served, statistics)})
        known = [pair for pair in zip(served, texts, strict=True) if all(own.finished for own in pair)]
        results[-1] |= {"compared": len(known), "parted": parted(known, margin)}
    return results


def figures(served: Sequence[Served], statistics: Statistics) -> dict[str, Any]:
    """Of those that were served to their end: throughput, and times to the first token and of the others."""
    ended = [own for own in served if own.finished]
    tokens, last = sum(len(own.tokens) for own in ended), max(own.times[-1] for own in ended)
    first = [own.first for own in ended]
    others = [latency for own in ended for latency in own.latencies()]
    return {
        "requests": len(served),
        "ended": len(ended),
        "tokens": tokens,
        "tokens_per_second": tokens / last,
        "first_token_seconds": {"p50": quantile(first, 0.5), "p99": quantile(first, 0.99)},
        "token_seconds": {"p50": quantile(others, 0.5), "p99": quantile(others, 0.99)},
        "tokens_per_step": statistics.tokens_per_step,
        "drafts_per_step": statistics.proposed / max(1, statistics.request_steps),
    }


def parted(pairs: Sequence[tuple[Served, Served]], margin: Any) -> list[float]:
    """Of pairs of a text and that of its request alone which differ: how far apart the logits were where they part.

    Raises:
        RuntimeError: further than rounding.
    """
    found = []
    for own, alone in pairs:
        if own.tokens == alone.tokens:
            continue
        both = enumerate(zip(own.tokens, alone.tokens, strict=False))
        place = next((at for at, (one, other) in both if one != other), None)
        apart = float("inf")
        if place is not None:
            history = own.request.prompt + own.tokens[:place]
            apart = margin(history, own.tokens[place], alone.tokens[place])
        if apart > ROUNDING:
            raise RuntimeError(f"a text must be that of its request alone, {alone.tokens}, got {own.tokens}")
        found.append(apart)
    return found


def table(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """A line for each way."""
    lines = Lines(
        console,
        {"way": "<15", "drafts": "<8", "tokens/s": ">8", "first s": ">7", "p99": ">6", "token ms": ">8",
         "p99 ": ">6", "ended": ">7"},
    )  # fmt: skip
    for row in results:
        first, other = row["first_token_seconds"], row["token_seconds"]
        lines.print(
            row["way"], row["drafts"], f"{row['tokens_per_second']:.1f}", f"{first['p50']:.2f}", f"{first['p99']:.2f}",
            f"{1e3 * other['p50']:.1f}", f"{1e3 * other['p99']:.1f}", f"{row['ended']}/{row['requests']}",
        )  # fmt: skip
    compared, apart = sum(row["compared"] for row in results), [gap for row in results for gap in row["parted"]]
    said = f"{compared - len(apart)} of {compared} texts are those of their requests alone"
    if apart:
        said += f"; {len(apart)} part where two logits are {max(apart):.2g} apart or less, which is rounding"
    console.print(said, highlight=False, soft_wrap=True)


def main(out: Path | None, requests: int, seconds: float, console: Console) -> None:
    """Measure, print a table, and write ``batching.json`` where there is a directory for it."""
    model, tokenizer = load_target(SMOLLM2, torch.float32)
    drafters = {"none": None, "adaptive": load_drafter("auto", model, adaptive=True)}

    @torch.inference_mode()
    def margin(history: list[int], token: int, other: int) -> float:
        logits = model(torch.tensor([history])).logits[0, -1]
        return abs(float(logits[token] - logits[other]))

    results = measure(TransformersTarget(model), drafters, questions(tokenizer, requests), seconds, margin)
    table(console, results)
    save(out, "batching", machine(), results=results)
