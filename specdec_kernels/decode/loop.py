"""The loop: propose, score, verify, commit."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from specdec_kernels.decode.protocols import Draft, Drafter, Step, Target
from specdec_kernels.decode.statistics import Statistics
from specdec_kernels.ops import BackendName, verify_chain


@dataclass(frozen=True)
class Token:
    """One token of one request, as it is streamed."""

    request: int
    token: int
    drafted: bool
    """Whether it was a draft that was accepted; False for a token drawn by the verification."""
    finished: Literal["", "stop", "length"] = ""
    """Why the request ends with this token; empty if it does not."""


@dataclass
class Request:
    """A request in flight."""

    index: int
    prompt: Sequence[int]
    seed: int
    temperature: float
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Tokens so far: the absolute index of the next one."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - len(self.generated)


def _each(name: str, value: object, count: int) -> list[object]:
    """One value for every request, or a list of one each."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} prompts, got {len(value)}")
        return list(value)
    return [value] * count


def _requests(
    prompts: Sequence[Sequence[int]], seed: object, temperature: object, max_new_tokens: object
) -> list[Request]:
    count = len(prompts)
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts must not be empty, got an empty prompt at index {index}")
    requests = []
    for index, (own_seed, own_temperature, limit) in enumerate(
        zip(
            _each("seed", seed, count),
            _each("temperature", temperature, count),
            _each("max_new_tokens", max_new_tokens, count),
            strict=True,
        )
    ):
        if own_seed is None:
            own_seed = secrets.randbits(63)
        if not isinstance(own_seed, int):
            raise TypeError(f"seed must be an int, a list of int, or None, got {own_seed!r}")
        if not isinstance(own_temperature, (int, float)) or not 0 <= own_temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {own_temperature!r}")
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit!r}")
        requests.append(Request(index, prompts[index], own_seed, float(own_temperature), limit))
    return requests


@torch.inference_mode()
def stream(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    drafter: Drafter | None = None,
    num_draft: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    statistics: Statistics | None = None,
    backend: BackendName | None = None,
) -> Iterator[Token]:
    """Decode a batch, yielding each token as soon as it is verified.

    The text has exactly the target's distribution, whatever the drafter. With the same seed a request gives the same
    text alone and in any batch, as far as the target's logits are the same there.

    Args:
        target: see :mod:`specdec_kernels.decode.targets`.
        prompts: token ids, at least one each.
        drafter: see :mod:`specdec_kernels.decode.drafters`; ``None`` decodes plainly, one token a step.
        num_draft: drafts a step at most.
        max_new_tokens, temperature, seed: one for all requests, or a list with one each. Seed ``None`` draws one.
        stop_tokens: ids that end a request; the id itself is the last token yielded.
        statistics: filled in as decoding goes.
        backend: of :func:`specdec_kernels.verify_chain`.

    Yields:
        :class:`Token`, in the order of the text for every request.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if num_draft < 0:
        raise ValueError(f"num_draft must not be negative, got {num_draft}")
    statistics = statistics if statistics is not None else Statistics()
    active = _requests(prompts, seed, temperature, max_new_tokens)
    if not active:
        return
    with statistics.timed("prompt"):
        features = target.begin([request.prompt for request in active], drafter is not None and drafter.wants_features)
        if drafter is not None:
            drafter.begin([request.prompt for request in active], features)
    while active:
        emitted = _step(target, drafter, active, num_draft, statistics, backend)
        finished = [False] * len(active)
        for slot, (request, tokens) in enumerate(zip(active, emitted, strict=True)):
            for index, token in enumerate(tokens):
                request.generated.append(token)
                statistics.emitted += 1
                end: Literal["", "stop", "length"] = ""
                if token in stop_tokens:
                    end = "stop"
                elif request.remaining == 0:
                    end = "length"
                yield Token(request.index, token, index < len(tokens) - 1, end)
                if end:
                    finished[slot] = True
                    break
        if any(finished):
            going_on = [slot for slot, done in enumerate(finished) if not done]
            active = [active[slot] for slot in going_on]
            if active:
                target.select(torch.tensor(going_on))
                if drafter is not None:
                    drafter.select(torch.tensor(going_on))


def _step(
    target: Target,
    drafter: Drafter | None,
    active: Sequence[Request],
    num_draft: int,
    statistics: Statistics,
    backend: BackendName | None,
) -> list[list[int]]:
    """One round for the whole batch: the tokens each request gains."""
    most = min(num_draft, target.room() - 1)
    step = Step(
        num_draft=torch.tensor([min(most, request.remaining - 1) for request in active]),
        seed=torch.tensor([request.seed for request in active]),
        position=torch.tensor([request.position for request in active]),
        temperature=torch.tensor([request.temperature for request in active]),
    )
    with statistics.timed("draft"):
        draft = drafter.propose(step) if drafter is not None else Draft.nothing(len(active))
        lengths = torch.minimum((draft.tokens >= 0).long().cumprod(1).sum(1), step.num_draft)
        draft = _trimmed(draft, int(lengths.max()))
    with statistics.timed("target"):
        last = torch.tensor([[(request.generated or request.prompt)[-1]] for request in active])
        scores = target.score(torch.cat([last, draft.tokens.clamp(min=0)], 1), lengths + 1)
    with statistics.timed("verify"):
        verified = verify_chain(
            scores.logits,
            draft.tokens,
            draft.logits,
            draft.stats,
            seed=step.seed,
            position=step.position,
            num_draft=lengths,
            temperature=step.temperature,
            backend=backend,
        )
        counts = verified.num_accepted.tolist()
        emitted = [row[: count + 1] for row, count in zip(verified.tokens.tolist(), counts, strict=True)]
    with statistics.timed("target"):
        target.keep(verified.num_accepted.long() + 1)
    with statistics.timed("draft"):
        if drafter is not None:
            drafter.commit(emitted, scores.features)
    statistics.steps += 1
    statistics.invalid += int((~verified.valid).sum())
    for proposed, count in zip(lengths.tolist(), counts, strict=True):
        statistics.count(proposed, count)
    return emitted


def _trimmed(draft: Draft, length: int) -> Draft:
    """The first ``length`` drafts of every request."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :length]

    return Draft(draft.tokens[:, :length], cut(draft.logits), cut(draft.stats))


@dataclass(frozen=True)
class Generation:
    """One finished request."""

    tokens: list[int]
    drafted: list[bool]
    finished: Literal["", "stop", "length"]


def generate(target: Target, prompts: Sequence[Sequence[int]], **options: object) -> list[Generation]:
    """Decode a batch to the end; arguments as :func:`stream`, results in the order of the prompts."""
    results = [Generation([], [], "") for _ in prompts]
    for token in stream(target, prompts, **options):  # type: ignore[arg-type]
        result = results[token.request]
        result.tokens.append(token.token)
        result.drafted.append(token.drafted)
        results[token.request] = Generation(result.tokens, result.drafted, token.finished)
    return results
