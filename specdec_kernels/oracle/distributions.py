"""One distribution: a row of logits, its processing, temperature and filters; and draws from it, with margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specdec_kernels.contract import MIN_TEMPERATURE, STEEP, TILE, Level, Purpose
from specdec_kernels.oracle.noise import Floats, Noise


@dataclass(frozen=True)
class Sampling:
    """Temperature and filters of one request; the defaults filter nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass
class Distribution:
    """Probabilities of one row, the scalars ``(scale, cutoff, logsumexp)`` that stand for them, and the margin of the
    filters: the relative error of the probabilities that changes which ids they keep."""

    probs: Floats
    stats: tuple[float, float, float]
    margin: float = np.inf


def row_is_valid(logits: Floats) -> bool:
    """No nan, no +inf, and at least one finite logit."""
    return bool(not np.isnan(logits).any() and not np.isposinf(logits).any() and np.isfinite(logits).any())


def largest_finite(logits: Floats) -> int:
    """What a row that is not valid returns: its largest finite logit, lowest id on ties; 0 if there is none."""
    return int(np.argmax(np.where(np.isfinite(logits), logits, -np.inf)))


def is_greedy(temperature: float) -> bool:
    """Temperature 0, or too small for float32 scalars."""
    return bool(np.float32(temperature) < np.float32(MIN_TEMPERATURE))


def filter_cutoff(logits: Floats, scale: float, sampling: Sampling) -> tuple[float, float]:
    """The smallest logit that top-k, then top-p, then min-p keep (-inf without a filter), and the margin.

    Top-k keeps what is not below the k-th largest logit. Top-p keeps an id when the ids with larger logits hold less
    than ``top_p`` of what top-k left. Min-p keeps an id when its probability is at least ``min_p`` of the largest. Ids
    with equal logits stay or go together.
    """
    few = 0 < sampling.top_k < len(logits)
    if not few and sampling.top_p >= 1 and not sampling.min_p:
        return -np.inf, np.inf
    kept = np.sort(logits)[::-1]
    weights = np.exp(scale * (kept - kept[0]))
    margin = np.inf
    if few:
        kept = kept[kept >= kept[sampling.top_k - 1]]
    if sampling.top_p < 1:
        mass = weights[: len(kept)]
        goal = float(np.float32(sampling.top_p)) * mass.sum()
        above = np.cumsum(mass) - mass
        margin = float(np.min(np.abs(above - goal) / np.maximum(above + goal, np.finfo(float).tiny)))
        kept = kept[kept >= kept[max(np.sum(above < goal) - 1, 0)]]
    if sampling.min_p:
        ratio, least = np.exp(scale * (kept - kept[0])), float(np.float32(sampling.min_p))
        margin = min(margin, float(np.min(np.abs(ratio - least) / (ratio + least))))
        kept = kept[ratio >= least]
    return float(kept[-1]), margin


def distribution(logits: Floats, sampling: Sampling) -> Distribution:
    """Softmax of a valid row after temperature and filters; the point mass on the largest logit at temperature 0; where
    the row is steep (docs/noise.md), the same on each of its largest logits."""
    top = float(logits.max())
    if is_greedy(sampling.temperature):
        return Distribution(point_mass(len(logits), int(np.argmax(logits))), (np.inf, top, 0.0))
    scale = float(np.float32(1.0) / np.float32(sampling.temperature))
    if abs(scale * top) >= STEEP:
        largest = logits == top
        return Distribution(largest / largest.sum(), (0.0, top, float(np.log(largest.sum()))))
    cutoff, margin = filter_cutoff(logits, scale, sampling)
    weights = np.where(logits >= cutoff, np.exp(scale * (logits - top)), 0.0)
    return Distribution(weights / weights.sum(), (scale, cutoff, float(scale * top + np.log(weights.sum()))), margin)


