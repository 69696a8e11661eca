"""Ways to decode the same prompts, side by side: plain, speculative, with heads, in batches, and a small model alone.

Of each its speed, the latency of its tokens, how far what its tokens were drawn from is from the target's distribution,
and the memory of a process that does nothing else. The ways take turns, so that a slow minute of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from specdec_kernels.bench.machine import machine, require_plots, save
from specdec_kernels.bench.serving import Request, Served, Service, quantile
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.models import load_drafter, load_model, load_target
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Drafter, Sampling, Scores, Statistics, Target, TargetSession, TransformersTarget

#: Tokens of the prompts' answers, in turn: of batches some requests end before others.
LENGTHS = (32, 96, 64, 48)
TEMPERATURE = 0.8
#: Drafts of a chain, nodes of a tree, requests of a batch.
CHAIN, TREE, BATCH = 4, 15, 4


class Models:
    """SmolLM2 and what drafts for it, loaded when it is asked for."""

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return load_target()

    @cached_property
    def target(self) -> Target:
        """What all ways are compared with."""
        return TransformersTarget(self.loaded[0])

    def drafter(self, kind: str, adaptive: bool = False) -> Any:
        """As of the command line."""
        return load_drafter(kind, self.loaded[0], adaptive=adaptive)

    @cached_property
    def exact(self) -> Any:
        """The target in float32."""
        return load_model("smollm2", torch.float32)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a user's message."""
        message = [{"role": "user", "content": prompt}]
        ids: list[int] = self.loaded[1].apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids

    def requests(self, seed: int) -> list[Request]:
        """The built-in prompts, all of them there from the start."""
        prompts = [prompt for kind in PROMPTS.values() for prompt in kind]
        return [
            Request(self.encode(prompt), LENGTHS[index % len(LENGTHS)], seed=100 * seed + index)
            for index, prompt in enumerate(prompts)
        ]


#: Each as it is served, by name; the first is what the others are compared with.
WAYS: dict[str, Callable[[Models], Service]] = {
    "plain": lambda models: Service(models.target),
    "chain of drafts": lambda models: Service(models.target, models.drafter("model"), CHAIN, "block"),
    "tree of drafts": lambda models: Service(models.target, models.drafter("tree"), TREE, "block"),
    "Medusa heads": lambda models: Service(models.target, models.drafter("medusa"), TREE, "block"),
    "static batches": lambda models: Service(models.target, most=BATCH),
    "dynamic batches": lambda models: Service(models.target, most=BATCH, dynamic=True),
    "dynamic, with drafts": lambda models: Service(
        models.target, models.drafter("auto", adaptive=True), TREE, "block", most=BATCH, dynamic=True
    ),
    "drafter alone": lambda models: Service(DrafterAlone(models.target, models.drafter("model"))),
}


@dataclass
class History:
    """One request's tokens, and what the target said after each behind the first ones."""

    tokens: list[int]
    """Those that were read."""
    unscored: int
    rows: list[Tensor] = field(default_factory=list)
    """[V] after each of the others."""


class Recorded:
    """A target that notes the rows that tokens were drawn from."""

    def __init__(self, target: Target) -> None:
        self._target, self.histories = target, list[History]()
        self.device, self.vocab_size, self.stop_tokens = target.device, target.vocab_size, target.stop_tokens

    def begin(self, prompts: Sequence[Sequence[int]], *arguments: Any) -> RecordedSession:
        """A stream, of which every request's history is kept."""
        histories = [History(list(prompt[:-1]), len(prompt) - 1) for prompt in prompts]
        self.histories += histories
        return RecordedSession(self._target.begin(prompts, *arguments), histories)


