"""What verifying a chain and a tree have in common: the rows of one request, and the margins of what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec_kernels.contract import Purpose
from specdec_kernels.oracle.distributions import (
    Distribution,
    Processing,
    Sampling,
    distribution,
    is_greedy,
    point_mass,
    probs_from_stats,
    row_is_valid,
    two_level_race,
)
from specdec_kernels.oracle.noise import Floats, Noise

PLAIN, UNPROCESSED = Sampling(), Processing()


@dataclass
class Verified:
    """One request of :func:`specdec_kernels.verify_chain` or of :func:`specdec_kernels.verify_tree`; ``tokens`` without
    padding."""

    tokens: list[int]
    num_accepted: int
    valid: bool
    margin: float = np.inf
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    num_proposed: int = 0
    num_independent: int = 0
    independent_margin: float = np.inf
    nodes: list[int] = field(default_factory=list)
    """Of a tree: the root and the accepted nodes, whose rows the tokens came from."""


@dataclass
class Step:
    """One request: its rows, and the margins of what was decided so far."""

    target_logits: Floats
    tokens: Sequence[int]
    draft_logits: Floats | None
    draft_stats: Floats | None
    noise: Noise
    sampling: Sampling
    processing: Processing
    margins: list[float] = field(default_factory=list)
    draft_temperature: float = 1.0
    """Of drafts that came without scalars."""

    @property
    def greedy(self) -> bool:
        """A greedy target accepts its argmax and draws its argmax: no distribution of the draft matters."""
        return is_greedy(self.sampling.temperature)

    def drafted(self, row: int) -> Sequence[int]:
        """The drafts before a row."""
        raise NotImplementedError

    def logits(self, row: int) -> Floats:
        """The processed logits of a target row."""
        return self.processing.apply(self.target_logits[row], row, self.drafted(row))

    def target(self, row: int) -> Distribution | None:
        """The distribution of a target row, None where it is not usable."""
        logits = self.logits(row)
        return distribution(logits, self.sampling) if row_is_valid(logits) else None

    def certain(self, row: int) -> bool:
        """Whether the drafts of a row are point masses."""
        if self.greedy or self.draft_logits is None:
            return True
        if self.draft_stats is None:
            return is_greedy(self.draft_temperature)
        return bool(np.isinf(self.draft_stats[row][0]))

    def draft(self, row: int, token: int) -> Floats | None:
        """What ``token`` was drawn from in a draft row, None where the row or its scalars are not usable."""
        if self.certain(row):
            return point_mass(self.target_logits.shape[1], token)
        assert self.draft_logits is not None
        draft_row = np.asarray(self.draft_logits[row], np.float64)
        if self.draft_stats is None:
            return distribution(draft_row, Sampling(self.draft_temperature)).probs if row_is_valid(draft_row) else None
        probs = probs_from_stats(draft_row, self.draft_stats[row])
        return probs if np.isfinite(probs[token]) else None

    def read(self, row: int) -> Distribution | None:
        """:meth:`target`, where the filters' margin counts."""
        dist = self.target(row)
        if dist is not None and np.isfinite(dist.margin):
            self.margins.append(dist.margin)
        return dist

    def draw(self, weights: Floats, slack: Floats, row: int) -> int:
        """The recovered or bonus token."""
        token, margin = two_level_race(weights, slack, self.noise, Purpose.TARGET, row)
        self.margins.append(margin)
        return token

    def passes(self, row: int, probability: float, error: float) -> bool:
        """Whether the uniform of a row is below ``probability``; ``error`` is how far that moves under a relative error
        of one in all probabilities."""
        uniform = self.noise.uniform(row)
        self.margins.append(abs(probability - uniform) / error if error > 0 else np.inf)
        return uniform < probability

    def scored(self, tokens: Sequence[int], rows: Sequence[int], accepted: int, valid: bool) -> Verified:
        """The result, with the log-probabilities of ``tokens``, each by its own row."""
        result = Verified(list(tokens), accepted, valid, min(self.margins, default=np.inf), self.margins)
        for row, token in zip(rows, tokens, strict=True):
            dist, raw = self.target(row), np.asarray(self.target_logits[row], np.float64)
            plain = distribution(raw, PLAIN).probs if row_is_valid(raw) else np.full(len(raw), np.nan)
            with np.errstate(divide="ignore"):
                result.logprobs.append(np.nan if dist is None else float(np.log(dist.probs[token])))
                result.raw_logprobs.append(float(np.log(plain[token])))
        return result
