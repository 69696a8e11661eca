"""Chooses how much to draft, step by step, from what drafting costs and what it has brought so far."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from specdec_kernels.decode.drafters.costs import Costs
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft, counted, require_chain
from specdec_kernels.decode.protocols import Drafter, DrafterSession, ForeknowingSession, joinable, traits_of


class Rates:
    """How often something came true at each place; older times fade.

    Args:
        hope: what is assumed before anything is known.
    """

    FADING = 0.97
    #: Weight of what is hoped, in times; it fades as they do.
    TRUST = 4.0

    def __init__(self, hope: float) -> None:
        self._hope = hope
        self._hoped: list[float] = []
        self._tried: list[float] = []
        self._true: list[float] = []

    def add(self, place: int, true: bool) -> None:
        """One time."""
        missing = place + 1 - len(self._tried)
        for counts, before in ((self._hoped, self.TRUST), (self._tried, 0.0), (self._true, 0.0)):
            counts += [before] * missing
        self._hoped[place] *= self.FADING
        self._tried[place] = self.FADING * self._tried[place] + 1
        self._true[place] = self.FADING * self._true[place] + true

    def expected(self, most: int) -> list[float]:
        """At the first, second, ... place: what is known of one is what is hoped of the next."""
        rates, rate = [], self._hope
        for place in range(most):
            if place < len(self._tried):
                hoped, tried = self._hoped[place], self._tried[place]
                rate = (self._true[place] + hoped * rate) / (tried + hoped)
            rates.append(rate)
        return rates


class ExpectedAcceptance:
    """How often the drafts of one request were accepted, and, where one was not, what lay beside it."""

    #: Acceptance assumed before anything is known: of a draft high enough to try.
    HOPE, HOPE_BESIDE = 0.7, 0.15

    def __init__(self) -> None:
        self._chain, self._beside = Rates(self.HOPE), Rates(self.HOPE_BESIDE)

    def add(self, proposed: int, accepted: int, siblings: int = 0, beside: bool = False) -> None:
        """One step: drafts of the chain; how many had siblings, and whether one of the first rejected was accepted.
        What lies behind that says nothing."""
        for place in range(min(proposed, accepted + 1)):
            self._chain.add(place, place < accepted)
            if place < siblings:
                self._beside.add(place, beside and place == accepted)

    def gains(self, most: int) -> list[tuple[float, float]]:
        """Expected accepted drafts that the first, second, ... place adds, and its siblings."""
        gains, path_prob = [], 1.0
        for accepted, beside in zip(self._chain.expected(most), self._beside.expected(most), strict=True):
            gains.append((path_prob * accepted, path_prob * beside))
            path_prob *= accepted
        return gains


#: Of one request: drafts of the chain, and how many of them, the first ones, with siblings.
Shape = tuple[int, int]


class AdaptiveDrafter:
    """Another drafter, asked each step for as many drafts as make the most tokens a second; down to none.

    The expected tokens of a step follow from the running acceptance, its time from measured times of drafting and
    scoring (Leviathan et al., arXiv:2211.17192, section 3.5, with measured costs in place of constants); in a batch
    all requests draft as many, as far as each may. The choice depends on earlier steps and on clocks, never on the
    uniforms of the step nor on a drawn token, so the distribution is exact (docs/algorithms.md, 10). What is drafted
    depends on the clock, though, so at a temperature, under the rules ``"token"`` and ``"block"``, the same seed may
    give another text.

    Where siblings can lie beside the drafts of a chain, it also chooses how many of them have some.

    Args:
        drafter: what drafts chains, with or without siblings.
        costs: shared by all drafters of one target; ``None`` for a drafter that is alone.
    """

    #: Steps without drafts before one is tried again, doubled each time that it does not pay, up to the second number.
    PATIENCE = (8, 64)

    def __init__(self, drafter: Drafter, costs: Costs | None = None) -> None:
        self.drafter, self.costs = drafter, Costs() if costs is None else costs
        self.feature_layers = drafter.feature_layers
        self.drafting = self.costs.drafting()
        """Measured seconds of drafting, by drafts; of all streams, as the costs."""
        self.vocab_size, self.siblings, self.walked = traits_of(drafter)

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> AdaptiveSession:
        return AdaptiveSession(self, self.drafter.begin(prompts, features), len(prompts))

    def best(
        self, most: Sequence[int], acceptance: Sequence[ExpectedAcceptance], batch: int | None = None
    ) -> list[Shape]:
        """Of each request's drafts, at most so many, those with the most expected tokens a second of a batch, in which
        others may be without a drafter.

        A pass is as wide as its widest request, and drafting takes as long as its longest chain, so the width is what
        is chosen; each request fills it with what it gains most by."""
        batch = len(most) if batch is None else batch
        step = self.costs.step(batch)
        filled = [self._filled(limit, own) for limit, own in zip(most, acceptance, strict=True)]
        best, rate = [(0, 0)] * len(most), batch / step.at(1)
        for width in range(1, max(most) + 1):
            each = [own[min(width, len(own) - 1)] for own in filled]
            shapes = [shape for shape, _ in each]
            tokens = batch + self.costs.gained([gain for _, gain in each])
            seconds = self.drafting.at(max(length for length, _ in shapes)) + step.at(1 + width)
            if tokens / seconds > rate:
                rate, best = tokens / seconds, shapes
        return best

    def _filled(self, limit: int, acceptance: ExpectedAcceptance) -> list[tuple[Shape, float]]:
        """Of one request, by drafts up to a limit: how to draft so many, and the expected tokens that they add."""
        gains = acceptance.gains(limit)
        if not self.siblings:
            added = accumulate((chain for chain, _ in gains), initial=0.0)
            return [((length, 0), tokens) for length, tokens in enumerate(added)]
        pieces = []  # (gain, place, whether of siblings)
        least = math.inf  # neither rises from one place to the next, or nothing would hang together
        for place, (chain, siblings) in enumerate(gains):
            least = min(least, chain, siblings)
            pieces += [(chain, place, False), (least, place, True)]
        pieces.sort(key=lambda piece: (-piece[0], piece[1:]))  # siblings behind what they lie beside
        filled = []
        for drafts in range(limit + 1):
            length = beside = 0
            tokens = 0.0
            for gain, place, of_siblings in pieces:
                more = self.siblings if of_siblings else 1
                if length + self.siblings * beside + more <= drafts:
                    tokens += gain
                    length, beside = (length, place + 1) if of_siblings else (place + 1, beside)
            filled.append(((length, beside), tokens))
        return filled


class AdaptiveSession:
    """One stream of an :class:`AdaptiveDrafter`: what its requests accepted so far."""

    def __init__(self, drafter: AdaptiveDrafter, session: DrafterSession, batch: int) -> None:
        self._drafter, self._session = drafter, session
        self.acceptance = [ExpectedAcceptance() for _ in range(batch)]
        self._drafted = [0] * batch  # drafts of each chain
        self._chains: list[list[int]] | None = None  # the chains themselves, where they have siblings
        self._shapes: list[Shape] = [(0, 0)] * batch
        self._asked = False
        self._idle, self._patience = 0, drafter.PATIENCE[0]

    def propose(self, step: Step) -> Draft | TreeDraft:
        start = time.perf_counter()
        batch = len(step.num_draft) if step.batch is None else step.batch
        self._shapes = self._choose(step.num_draft, batch)
        lengths = [length for length, _ in self._shapes]
        draft: Draft | TreeDraft = Draft.nothing(len(lengths))
        if any(lengths):
            nodes = [length + self._drafter.siblings * beside for length, beside in self._shapes]
            wanted = [min(pair) for pair in zip(nodes, step.num_draft, strict=True)]
            draft = self._session.propose(replace(step, num_draft=wanted, length=lengths))
        if not self._drafter.siblings:
            draft = require_chain(draft)
        if isinstance(draft, TreeDraft):
            self._chains = draft.chains()
            rows, self._drafted = draft.parents.shape[1], [len(chain) for chain in self._chains]
        else:
            self._chains, self._drafted = None, list(counted(draft))
            rows = 1 + max(self._drafted)
        self._asked = True
        if longest := max(self._drafted):
            self._drafter.drafting.add(longest, time.perf_counter() - start)
        self._drafter.costs.proposed(batch, rows)
        return draft

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._drafter.costs.scored()
        if self._asked:
            for slot, new in enumerate(tokens):
                drafted, accepted = self._drafted[slot], len(new) - 1
                if drafted:
                    chain = None if self._chains is None else self._chains[slot]
                    beside = chain is not None and accepted > 0 and list(new[:accepted]) != chain[:accepted]
                    self.acceptance[slot].add(drafted, accepted - beside, self._shapes[slot][1], beside)
            self._idle = 0 if any(self._drafted) else self._idle + 1
        self._asked = False
        self._session.commit(tokens, features)

    def select(self, slots: Sequence[int]) -> None:
        self._session.select(slots)
        self.acceptance = [self.acceptance[slot] for slot in slots]

    def join(self, other: AdaptiveSession) -> None:
        joinable(self._session).join(other._session)
        self.acceptance = self.acceptance + other.acceptance

    def _choose(self, most: Sequence[int], batch: int) -> list[Shape]:
        """What to draft, at most so many of each request, in a pass of so many requests."""
        drafter = self._drafter
        if isinstance(self._session, ForeknowingSession):
            most = self._session.available(most)
        if drafter.costs.plain_is_due(batch):
            return [(0, 0)] * len(most)
        if not drafter.drafting.known:
            widest = [(limit + drafter.siblings) // (1 + drafter.siblings) for limit in most]
            return [(length, length if drafter.siblings else 0) for length in widest]
        wanted = drafter.best(most, self.acceptance, batch)
        if any(length for length, _ in wanted):
            self._patience = drafter.PATIENCE[0]
            return wanted
        if self._idle < self._patience or not any(most):
            return wanted
        self._patience = min(2 * self._patience, drafter.PATIENCE[1])
        self._idle = 0
        return [(min(1, limit), 0) for limit in most]