class RecordedSession:
    """One stream of it."""

    def __init__(self, session: TargetSession, histories: list[History]) -> None:
        self._session: Any = session
        self._histories = histories
        self.features, self.max_rows = session.features, session.max_rows
        self._rows: tuple[list[list[int]], Tensor] = [], torch.empty(0, device="cpu")

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        """As the target does."""
        scores: Scores = self._session.score(tokens, counts)
        self._rows = tokens.tolist(), scores.logits
        return scores

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        """Likewise."""
        scores: Scores = self._session.score_tree(tokens, parents)
        self._rows = tokens.tolist(), scores.logits
        return scores

    def commit(self, counts: Sequence[int]) -> None:
        """Note the rows that stay."""
        self._keep([range(count) for count in counts])
        self._session.commit(counts)

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Likewise."""
        self._keep(paths)
        self._session.commit_path(paths)

    def _keep(self, paths: Sequence[Sequence[int]]) -> None:
        tokens, logits = self._rows
        for slot, (history, path) in enumerate(zip(self._histories, paths, strict=True)):
            history.tokens += [tokens[slot][node] for node in path]
            history.rows += [logits[slot, node].clone() for node in path]

    def select(self, slots: Sequence[int]) -> None:
        """Those that go on."""
        self._histories = [self._histories[slot] for slot in slots]
        self._session.select(slots)

    def join(self, other: RecordedSession) -> None:
        """And those that come."""
        self._histories = self._histories + other._histories
        self._session.join(other._session)


class DrafterAlone:
    """A trained drafter in its target's place: the target reads the prompt, whose hidden states the drafter goes on
    from with its own. It was distilled from the target, and shares its embeddings and its head."""

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self._target, self._drafter = target, drafter
        self.device, self.vocab_size, self.stop_tokens = target.device, target.vocab_size, target.stop_tokens

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], *_: Any) -> Any:
        """A stream of one request.

        Raises:
            ValueError: a prompt of one token, of which there is no hidden state to go on from.
        """
        if len(prompts) != 1 or len(prompts[0]) < 2:
            raise ValueError(f"prompts must be one of two tokens or more, got {list(map(list, prompts))}")
        session = self._target.begin(prompts, max_new_tokens, self._drafter.feature_layers)
        return DrafterAloneSession(self._drafter.begin(prompts, session.features))


class DrafterAloneSession:
    """One stream of it, for plain decoding."""

    features = None

    def __init__(self, session: Any) -> None:
        self._session, self._feature = session, None

    def max_rows(self) -> int:
        """No drafts."""
        return 1

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        """What the drafter says after the last token; the first of them is the prompt's own."""
        if self._feature is not None:
            self._session.commit(tokens.tolist(), self._feature[:, None])
        logits, self._feature = self._session.read_pending()
        logits = self._session.with_repetitions(logits, [])
        if (vocabulary := self._session.vocabulary) is not None:  # the target's ids, of which it knows some
            few, logits = logits, logits.new_full((len(logits), vocabulary.vocab_size), -torch.inf)
            logits[:, vocabulary.draft_to_target] = few
        return Scores(logits[:, None], None)

    def commit(self, counts: Sequence[int]) -> None:
        """It stays."""

    def select(self, slots: Sequence[int]) -> None:
        """The one request there is."""


@torch.inference_mode()
def disagreement(exact: Any, histories: Sequence[History], temperature: float) -> float:
    """Total variation between what tokens were drawn from and what a plain pass of a model gives in that place, in the
    mean over all rows."""
    found: list[float] = []
    for history in histories:
        if history.rows:
            rows = exact(torch.tensor([history.tokens], device=exact.device)).logits[0, history.unscored :]
            both = [(x.double() / temperature).softmax(-1) for x in (rows, torch.stack(history.rows).to(rows.device))]
            found += (0.5 * (both[0] - both[1]).abs().sum(-1)).tolist()
    return mean(found)


