"""The float64 NumPy oracle: slow, obvious, one request at a time. Tests and the self-test import it, nothing else does.

Every decision comes with its *margin*: the smallest relative error, common in size to all probabilities involved, that
could have made it fall the other way. A backend whose probabilities are good to a relative ``epsilon`` must agree with
the oracle wherever the margin exceeds it.

The rules are written over any number type, so that :func:`chain_law` enumerates the exact law with fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec_kernels.contract import (
    MIN_TEMPERATURE,
    PHILOX_INCREMENTS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    TILE,
    Level,
    Purpose,
    counter_tag,
)

Floats = NDArray[np.float64]
Words = NDArray[np.uint32]

# --- noise ------------------------------------------------------------------------------------------------------------


def philox(counter: NDArray[Any], key: tuple[int, int]) -> Words:
    """Philox4x32-10 of counters ``[..., 4]`` under a key of two words; four words each."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(counter)[..., i].astype(np.uint64) for i in range(4)]
    k = [key[0], key[1]]
    for _ in range(PHILOX_ROUNDS):
        a, b = c[0] * np.uint64(PHILOX_MULTIPLIERS[0]), c[2] * np.uint64(PHILOX_MULTIPLIERS[1])
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[i] + PHILOX_INCREMENTS[i]) & 0xFFFFFFFF for i in range(2)]
    return np.stack(c, -1).astype(np.uint32)


def noise_words(seed: int, position: int, tag: int, first: int, counters: int) -> Words:
    """The words of counters ``first, first + 1, ...`` of one request's stream, four a counter."""
    counter = np.zeros((counters, 4), np.uint64)
    counter[:, 0] = (first + np.arange(counters)) & 0xFFFFFFFF
    counter[:, 1] = position & 0xFFFFFFFF
    counter[:, 2] = (position >> 32) & 0xFFFFFFFF
    counter[:, 3] = tag
    return philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).reshape(-1)


