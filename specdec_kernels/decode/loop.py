"""The loop: propose, score, verify, commit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from specdec_kernels.decode.protocols import Draft, Drafter, Step, Target, TreeDraft
from specdec_kernels.decode.requests import Request, filters, processing, requests
from specdec_kernels.decode.statistics import Statistics
from specdec_kernels.ops import BackendName, RuleName, verify_chain
from specdec_kernels.ops.tree_rules import TreeRuleName, verify_tree
from specdec_kernels.ops.trees import tree_positions


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
        num_draft: drafts a step at most; of a tree, its nodes beside the root.
        max_new_tokens, seed: one for all requests, or a list with one each. Seed ``None`` draws one.
        stop_tokens: ids that end a request; the id itself is the last token yielded.
        rule: of :func:`specdec_kernels.verify_chain`. For trees of drawn drafts "token" is "recursive" and "block" is
            "traversal"; trees of point masses are walked.
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
        features = target.begin(
            [request.prompt for request in active], () if drafter is None else drafter.feature_layers
        )
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


@dataclass(frozen=True)
class _Outcome:
    """What the verification of one step decided."""

    tokens: Tensor
    num_accepted: Tensor
    valid: Tensor
    logprobs: Tensor
    features: Tensor | None
    """[B, R, H]: the target's before each token."""
    proposed: list[tuple[int, int]]
    """Of each request (drafts, how deep they go)."""


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
        **law,
    )
    with statistics.timed("draft"):
        draft = drafter.propose(step) if drafter is not None else Draft.nothing(len(active))
    decide = _verified_tree if isinstance(draft, TreeDraft) else _verified_chain
    outcome = decide(target, draft, active, step, verification, statistics, law)  # type: ignore[arg-type]
    counts = outcome.num_accepted.tolist()
    emitted = [row[: count + 1] for row, count in zip(outcome.tokens.tolist(), counts, strict=True)]
    with statistics.timed("draft"):
        if drafter is not None:
            drafter.commit(emitted, outcome.features)
    statistics.steps += 1
    statistics.invalid += int((~outcome.valid).sum())
    for (proposed, depth), count in zip(outcome.proposed, counts, strict=True):
        statistics.count(proposed, count, depth)
    return emitted, outcome.logprobs.tolist()


def _last(active: Sequence[Request]) -> Tensor:
    """int64 [B, 1]: the last token of every text."""
    return torch.tensor([[(request.generated or request.prompt)[-1]] for request in active])


def _verified_chain(
    target: Target,
    draft: Draft,
    active: Sequence[Request],
    step: Step,
    verification: _Verification,
    statistics: Statistics,
    law: dict[str, Any],
) -> _Outcome:
    with statistics.timed("draft"):
        lengths = torch.minimum((draft.tokens >= 0).long().cumprod(1).sum(1), step.num_draft)
        draft = _trimmed(draft, lengths)
    rows = torch.cat([_last(active), draft.tokens.clamp(min=0)], 1)
    with statistics.timed("target"):
        scores = target.score(rows, lengths + 1)
    with statistics.timed("verify"):
        verified = verify_chain(
            scores.logits,
            draft.tokens,
            draft.logits,
            draft.stats,
            seed=step.seed,
            position=step.position,
            rule=verification.rule,
            logprobs=verification.logprobs,
            backend=verification.backend,
            **law,
            **processing(active, draft, scores.logits.shape[-1]),
        )
    with statistics.timed("target"):
        target.keep(verified.num_accepted.long() + 1)
    proposed = [(length, length) for length in lengths.tolist()]
    accepted = verified.num_accepted, verified.valid, verified.logprobs
    return _Outcome(verified.tokens, *accepted, scores.features, proposed)


#: The rules of a chain, carried over to trees.
_TREE_RULES: dict[RuleName, TreeRuleName] = {"token": "recursive", "block": "traversal", "coupled": "coupled"}


def _verified_tree(
    target: Target,
    draft: TreeDraft,
    active: Sequence[Request],
    step: Step,
    verification: _Verification,
    statistics: Statistics,
    law: dict[str, Any],
) -> _Outcome:
    live, tokens = draft.live, draft.tokens.clone()
    tokens[:, :1] = _last(active)
    with statistics.timed("target"):
        scores = target.score_tree(tokens, draft.parents)
    with statistics.timed("verify"):
        rule = _TREE_RULES[verification.rule]
        verified = verify_tree(
            scores.logits,
            tokens,
            draft.parents,
            draft.logits,
            draft.stats,
            seed=step.seed,
            position=step.position,
            # Point masses gain nothing by being tested one after the other.
            rule=rule if draft.logits is not None or rule == "coupled" else "walk",
            siblings=draft.siblings,
            logprobs=verification.logprobs,
            backend=verification.backend,
            **law,
            **processing(active, draft, scores.logits.shape[-1]),
        )
    with statistics.timed("target"):
        target.keep_path(verified.nodes)
        features = scores.features
        if features is not None:
            path = verified.nodes.long().clamp(min=0)[..., None]
            features = features.gather(1, path.expand(-1, -1, features.shape[2]))
    depths = tree_positions(draft.parents).amax(1).tolist()
    proposed = list(zip((live.sum(1) - 1).tolist(), depths, strict=True))
    accepted = verified.num_accepted, verified.valid, verified.logprobs
    return _Outcome(verified.tokens, *accepted, features, proposed)


def _trimmed(draft: Draft, lengths: Tensor) -> Draft:
    """The first ``lengths [B]`` drafts of every request, -1 behind them."""
    longest = int(lengths.max())

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :longest]

    tokens = draft.tokens[:, :longest].masked_fill(torch.arange(longest) >= lengths[:, None], -1)
    return Draft(tokens, cut(draft.logits), cut(draft.stats))


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
