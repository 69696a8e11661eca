"""The loop: propose, score, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_kernels.checks import choice, flags, whole
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft, counted
from specdec_kernels.decode.proposals import check_proposal
from specdec_kernels.decode.protocols import (
    Drafter,
    DrafterSession,
    Scores,
    SteppingSession,
    Target,
    TargetSession,
    joinable,
)
from specdec_kernels.decode.requests import Batch, Request
from specdec_kernels.decode.results import Ending, Token
from specdec_kernels.decode.statistics import Statistics
from specdec_kernels.ops import BackendName, RuleName, sample, verify_chain
from specdec_kernels.ops.results import Verified, VerifiedTree
from specdec_kernels.ops.tree_rules import TreeRuleName, verify_tree
from specdec_kernels.ops.trees import tree_positions

#: Whether a request, of this index, ends with the last of the tokens generated.
StopWhen = Callable[[int, Sequence[int]], bool]


@dataclass(frozen=True)
class Options:
    """How a loop drafts and verifies.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    num_draft: int
    rule: RuleName
    logprobs: bool
    backend: BackendName | None
    stop_when: StopWhen | None
    max_rows: int | None = None
    """Rows of a step at most, of all requests together, as long as each has one."""

    def __post_init__(self) -> None:
        whole("num_draft", self.num_draft, 0)
        choice("rule", self.rule, _TREE_RULES)
        flags(logprobs=self.logprobs)
        check_stop_when(self.stop_when)

    def drafts(self, batch: int) -> int:
        """Drafts of each of so many requests at most."""
        return self.num_draft if self.max_rows is None else max(0, min(self.num_draft, self.max_rows // batch - 1))


#: The rules of a chain, carried over to trees.
_TREE_RULES: dict[RuleName, TreeRuleName] = {"token": "recursive", "block": "traversal", "coupled": "coupled"}


class _Outcome(NamedTuple):
    """What the verification of one step decided."""

    verified: Verified | VerifiedTree
    scores: Scores
    features: Tensor | None
    """[B, R, H]: the target's before each token."""
    tokens: list[list[int]]
    """The accepted drafts and the bonus or recovered token."""
    logprobs: list[list[float]]
    drawn_from: list[int]
    """The row that each request's last token was drawn from."""
    valid: list[bool]
    masks: Tensor | None
    """What was allowed to follow each row, on the CPU."""
    proposed: list[tuple[int, int]]
    """Of each request (drafts, how deep they go)."""


def check_stop_when(stop_when: object) -> None:
    """None, or something that can be called.

    Raises:
        TypeError: it is not.
    """
    if stop_when is not None and not callable(stop_when):
        raise TypeError(f"stop_when must be a function of (index, tokens), got {stop_when!r}")


class Loop:
    """One stream: its sessions with target and drafter, and the requests that go on."""

    def __init__(self, target: Target, drafter: Drafter | None, options: Options, statistics: Statistics) -> None:
        if not isinstance(statistics, Statistics):
            raise TypeError(f"statistics must be Statistics, got {statistics!r}")
        self._with, self._options, self._statistics = (target, drafter), options, statistics
        self._device, self._vocab = target.device, target.vocab_size
        self._batch: Batch
        self._target: TargetSession
        self._drafter: DrafterSession | None = None

    @property
    def requests(self) -> list[Request]:
        """Those that go on, by slot."""
        return self._batch.requests

    def begin(self, requests: list[Request]) -> None:
        """Read the prompts of the requests, which are all that there are."""
        target, drafter = self._with
        prompts = [request.prompt for request in requests]
        with torch.inference_mode(), self._statistics.timed("prompt"):
            limits = [request.max_new_tokens for request in requests]
            session = target.begin(prompts, limits, () if drafter is None else drafter.feature_layers)
            drafting = None if drafter is None else drafter.begin(prompts, session.features)
        self.admit(requests, session, drafting)

    def admit(self, requests: list[Request], target: TargetSession, drafter: DrafterSession | None) -> None:
        """Go on with these requests, whose prompts were read; not yet with any others."""
        self._batch = Batch(requests, self._vocab, self._device)
        self._target, self._drafter = target, drafter
        self._stepping = target if isinstance(target, SteppingSession) else None

    def join(self, requests: list[Request], target: TargetSession, drafter: DrafterSession | None) -> None:
        """Go on with these requests too, whose prompts were read, behind those that there are."""
        with torch.inference_mode():
            # What can fail on the way comes first, so that those that run are not left with caches of others.
            batch = Batch([*self.requests, *requests], self._vocab, self._device)
            drafting = None if self._drafter is None else joinable(self._drafter)
            joinable(self._target).join(target)
            if drafting is not None:
                drafting.join(drafter)
            self._batch = batch

    def __iter__(self) -> Iterator[Token]:
        while self._batch.requests:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One round for the whole batch: the tokens that its requests gain."""
        batch, statistics = self._batch, self._statistics
        most = min(self._options.drafts(len(batch.requests)), self._target.max_rows() - 1)
        coupled = self._options.rule == "coupled"
        step = Step(
            num_draft=[min(most, request.remaining - 1) for request in batch.requests],
            seed=batch.seed,
            position=batch.position,
            greedy=batch.greedy,
            coupled=coupled,
            same_text=batch.greedy or coupled,
            **batch.filters,
        )
        with statistics.timed("draft"):
            draft = self._proposed(step)
        outcome = self._verify_tree(draft, step) if isinstance(draft, TreeDraft) else self._verify_chain(draft, step)
        with statistics.timed("draft"):
            batch.advance(outcome.verified.tokens, outcome.verified.num_accepted, outcome.tokens)
            if self._drafter is not None:
                self._drafter.commit(outcome.tokens, outcome.features)
        statistics.steps += 1
        for request, (proposed, depth), new in zip(batch.requests, outcome.proposed, outcome.tokens, strict=True):
            statistics.count_request(request.index, proposed, len(new) - 1, depth)
        gained, going_on = [], []
        for slot, request in enumerate(batch.requests):
            own = self._gained(request, slot, outcome)
            gained += own
            if not own[-1].finished:
                going_on.append(slot)
        if len(going_on) < len(batch.requests):
            self.select(going_on)
        return gained

    def _gained(self, request: Request, slot: int, outcome: _Outcome) -> list[Token]:
        """The tokens of one request's step, up to its end."""
        failure = "" if outcome.valid[slot] else self._failure(request, slot, outcome)
        new = outcome.tokens[slot]
        gained = []
        for index, token in enumerate(new[:-1] if failure else new):
            request.generated.append(token)
            self._statistics.emitted += 1
            ended: Ending = ""
            stop_when = self._options.stop_when
            # A list of its own, which the caller may keep or change.
            if token in request.stop_tokens or (stop_when and stop_when(request.index, list(request.generated))):
                ended = "stop"
            elif request.remaining == 0:
                ended = "length"
            score = outcome.logprobs[slot][index] if self._options.logprobs else float("nan")
            gained.append(Token(request.index, token, index < len(new) - 1, ended, score))
            if ended:
                return gained
        if failure:
            self._statistics.invalid += 1
            gained.append(Token(request.index, -1, False, failure))
        return gained

    def _failure(self, request: Request, slot: int, outcome: _Outcome) -> Ending:
        """Why the row that a request's last token was drawn from is no distribution; nothing if another one was read
        that is not (which no token was drawn from)."""
        row = slice(outcome.drawn_from[slot], outcome.drawn_from[slot] + 1)
        masks = None if outcome.masks is None else outcome.masks[slot, row]
        if masks is not None and not bool(masks.any()):
            return "dead_end"
        # As the operators see it: behind the drafts that were accepted before the row, which penalties count.
        before = replace(request, generated=request.generated + outcome.tokens[slot][:-1])
        alone = Batch([before], self._vocab, self._device)
        drawn = sample(
            outcome.scores.logits[slot, row],
            seed=alone.seed,
            position=alone.position,
            backend=self._options.backend,
            **alone.processing(masks),
        )
        return "invalid" if bool(drawn.stats.isnan().any()) else ""

    @torch.inference_mode()
    def select(self, slots: list[int]) -> None:
        """Go on with the requests in these slots only; with none, nothing is kept of the streams."""
        if not slots:
            self._batch.requests = []
            del self._target, self._drafter, self._stepping
            return
        self._batch.select(slots)
        self._target.select(slots)
        if self._drafter is not None:
            self._drafter.select(slots)

    def _proposed(self, step: Step) -> Draft | TreeDraft:
        """What is drafted, on the target's device, up to the first draft that was drawn from no distribution."""
        if self._drafter is None:
            return Draft.nothing(len(step.num_draft)).to(self._device)
        draft = self._drafter.propose(step)
        if wrong := check_proposal(draft, step, self._vocab):
            raise ValueError(next(iter(wrong.values())))
        draft = draft.to(self._device)
        if isinstance(draft, TreeDraft):
            return _usable_tree(draft, self._vocab)
        counts = [min(own, most) for own, most in zip(counted(draft), step.num_draft, strict=True)]
        return _usable(draft.first(counts), self._vocab)

    def _verify_chain(self, draft: Draft, step: Step) -> _Outcome:
        counts = draft.counts
        assert counts is not None, "they were counted"
        masks = None
        if self._batch.has_masks:
            chain = TreeDraft.of(draft)
            masks = self._batch.masks(chain.tokens.tolist(), chain.parents.tolist())
        drawn = {"draft_temperature": draft.temperature, "draft_to_target": draft.vocabulary}
        how = {"rule": self._options.rule, **drawn}
        verification = {**how, **self._verification(step, masks)}
        scores, verified = self._stepped(draft, counts, verification)
        with self._statistics.timed("verify"):
            tokens, accepted, valid, logprobs, proposed = self._read(verified, verified.num_proposed[:, None])
        with self._statistics.timed("target"):
            self._target.commit([count + 1 for (count,) in accepted])
        return _Outcome(
            verified,
            scores,
            scores.features,
            [own[: count + 1] for own, (count,) in zip(tokens, accepted, strict=True)],
            logprobs,
            [count for (count,) in accepted],
            [bool(own) for (own,) in valid],
            masks,
            [(count, count) for (count,) in proposed],
        )

    def _stepped(self, draft: Draft, counts: Sequence[int], verification: dict[str, Any]) -> tuple[Scores, Verified]:
        """Drafts scored and verified: by the target at once, where it can and nothing is done to its logits."""
        processed = verification.keys() & {"penalties", "logit_bias", "bitmask"}
        if self._stepping is not None and not processed:
            with self._statistics.timed("target"):
                return self._stepping.step(self._batch.last, draft, **verification)
        with self._statistics.timed("target"):
            rows = torch.cat([self._batch.last, draft.tokens.clamp(min=0)], 1)
            scores = self._target.score(rows, [count + 1 for count in counts])
        with self._statistics.timed("verify"):
            return scores, verify_chain(scores.logits, draft.tokens, draft.logits, draft.stats, **verification)

    def _verify_tree(self, draft: TreeDraft, step: Step) -> _Outcome:
        tokens = torch.cat([self._batch.last, draft.tokens[:, 1:]], 1)
        masks = self._batch.masks(tokens.tolist(), draft.parents.tolist()) if self._batch.has_masks else None
        with self._statistics.timed("target"):
            scores = self._target.score_tree(tokens, draft.parents)
        with self._statistics.timed("verify"):
            rule = _TREE_RULES[self._options.rule]
            verified = verify_tree(
                scores.logits,
                tokens,
                draft.parents,
                draft.logits,
                draft.stats,
                # Point masses gain nothing by being tested one after the other.
                rule=rule if draft.logits is not None or rule == "coupled" else "walk",
                siblings=None if draft.logits is None else draft.siblings,
                draft_temperature=draft.temperature,
                draft_to_target=draft.vocabulary,
                **self._verification(step, masks),
            )
            shape = [draft.live.sum(1, keepdim=True) - 1, tree_positions(draft.parents).amax(1, keepdim=True)]
            new, accepted, valid, logprobs, nodes, proposed, depth = self._read(verified, verified.nodes, *shape)
        paths = [own[: count + 1] for own, (count,) in zip(nodes, accepted, strict=True)]
        with self._statistics.timed("target"):
            self._target.commit_path(paths)
            features = scores.features
            if features is not None:
                path = verified.nodes.long().clamp(min=0)[..., None]
                features = features.gather(1, path.expand(-1, -1, features.shape[2]))
        return _Outcome(
            verified,
            scores,
            features,
            [own[: count + 1] for own, (count,) in zip(new, accepted, strict=True)],
            logprobs,
            [path[-1] for path in paths],
            [bool(own) for (own,) in valid],
            masks,
            [(count, deep) for (count,), (deep,) in zip(proposed, depth, strict=True)],
        )

    def _verification(self, step: Step, masks: Tensor | None) -> dict[str, Any]:
        """What chains and trees are verified with."""
        return {
            "seed": step.seed, "position": step.position, "logprobs": self._options.logprobs,
            "backend": self._options.backend, **self._batch.filters, **self._batch.processing(masks),
        }  # fmt: skip

    def _read(self, verified: Verified | VerifiedTree, *more: Tensor) -> list[list[list[Any]]]:
        """Tokens, accepted drafts, whether valid, log-probabilities (none unless requested) and more columns [B, *] as
        lists: the one time in a step that the host waits for the device. Float64 holds ids exactly."""
        nothing = verified.tokens[:, :0]
        whole = [verified.tokens, verified.num_accepted[:, None], verified.valid[:, None]]
        columns = [*whole, verified.logprobs if self._options.logprobs else nothing, *more]
        rows = torch.cat([column.double() for column in columns], 1).tolist()
        lists, start = [], 0
        for place, column in enumerate(columns):
            end = start + column.shape[1]
            kind = float if place == len(whole) else int
            lists.append([[kind(value) for value in row[start:end]] for row in rows])
            start = end
        return lists


def _usable(draft: Draft, vocab_size: int) -> Draft:
    """A chain up to its first draft that is no id of the target (which on a device was not seen before), or was drawn
    from no distribution (nan, +inf, nothing finite)."""
    bad = draft.tokens >= vocab_size
    if draft.stats is not None:
        bad = bad | draft.stats.isnan().any(-1)
    elif draft.logits is not None:
        rows = draft.logits
        bad = bad | (rows.isnan() | (rows == torch.inf)).any(-1) | ~rows.isfinite().any(-1)
    return replace(draft, tokens=draft.tokens.masked_fill(bad.cumsum(1) > 0, -1))


def _usable_tree(draft: TreeDraft, vocab_size: int) -> TreeDraft:
    """A tree up to its first node of which the same is true, as far as stats tell; what is no node has some id."""
    bad = (draft.tokens < 0) | (draft.tokens >= vocab_size)
    if draft.stats is not None:
        bad = bad | draft.stats.isnan().any(-1).gather(1, draft.parents.long().clamp(min=0))
    parents = draft.parents.masked_fill((bad & (draft.parents >= 0)).cumsum(1) > 0, -1)
    return replace(draft, parents=parents, tokens=draft.tokens.masked_fill(parents < 0, 0))
