"""The loop: propose, score, verify, commit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from specdec_kernels.decode.protocols import Draft, Drafter, Step, Target
from specdec_kernels.decode.requests import Request, filters, processing, requests
from specdec_kernels.decode.statistics import Statistics
from specdec_kernels.ops import BackendName, RuleName, verify_chain


@dataclass(frozen=True)
class Token:
    """One token of one request, as it is streamed."""

    request: int
    token: int
    drafted: bool
    """Whether it was a draft that was accepted; False for a token drawn by the verification."""
    finished: Literal["", "stop", "length"] = ""
    """Why the request ends with this token; empty if it does not."""
    logprob: float = float("nan")
    """Natural logarithm of its probability under the target's law, after all processing; nan unless asked for."""


@dataclass(frozen=True)
class _Verification:
    """How drafts are verified."""

    rule: RuleName
    logprobs: bool
    backend: BackendName | None


@torch.inference_mode()
def stream(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    drafter: Drafter | None = None,
    num_draft: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    seed: int | Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    rule: RuleName = "token",
    logprobs: bool = False,
    statistics: Statistics | None = None,
    backend: BackendName | None = None,
    **sampling: Any,
) -> Iterator[Token]:
    """Decode a batch, yielding each token as soon as it is verified.

    The text has exactly the target's distribution, whatever the drafter. With the same seed a request gives the same
    text alone and in any batch, as far as the target's logits are the same there and the drafter drafts the same; under
    the rule ``"coupled"`` whatever is drafted.

    Args:
        target: see :mod:`specdec_kernels.decode.targets`.
        prompts: token ids, at least one each.
        drafter: see :mod:`specdec_kernels.decode.drafters`; ``None`` decodes plainly, one token a step.
        num_draft: drafts a step at most.
        max_new_tokens, seed: one for all requests, or a list with one each. Seed ``None`` draws one.
        stop_tokens: ids that end a request; the id itself is the last token yielded.
        rule: of :func:`specdec_kernels.verify_chain`.
        logprobs: yield the log-probability of every token.
        statistics: filled in as decoding goes.
        backend: of :func:`specdec_kernels.verify_chain`.
        **sampling: fields of :class:`Sampling`, each one for all requests or a list with one each.

    Yields:
        :class:`Token`, in the order of the text for every request.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if num_draft < 0:
        raise ValueError(f"num_draft must not be negative, got {num_draft}")
    statistics = statistics if statistics is not None else Statistics()
    verification = _Verification(rule, logprobs, backend)
    active = requests(prompts, seed, max_new_tokens, sampling)
    if not active:
        return
    with statistics.timed("prompt"):
        features = target.begin([request.prompt for request in active], drafter is not None and drafter.wants_features)
        if drafter is not None:
            drafter.begin([request.prompt for request in active], features)
    while active:
        emitted, scores = _step(target, drafter, active, num_draft, verification, statistics)
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
                score = scores[slot][index] if logprobs else float("nan")
                yield Token(request.index, token, index < len(tokens) - 1, end, score)
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
    verification: _Verification,
    statistics: Statistics,
) -> tuple[list[list[int]], list[list[float]]]:
    """One round for the whole batch: the tokens each request gains, and their log-probabilities if asked for."""
    most = min(num_draft, target.room() - 1)
    law = filters(active)
    step = Step(
        num_draft=torch.tensor([min(most, request.remaining - 1) for request in active]),
        seed=torch.tensor([request.seed for request in active]),
        position=torch.tensor([request.position for request in active]),
        coupled=verification.rule == "coupled",
        **law,  # type: ignore[arg-type]
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
            rule=verification.rule,
            logprobs=verification.logprobs,
            backend=verification.backend,
            **law,  # type: ignore[arg-type]
            **processing(active, draft.tokens, lengths.tolist(), scores.logits.shape[-1]),
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
    return emitted, verified.logprobs.tolist()


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
    logprobs: list[float]
    finished: Literal["", "stop", "length"]


def generate(target: Target, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
    """Decode a batch to the end; arguments as :func:`stream`, results in the order of the prompts."""
    results = [Generation([], [], [], "") for _ in prompts]
    for token in stream(target, prompts, **options):
        result = results[token.request]
        result.tokens.append(token.token)
        result.drafted.append(token.drafted)
        result.logprobs.append(token.logprob)
        results[token.request] = replace(result, finished=token.finished)
    return results