def point_mass(vocab: int, token: int) -> Floats:
    """All probability on one token."""
    probs = np.zeros(vocab)
    probs[token] = 1.0
    return probs


def probs_from_stats(logits: Floats, stats: Sequence[float]) -> Floats:
    """The distribution of a draft that comes with scalars: ``[logit >= cutoff] * exp(scale * logit - logsumexp)``."""
    scale, cutoff, logsumexp = (float(s) for s in stats)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        probs: Floats = np.where(logits < cutoff, 0.0, np.exp(scale * logits - logsumexp))
    return probs


def rows_of_target(draft_logits: Floats | None, draft_to_target: Sequence[int] | None, vocab: int) -> Floats | None:
    """Rows of a drafter with a vocabulary of its own, ``[R, Vd]``, as rows of the target's, ``[R, V]``."""
    if draft_logits is None or draft_to_target is None:
        return draft_logits
    rows = np.full((len(draft_logits), vocab), -np.inf)
    rows[:, list(draft_to_target)] = draft_logits
    return rows


@dataclass(frozen=True)
class Processing:
    """What happens to the logits of one request before temperature and filters: bias, penalties, mask, in this order.

    Done in float32, as everywhere, so that equal logits are equal in every backend.
    """

    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: NDArray[np.bool_] | None = None
    """[K+1, V], a mask for every row."""

    def apply(self, logits: Floats, row: int, drafted: Sequence[int]) -> Floats:
        """The logits of a row whose drafted prefix is ``drafted``."""
        x = np.asarray(logits, np.float32).copy()
        for token, value in self.bias.items():
            x[token] += np.float32(value)
        output = [*self.output, *drafted]
        repetition, presence, frequency = (np.float32(s) for s in (self.repetition, self.presence, self.frequency))
        for token in {*self.prompt, *output}:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        for token in set(output):
            x[token] -= frequency * np.float32(output.count(token)) + presence
        if self.allowed is not None:
            x[~self.allowed[row]] = -np.inf
        return x.astype(np.float64)


# --- draws, with margins ----------------------------------------------------------------------------------------------


def race(weights: Floats, slack: Floats, exponentials: Floats) -> tuple[int, float]:
    """``argmin E / w`` over the positive weights and its margin.

    ``slack`` is how much each weight moves under a relative error of one (a weight that is a difference of
    probabilities moves by their sum). The winner loses to entry i at the error where
    ``E_win / (w_win - e * slack_win) = E_i / (w_i + e * slack_i)``.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        arrivals = np.where(weights > 0, exponentials / weights, np.inf)
        winner = int(np.argmin(arrivals))
        gap = exponentials * weights[winner] - exponentials[winner] * weights
        moved = exponentials[winner] * slack + exponentials * slack[winner]
        margins = np.where(moved > 0, gap / moved, np.inf)
    margins[winner] = np.inf
    return winner, float(margins.min()) if len(margins) else np.inf


def two_level_race(weights: Floats, slack: Floats, noise: Noise, purpose: int, row: int) -> tuple[int, float]:
    """A tile of ``TILE`` consecutive ids first, then an id inside it."""
    tiles = -(-len(weights) // TILE)
    padded, padded_slack = (np.pad(x, (0, tiles * TILE - len(x))).reshape(tiles, TILE) for x in (weights, slack))
    tile, tile_margin = race(padded.sum(1), padded_slack.sum(1), noise.exponentials(purpose, Level.TILE, row, tiles))
    token, token_margin = race(padded[tile], padded_slack[tile], noise.exponentials(purpose, Level.TOKEN, row, TILE))
    return tile * TILE + token, min(tile_margin, token_margin)


def flat_race(weights: Floats, slack: Floats, noise: Noise, row: int) -> tuple[int, float]:
    """All ids in one race, its noise keyed on the absolute position: the draw of the coupled rule."""
    return race(weights, slack, noise.at(row).exponentials(Purpose.COUPLED, Level.TOKEN, 0, len(weights)))