@dataclass
class Noise:
    """The noise of one step of one request; tests subclass it to inject coins and exponentials."""

    seed: int
    position: int

    def coin(self, row: int) -> float:
        """A uniform in [0, 1): 64 bits, of which a double keeps the first 53."""
        words = noise_words(self.seed, self.position, counter_tag(Purpose.ACCEPT, 0, row), 0, 1)
        return float((int(words[0]) << 32 | int(words[1])) >> 11) * 2.0**-53

    def exponentials(self, purpose: int, level: int, row: int, count: int) -> Floats:
        """Standard exponentials ``-log1p(-u)``, ``u = (word + 1/2) / 2^32``."""
        tag = counter_tag(purpose, level, row)
        words = noise_words(self.seed, self.position, tag, 0, -(-count // 4))[:count].astype(np.float64)
        return -np.log1p(-(words + 0.5) * 2.0**-32)


# --- distributions ----------------------------------------------------------------------------------------------------


@dataclass
class Distribution:
    """Probabilities of one row, and the scalars ``(scale, cutoff, logsumexp)`` that stand for them."""

    probs: Floats
    stats: tuple[float, float, float]


def row_is_valid(logits: Floats) -> bool:
    """No nan, no +inf, and at least one finite logit."""
    return bool(not np.isnan(logits).any() and not np.isposinf(logits).any() and np.isfinite(logits).any())


def largest_finite(logits: Floats) -> int:
    """What a row that is not valid emits: its largest finite logit, lowest id on ties; 0 if there is none."""
    return int(np.argmax(np.where(np.isfinite(logits), logits, -np.inf)))


def is_greedy(temperature: float) -> bool:
    """Temperature 0, or too small for float32 scalars."""
    return bool(np.float32(temperature) < np.float32(MIN_TEMPERATURE))


def distribution(logits: Floats, temperature: float) -> Distribution:
    """Softmax of a valid row at a temperature; the point mass on the largest logit at temperature 0."""
    if is_greedy(temperature):
        return Distribution(point_mass(len(logits), int(np.argmax(logits))), (np.inf, float(logits.max()), 0.0))
    scale = float(np.float32(1.0) / np.float32(temperature))
    top = logits.max()
    weights = np.exp(scale * (logits - top))
    return Distribution(weights / weights.sum(), (scale, -np.inf, float(scale * top + np.log(weights.sum()))))


def point_mass(vocab: int, token: int) -> Floats:
    """All probability on one token."""
    probs = np.zeros(vocab)
    probs[token] = 1.0
    return probs


def probs_from_stats(logits: Floats, stats: Sequence[float], token: int) -> Floats:
    """The law of a draft that came with its scalars: ``[logit >= cutoff] * exp(scale * logit - logsumexp)``."""
    scale, cutoff, logsumexp = (float(s) for s in stats)
    if np.isinf(scale):
        return point_mass(len(logits), token)
    with np.errstate(over="ignore", invalid="ignore"):
        probs: Floats = np.where(logits < cutoff, 0.0, np.exp(scale * logits - logsumexp))
    return probs


# --- draws, with margins ----------------------------------------------------------------------------------------------


def race(weights: Floats, slack: Floats, exponentials: Floats) -> tuple[int, float]:
    """``argmin E / w`` over the positive weights and its margin.

    ``slack`` is how much each weight moves under a relative error of one (a weight that is a difference of
    probabilities moves by their sum). The winner loses to entry i at the error where
    ``E_win / (w_win - e * slack_win) = E_i / (w_i + e * slack_i)``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        arrivals = np.where(weights > 0, exponentials / weights, np.inf)
        winner = int(np.argmin(arrivals))
        gap = exponentials * weights[winner] - exponentials[winner] * weights
        reach = exponentials[winner] * slack + exponentials * slack[winner]
        margins = np.where(reach > 0, gap / reach, np.inf)
    margins[winner] = np.inf
    return winner, float(margins.min()) if len(margins) else np.inf


def two_level_race(weights: Floats, slack: Floats, noise: Noise, purpose: int, row: int) -> tuple[int, float]:
    """A tile of ``TILE`` consecutive ids first, then an id inside it."""
    tiles = -(-len(weights) // TILE)
    padded, padded_slack = (np.pad(x, (0, tiles * TILE - len(x))).reshape(tiles, TILE) for x in (weights, slack))
    tile, tile_margin = race(padded.sum(1), padded_slack.sum(1), noise.exponentials(purpose, Level.TILE, row, tiles))
    token, token_margin = race(padded[tile], padded_slack[tile], noise.exponentials(purpose, Level.TOKEN, row, TILE))
    return tile * TILE + token, min(tile_margin, token_margin)


# --- operations -------------------------------------------------------------------------------------------------------


@dataclass
class Sampled:
    """One row of :func:`specdec_kernels.sample`."""

    token: int
    logprob: float
    stats: tuple[float, float, float]
    margin: float


def sample(logits: Floats, noise: Noise, row: int = 0, temperature: float = 1.0) -> Sampled:
    """Draw one token from a row; see :func:`specdec_kernels.sample`."""
    logits = np.asarray(logits, np.float64)
    if not row_is_valid(logits):
        return Sampled(largest_finite(logits), np.nan, (np.nan,) * 3, np.inf)
    law = distribution(logits, temperature)
    token, margin = two_level_race(law.probs, law.probs, noise, Purpose.DRAFT, row)
    with np.errstate(divide="ignore"):
        return Sampled(token, float(np.log(law.probs[token])), law.stats, margin)


@dataclass
class Verified:
    """One request of :func:`specdec_kernels.verify_chain`; ``tokens`` without padding."""

    tokens: list[int]
    num_accepted: int
    valid: bool
    margin: float = np.inf
    margins: list[float] = field(default_factory=list)


def verify_chain(
    target_logits: Floats,
    draft_tokens: Sequence[int],
    draft_logits: Floats | None,
    draft_stats: Floats | None,
    noise: Noise,
    temperature: float = 1.0,
) -> Verified:
    """Verify one request with the token rule; see :func:`specdec_kernels.verify_chain`.

    ``target_logits [K+1, V]``, ``draft_tokens`` without padding (K of them or fewer), ``draft_logits [K, V]``.
    """
    target_logits = np.asarray(target_logits, np.float64)
    greedy = is_greedy(temperature)
    margins: list[float] = []

    def stop(tokens: list[int], valid: bool) -> Verified:
        return Verified(tokens, len(tokens) - 1, valid, min(margins, default=np.inf), margins)

    def draw(weights: Floats, slack: Floats, row: int) -> int:
        token, margin = two_level_race(weights, slack, noise, Purpose.TARGET, row)
        margins.append(margin)
        return token

    accepted: list[int] = []
    for row, logits in enumerate(target_logits[: len(draft_tokens) + 1]):
        if not row_is_valid(logits):
            return stop([*accepted, largest_finite(logits)], False)
        target = distribution(logits, temperature).probs
        if row == len(draft_tokens):
            return stop([*accepted, draw(target, target, row)], True)
        token = int(draft_tokens[row])
        if greedy:
            draft: Floats | None = point_mass(len(logits), token)
        else:
            draft = _draft_probs(len(logits), token, draft_logits, draft_stats, row)
        if draft is None:
            return stop([*accepted, draw(target, target, row)], False)
        coin = noise.coin(row)
        scale = target[token] + coin * draft[token]
        margins.append(abs(target[token] - coin * draft[token]) / scale if scale > 0 else np.inf)
        if coin * draft[token] < target[token]:
            accepted.append(token)
            continue
        residual = np.fmax(target - draft, 0.0)  # nothing where the draft's probability is not a number
        if greedy or not residual.any():
            return stop([*accepted, draw(target, target, row)], True)
        return stop([*accepted, draw(residual, target + np.nan_to_num(draft), row)], True)
    raise AssertionError("unreachable: the bonus row returns")


def _draft_probs(vocab: int, token: int, logits: Floats | None, stats: Floats | None, row: int) -> Floats | None:
    """The law a draft token was drawn from, None where its row or its scalars are not usable."""
    if logits is None:
        return point_mass(vocab, token)
    draft_row = np.asarray(logits[row], np.float64)
    if stats is None:
        return distribution(draft_row, 1.0).probs if row_is_valid(draft_row) else None
    probs = probs_from_stats(draft_row, stats[row], token)
    return probs if np.isfinite(probs[token]) else None


# --- the exact law ----------------------------------------------------------------------------------------------------

Probs = Sequence[Fraction]
Law = dict[tuple[int, ...], Fraction]


def chain_law(
    target: Callable[[tuple[int, ...]], Probs],
    draft: Callable[[tuple[int, ...]], Probs],
    length: int,
    *,
    accept: Callable[[Fraction, Fraction], Fraction] = lambda p, q: min(Fraction(1), p / q),
    residual: Callable[[Fraction, Fraction], Fraction] = lambda p, q: max(Fraction(0), p - q),
    bonus_row: int = 0,
) -> Law:
    """The exact law of ``length + 1`` tokens when one step of the token rule is continued by target sampling.

    ``target`` and ``draft`` map a prefix to probabilities. The keywords exist to build wrong rules: a mutant changes
    one of them, and its law must differ from the target's.
    """
    law: Law = {}

    def add(prefix: tuple[int, ...], mass: Fraction) -> None:
        if mass == 0:
            return
        if len(prefix) == length + 1:
            law[prefix] = law.get(prefix, Fraction(0)) + mass
            return
        for token, prob in enumerate(target(prefix)):
            add((*prefix, token), mass * prob)

    def step(prefix: tuple[int, ...], mass: Fraction) -> None:
        if len(prefix) == length:
            for token, prob in enumerate(target(prefix[: len(prefix) - bonus_row])):
                add((*prefix, token), mass * prob)
            return
        p, q = target(prefix), draft(prefix)
        rest = [residual(a, b) for a, b in zip(p, q, strict=True)]
        total = sum(rest, Fraction(0))
        for token, drafted in enumerate(q):
            if drafted == 0:
                continue
            accepted = accept(p[token], drafted)
            step((*prefix, token), mass * drafted * accepted)
            for emitted, weight in enumerate(rest if total else p):
                add((*prefix, emitted), mass * drafted * (1 - accepted) * weight / (total or 1))

    step((), Fraction(1))
    return law


def target_law(target: Callable[[tuple[int, ...]], Probs], length: int) -> Law:
    """The law of ``length + 1`` tokens sampled from the target alone."""
    law: Law = {(): Fraction(1)}
    for _ in range(length + 1):
        law = {(*prefix, t): mass * p for prefix, mass in law.items() for t, p in enumerate(target(prefix)) if mass * p}
    return law


def total_variation(one: Law, other: Law) -> Fraction:
    """Half the sum of absolute differences."""
    keys = one.keys() | other.keys()
    return sum((abs(one.get(k, Fraction(0)) - other.get(k, Fraction(0))) for k in keys), Fraction(0)) / 2