def measure(
    ways: dict[str, Service], requests: Callable[[int], list[Request]], exact: Any, rounds: int
) -> list[dict[str, Any]]:
    """Decode all requests in every way, once to warm up and to note the rows, and then in turns."""
    sampling = Sampling(temperature=TEMPERATURE)
    served: dict[str, list[list[Served]]] = {name: [] for name in ways}
    statistics = {name: Statistics() for name in ways}
    results: list[dict[str, Any]] = []
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("decoding", total=len(ways) * (1 + rounds))
        for name, way in ways.items():
            recorded = Recorded(way.target)
            replace(way, target=recorded, sampling=sampling).serve(requests(0))
            results.append({"way": name, "disagreement": disagreement(exact, recorded.histories, TEMPERATURE)})
            progress.update(task, description=name, advance=1)
        for seed in range(rounds):
            for name, way in ways.items():
                service, own = replace(way, sampling=sampling), requests(seed)
                # The system may have dropped its weights from memory while others took their turn.
                service.serve([replace(own[0], max_new_tokens=2)])
                texts = service.serve(own, statistics=statistics[name])
                served[name].append(texts)
                progress.update(task, description=name, advance=1)
    for row in results:
        runs = served[row["way"]]
        latencies = [latency for texts in runs for own in texts for latency in own.latencies()]
        tokens, seconds = sum(len(own.tokens) for texts in runs for own in texts), sum(map(_took, runs))
        row["tokens_per_second"] = tokens / seconds
        row["token_seconds"] = {"p50": quantile(latencies, 0.5), "p99": quantile(latencies, 0.99)}
        row["tokens_per_step"] = statistics[row["way"]].tokens_per_step
    return results


def _took(served: Sequence[Served]) -> float:
    """Seconds until the last token."""
    return max(own.times[-1] for own in served)


def memory(name: str) -> int:
    """Bytes that a process that decodes in this way alone has at most, once it has loaded what it needs."""
    command = [sys.executable, "-m", "specdec_kernels.bench.methods", "--memory", name]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"the memory of {name!r} could not be measured: {found.stderr.strip()[-400:]}")
    peak: int = json.loads(found.stdout.splitlines()[-1])
    return peak


def peak_memory(service: Service, requests: Sequence[Request]) -> int:
    """Bytes of this process at most while it decodes."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    replace(service, sampling=Sampling(temperature=TEMPERATURE)).serve(requests)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def table(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """A line for each way."""
    lines = Lines(
        console,
        {"way": "<20", "tokens/s": ">8", "to plain": ">8", "a step": ">6", "p50 ms": ">6", "p99 ms": ">6", "TV": ">7",
         "MB": ">5"},
    )  # fmt: skip
    for row in results:
        latency = [f"{1e3 * row['token_seconds'][name]:.1f}" for name in ("p50", "p99")]
        rate = row["tokens_per_second"]
        cells = [f"{rate:.1f}", f"{rate / results[0]['tokens_per_second']:.2f}", f"{row['tokens_per_step']:.2f}"]
        lines.print(row["way"], *cells, *latency, f"{row['disagreement']:.4f}", f"{row['memory'] / 1e6:.0f}")


def plot(results: Sequence[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Speed, latency and agreement of each way."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    names = [row["way"] for row in results]
    axes[0].barh(names, [row["tokens_per_second"] for row in results])
    axes[0].set_xlabel("tokens a second")
    for share, marker in (("p50", "o"), ("p99", "|")):
        axes[1].plot([1e3 * row["token_seconds"][share] for row in results], names, marker, label=share)
    axes[1].set_xlabel("ms a token")
    axes[1].set_xlim(left=0)
    axes[1].legend()
    axes[2].barh(names, [row["disagreement"] for row in results])
    axes[2].set_xlabel("total variation from the target")
    axes[0].invert_yaxis()
    figure.suptitle(f"SmolLM2-135M, T = {TEMPERATURE:g} - {where['processor']}, {where['cores']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(out: Path | None, rounds: int, console: Console) -> None:
    """Measure, print a table, and write ``methods.json`` and ``methods.png`` where there is a directory for them."""
    if out is not None:
        require_plots()
    models = Models()
    ways = {name: make(models) for name, make in WAYS.items()}
    results = measure(ways, models.requests, models.exact, rounds)
    for row in results:
        with notes.status(f"memory: {row['way']}"):
            row["memory"] = memory(row["way"])
    where = machine()
    table(console, results)
    save(out, "methods", where, results=results)
    if out is not None:
        plot(results, where, out / "methods.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", choices=WAYS, required=True)
    chosen, alone = parser.parse_args().memory, Models()
    print(json.dumps(peak_memory(WAYS[chosen](alone), alone.requests(0))))
