"""Exact distributions of the rules, enumerated with fractions. The keywords exist to build wrong rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import product

Probs = Sequence[Fraction]
SequenceDistribution = dict[tuple[int, ...], Fraction]


def chain_distribution(
    target: Callable[[tuple[int, ...]], Probs],
    draft: Callable[[tuple[int, ...]], Probs],
    length: int,
    *,
    accept: Callable[[Fraction, Fraction], Fraction] = lambda p, q: min(Fraction(1), p / q),
    residual: Callable[[Fraction, Fraction], Fraction] = lambda p, q: max(Fraction(0), p - q),
    bonus_row: int = 0,
) -> SequenceDistribution:
    """The exact distribution of ``length + 1`` tokens when one step of the token rule is continued by target sampling.

    ``target`` and ``draft`` map a prefix to probabilities. The keywords exist to build wrong rules: a mutant changes
    one of them, and its distribution must differ from the target's.
    """
    distribution: SequenceDistribution = {}

    def step(prefix: tuple[int, ...], mass: Fraction) -> None:
        if len(prefix) == length:
            for token, prob in enumerate(target(prefix[: len(prefix) - bonus_row])):
                continued(distribution, target, (*prefix, token), mass * prob, length)
            return
        p, q = target(prefix), draft(prefix)
        rest = [residual(a, b) for a, b in zip(p, q, strict=True)]
        total = sum(rest, Fraction(0))
        for token, drafted in enumerate(q):
            if drafted == 0:
                continue
            accepted = accept(p[token], drafted)
            step((*prefix, token), mass * drafted * accepted)
            for recovered, weight in enumerate(rest if total else p):
                share = mass * drafted * (1 - accepted) * weight / (total or 1)
                continued(distribution, target, (*prefix, recovered), share, length)

    step((), Fraction(1))
    return distribution


def block_distribution(
    target: Callable[[tuple[int, ...]], Probs],
    draft: Callable[[tuple[int, ...]], Probs],
    length: int,
    *,
    cap: Callable[[Fraction], Fraction] = lambda a: min(Fraction(1), a),
    scaled_residual: bool = True,
    early_stop: bool = False,
) -> tuple[SequenceDistribution, Fraction]:
    """As :func:`chain_distribution` for the block rule (docs/algorithms.md, 2), and how many drafts it accepts."""
    distribution: SequenceDistribution = {}
    expected = Fraction(0)
    for drafted in product(range(len(target(()))), repeat=length):
        p = [target(drafted[:i]) for i in range(length + 1)]
        q = [draft(drafted[:i]) for i in range(length)]
        mass = Fraction(1)
        for i, token in enumerate(drafted):
            mass *= q[i][token]
        if not mass:
            continue
        path_prob = [Fraction(1)]
        for i, token in enumerate(drafted):
            path_prob.append(cap(path_prob[-1] * p[i][token] / q[i][token]))
        rests = [
            [max(Fraction(0), path_prob[i] * a - b) for a, b in zip(p[i], q[i], strict=True)] for i in range(length)
        ]
        keep = [ratio(left, left + 1 - a) for a, left in zip(path_prob, map(_total, rests), strict=False)] + [
            path_prob[length]
        ]
        for tau in range(length + 1):
            if early_stop:  # a wrong rule: nothing behind the first failure is visited
                stays = _product(keep[1 : tau + 1]) * (1 - keep[tau + 1] if tau < length else 1)
            else:
                stays = (keep[tau] if tau else Fraction(1)) * _product(1 - h for h in keep[tau + 1 :])
            expected += mass * stays * tau
            weights = p[length] if tau == length else rests[tau]
            if tau < length and not scaled_residual:
                weights = [max(Fraction(0), a - b) for a, b in zip(p[tau], q[tau], strict=True)]
            total = sum(weights)
            for last, weight in enumerate(weights if total else p[tau]):
                continued(distribution, target, (*drafted[:tau], last), mass * stays * weight / (total or 1), length)
    return distribution, expected


def continued(
    distribution: SequenceDistribution,
    target: Callable[[tuple[int, ...]], Probs],
    prefix: tuple[int, ...],
    mass: Fraction,
    length: int,
) -> None:
    """Add the mass of a prefix that target sampling extends to ``length + 1`` tokens."""
    if mass == 0:
        return
    if len(prefix) == length + 1:
        distribution[prefix] = distribution.get(prefix, Fraction(0)) + mass
        return
    for token, prob in enumerate(target(prefix)):
        continued(distribution, target, (*prefix, token), mass * prob, length)


def ratio(numerator: Fraction, denominator: Fraction) -> Fraction:
    """0/0 is 1."""
    return numerator / denominator if denominator else Fraction(1)


def _total(values: Iterable[Fraction]) -> Fraction:
    return sum(values, Fraction(0))


def _product(factors: Iterable[Fraction]) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
    return result


def target_distribution(target: Callable[[tuple[int, ...]], Probs], length: int) -> SequenceDistribution:
    """The distribution of ``length + 1`` tokens sampled from the target alone."""
    distribution: SequenceDistribution = {(): Fraction(1)}
    for _ in range(length + 1):
        distribution = {
            (*prefix, t): mass * p
            for prefix, mass in distribution.items()
            for t, p in enumerate(target(prefix))
            if mass * p
        }
    return distribution


def total_variation(one: SequenceDistribution, other: SequenceDistribution) -> Fraction:
    """Half the sum of absolute differences."""
    keys = one.keys() | other.keys()
    return sum((abs(one.get(k, Fraction(0)) - other.get(k, Fraction(0))) for k in keys), Fraction(0)) / 2


def typical_distribution(
    target: Callable[[tuple[int, ...]], Sequence[float]],
    draft: Callable[[tuple[int, ...]], Sequence[float]],
    length: int,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> dict[tuple[int, ...], float]:
    """The distribution of ``length + 1`` tokens under Medusa's typical acceptance of a chain, not the target's:
    in floats, since its threshold is an exponential of an entropy."""
    distribution: dict[tuple[int, ...], float] = {}

    def step(prefix: tuple[int, ...], mass: float) -> None:
        p = target(prefix)
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        rejected = 0.0
        for token, drafted in enumerate(draft(prefix) if len(prefix) < length else ()):
            if p[token] > min(epsilon, delta * math.exp(-entropy)):
                step((*prefix, token), mass * drafted)
            else:
                rejected += mass * drafted
        extend(prefix, mass if len(prefix) == length else rejected)

    def extend(prefix: tuple[int, ...], mass: float) -> None:
        for token, prob in enumerate(target(prefix)):
            if mass * prob == 0:
                continue
            if len(prefix) == length:
                distribution[(*prefix, token)] = distribution.get((*prefix, token), 0.0) + mass * prob
            else:
                extend((*prefix, token), mass * prob)

    step((), 1.0)
    return distribution
