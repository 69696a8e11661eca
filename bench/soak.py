"""A soak of the scheduler: whatever comes at random times, for as long as one likes, nothing is lost and nothing kept.

    python -m specdec_kernels.bench.soak --seconds 3600 --load 0.15        # an hour, at a sixth of a core

Requests arrive at random, are refused by full queues, cancelled in the queue, while they are read and while they are
decoded; some are too long, allow no token, raise an error of their own or make the target give nan; passes of the
target and of the drafting models fail. Every text is compared with that of its request alone, in float64 and under the
rule whose text depends on no draft. At quiet moments all that Python keeps is counted.
"""

from __future__ import annotations

import argparse
import gc
import queue
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_kernels.bench.machine import machine
from specdec_kernels.decode import Drafter, Sampling, Scheduler, TransformersTarget, generate
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    CallableDrafter,
    FallbackDrafter,
    Growth,
    ModelDrafter,
    NGramDrafter,
    TreeDrafter,
)
from specdec_kernels.decode.submission import Submission

VOCAB, LONGEST = 11, 128
#: A token whose embedding is nan: requests with it in their prompts end as invalid, and no other draws it.
NAN = 10
#: How often a pass of the target, and a drafter, fails.
TARGET_FAILS, DRAFTER_FAILS = 0.002, 0.01
#: What requests come to: most of them to nothing special.
KINDS = ("plain",) * 4 + ("cancelled",) * 2 + ("nan", "nothing allowed", "too long", "error of its own")
#: What memory may rise by in the second half of a run. A kilobyte that is kept of every request is more in an hour, in
#: which `make soak` has some 13,700: three eighths of them count.
FLAT_BYTES = 4 << 20
#: Steps within which all that is under way ends, many times over: at most seven requests a scheduler, of 40 tokens read
#: and 40 written.
MOST_STEPS = 10_000


class FaultError(Exception):
    """What is made to fail here."""


class RoundedHead(torch.nn.Module):
    """A head whose logits are rounded to float32, as a model in float64 needs it here."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits in float32."""
        return self.head(x).float()


def small_model(seed: int, vocab: int = VOCAB) -> Any:
    """A Llama with random weights in float64, which gives the same logits whatever else is in the batch."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LONGEST, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 3.0 / 32**0.5)
        model.model.embed_tokens.weight.normal_(0, 1)
    model.lm_head = RoundedHead(model.lm_head)
    return model.eval()


@dataclass(frozen=True)
class Known:
    """A request, and its text when it is alone."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    seed: int
    text: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """Memory at a quiet moment."""

    arrived: int
    objects: int
    """Containers that Python's collector knows of."""
    own: int
    """Bytes of the process that no file backs."""


@dataclass
class Report:
    """What has become of all requests."""

    arrived: int = 0
    refused: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    """Of those that were not refused, by kind and ending."""
    faults: Counter[str] = field(default_factory=Counter)
    """Passes that were made to fail."""
    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ended(self) -> int:
        """Requests that were read to their end."""
        return sum(self.endings.values())

    def problems(self) -> list[str]:
        """What is not as it should be."""
        found = list(self.wrong)
        if self.ended + self.refused != self.arrived:
            found.append(f"{self.arrived} requests arrived, {self.refused} were refused, but {self.ended} ended")
        return found + self._memory()

    def _memory(self) -> list[str]:
        """Objects must not grow with requests, nor the memory of the process, once all kinds have been there."""
        settled = self.samples[1 + len(self.samples) // 4 :]
        if len(settled) < 2:
            return []
        found, requests = [], settled[-1].arrived - settled[0].arrived
        objects = settled[-1].objects - settled[0].objects
        if objects > 100 + requests // 20:
            found.append(f"{objects} more objects were kept after {requests} more requests")
        half = len(settled) // 2
        growth = max(sample.own for sample in settled[half:]) - max(sample.own for sample in settled[:half])
        if growth > FLAT_BYTES:
            found.append(f"memory rose by {growth / 1e6:.1f} MB in the second half of {requests} requests")
        return found

    def line(self) -> str:
        """How far it has come."""
        last = self.samples[-1] if self.samples else Sample(0, 0, 0)
        return (
            f"{self.seconds:6.0f} s: {self.arrived} arrived, {self.refused} refused, {self.ended} ended, "
            f"{self.steps} steps, {self.accepted} of {self.proposed} drafts accepted, "
            f"{sum(self.faults.values())} passes failed; {last.objects} objects, {last.own / 1e6:.1f} MB"
        )

    def text(self) -> str:
        """All of it."""
        lines = [self.line(), ""]
        lines += [f"{count:8} {name}" for name, count in sorted(self.endings.items())]
        lines += [f"{count:8} failed: {name}" for name, count in sorted(self.faults.items())]
        lines += ["", "memory at quiet moments: requests so far, objects, MB"]
        every = max(1, len(self.samples) // 20)
        lines += [
            f"{sample.arrived:8} {sample.objects:8} {sample.own / 1e6:8.1f}"
            for sample in [*self.samples[:-1:every], *self.samples[-1:]]
        ]
        return "\n".join([*lines, "", *(self.problems() or ["nothing was lost, every text was right, memory flat"])])


class Soak:
    """Schedulers, each with a drafter of its own, and the requests that are under way.

    Args:
        seed: of everything random.
        load: share of a core that it takes; it sleeps for the rest.
        quiet_every: requests between two quiet moments, in which nothing runs and memory is looked at.
    """

    def __init__(self, seed: int = 7, load: float = 1.0, quiet_every: int = 100) -> None:
        self.rng, self.load, self.report = random.Random(seed), load, Report()
        self.quiet_every = quiet_every
        model = small_model(1)
        with torch.no_grad():
            model.model.embed_tokens.weight[NAN] = torch.nan
        self.known = [self._alone(model) for _ in range(24)]
        target = TransformersTarget(model, check=False)  # which would read the token that is nan
        self.schedulers = [
            Scheduler(target, drafter, max_requests=4, max_waiting=3, max_rows=16, chunk=5, rule="coupled")
            for drafter in self._drafters(model)
        ]
        self._fail(model, "target", TARGET_FAILS)
        self.under_way: list[tuple[Known, str, Submission]] = []
        self._failed: list[FaultError] = []  # passes of the target in this step
        self._worked = time.process_time()

    def _alone(self, model: Any) -> Known:
        """A request of some kind, and its text."""
        rng = self.rng
        named: dict[str, Any] = rng.choice(
            [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 4}, {"repetition_penalty": 1.3},
             {"temperature": 0.7, "frequency_penalty": 0.3}, {"top_p": 0.8}, {}]
        )  # fmt: skip
        sampling = Sampling(**named, logit_bias={NAN: -torch.inf})
        prompt, most, seed = rng.choices(range(NAN), k=rng.randint(1, 40)), rng.randint(2, 40), rng.randrange(1000)
        options = {"max_new_tokens": most, "seed": seed, "rule": "coupled", **vars(sampling)}
        text = generate(TransformersTarget(model, check=False), [prompt], **options)[0].tokens
        return Known(prompt, sampling, most, seed, text)

    def _drafters(self, target: Any) -> list[Drafter | None]:
        small = small_model(1, NAN)  # which knows all tokens but that one, about as well as the target
        with torch.no_grad():
            for parameter, known in zip(small.parameters(), target.parameters(), strict=True):
                parameter.copy_(known[: len(parameter)] + 0.02 * torch.randn_like(parameter))
        self._fail(small, "drafting model", DRAFTER_FAILS)

        def lookup(history: list[int], count: int) -> list[int]:
            self._maybe("function", DRAFTER_FAILS)
            return [token for token in history[-count:] if token != NAN]

        model = ModelDrafter(small, VOCAB)
        return [
            None, CallableDrafter(lookup), model, AdaptiveDrafter(FallbackDrafter(NGramDrafter(1), model)),
            TreeDrafter(model, Growth(depth=2, width=2, children=2)),
        ]  # fmt: skip

    def _maybe(self, what: str, rate: float) -> None:
        if self.rng.random() < rate:
            self.report.faults[what] += 1
            error = FaultError(what)
            self._failed += [error] if what == "target" else []
            raise error

    def _fail(self, model: Any, what: str, rate: float) -> None:
        model.register_forward_pre_hook(lambda *_: self._maybe(what, rate))

    def run(self, requests: int, seconds: float, log: Callable[[Report], None] | None = None) -> None:
        """So many requests, and for so long, at least; ``log`` is told at every quiet moment."""
        started = time.monotonic()
        while self.report.arrived < requests or time.monotonic() - started < seconds:
            if self.rng.random() < 0.5:
                self._arrive()
            self._step()
            if self.report.arrived % self.quiet_every == 0:
                self._look(started)
                if log is not None:
                    log(self.report)
                self._arrive()
        self._look(started)

    def _arrive(self) -> None:
        """One request more, for one of the schedulers."""
        rng, known, kind = self.rng, self.rng.choice(self.known), self.rng.choice(KINDS)
        options: dict[str, Any] = {**vars(known), "priority": rng.randrange(3)}
        del options["text"]
        prompt = options.pop("prompt")
        if kind == "nan":
            prompt = [*prompt, NAN]
        elif kind == "nothing allowed":
            options["sampling"] = Sampling(grammar=lambda history: torch.zeros(1, dtype=torch.int32))
        elif kind == "too long":
            options["max_new_tokens"] = LONGEST
        elif kind == "error of its own":
            options["stop_when"] = lambda index, tokens: len(tokens) == 2 and {}[tokens[0]]
        self.report.arrived += 1
        try:
            self.under_way.append((known, kind, rng.choice(self.schedulers).submit(prompt, **options)))
        except queue.Full:
            self.report.refused += 1

    def _step(self) -> None:
        """A step of a scheduler; what has ended is read."""
        self._failed.clear()
        self.rng.choice(self.schedulers).step()
        self.report.steps += 1
        going_on = []
        for known, kind, submission in self.under_way:
            if kind == "cancelled" and self.rng.random() < 0.02:
                submission.cancel()
            if submission.done:
                self._read(known, kind, submission)
            else:
                going_on.append((known, kind, submission))
        self.under_way = going_on
        worked = time.process_time() - self._worked
        time.sleep(worked * (1 / self.load - 1))
        self._worked = time.process_time()

    def _read(self, known: Known, kind: str, submission: Submission) -> None:
        """Read a request and hold it against what it is alone."""
        ending, tokens, failed = "", [], False
        try:
            for token in submission:
                ending = token.finished
                tokens += [token.token] if token.token >= 0 else []
        except Exception as error:
            ending = type(error).__name__
            failed = any(error is own for own in self._failed)  # a drafter's must not end it, nor an earlier one
        right = {
            "plain": ("length",), "cancelled": ("length", ""), "nan": ("invalid",), "nothing allowed": ("dead_end",),
            "too long": ("ValueError",), "error of its own": ("KeyError",),
        }[kind]  # fmt: skip
        whole = len(tokens) == (len(known.text) if ending == "length" else len(tokens))
        if not (ending in right or failed) or tokens != known.text[: len(tokens)] or not whole:
            self.report.wrong.append(f"{kind} of {known} ended by {ending!r} with {tokens}")
        self.report.endings[f"{kind}: {ending or 'cancelled'}"] += 1
        self.report.proposed += submission.acceptance.proposed
        self.report.accepted += submission.acceptance.accepted

    def _look(self, started: float) -> None:
        """Have all that there is end, and look at what is left, and at memory."""
        for _ in range(MOST_STEPS):
            if self.under_way:
                self._step()
            if not any(scheduler.running or scheduler.waiting for scheduler in self.schedulers):
                break
        self.report.wrong += [f"{kind} of {known} did not end" for known, kind, _submission in self.under_way]
        self.under_way = []
        self.report.seconds = time.monotonic() - started
        for scheduler in self.schedulers:
            left = scheduler.running, scheduler.waiting, len(scheduler.statistics.requests)
            if any(left):
                self.report.wrong.append(f"a scheduler had {left} requests running, waiting and counted at the end")
        gc.collect()
        self.report.samples.append(Sample(self.report.arrived, len(gc.get_objects()), _own_memory()))


def _own_memory() -> int:
    """Bytes of this process that no file backs: pages of files come and go with what else a machine does."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def _revision() -> str:
    found = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def main() -> int:
    """Run it, tell how it goes, and write what came of it. 0 if all was well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--requests", type=int, default=200, help="at least")
    parser.add_argument("--load", type=float, default=1.0, help="share of a core that it takes")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--revision", default=_revision(), help="of the code, where this is no checkout")
    parser.add_argument("--out", type=Path, help="file for the result")
    options = parser.parse_args()
    if not 0 < options.load <= 1:
        parser.error(f"--load must be in (0, 1], got {options.load:g}")
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out must be a file in a folder that is there, got {options.out}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # a drafter that fails is warned of
    where = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, revision {options.revision}, {machine()}, seed {options.seed}, "
    where += f"load {options.load:g}"
    print(where, flush=True)
    soak, told = Soak(options.seed, options.load), [0.0]

    def log(report: Report) -> None:
        if report.seconds - told[0] >= 60:
            told[0] = report.seconds
            print(report.line(), flush=True)

    soak.run(options.requests, options.seconds, log)
    text = f"{where}\n\n{soak.report.text()}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    return bool(soak.report.problems())


if __name__ == "__main__":
    sys.exit(main())
