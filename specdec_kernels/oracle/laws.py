"""Exact laws of the rules, enumerated with fractions. The keywords exist to build wrong rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import product

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

    def step(prefix: tuple[int, ...], mass: Fraction) -> None:
        if len(prefix) == length:
            for token, prob in enumerate(target(prefix[: len(prefix) - bonus_row])):
                _continue(law, target, (*prefix, token), mass * prob, length)
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
                emitting = mass * drafted * (1 - accepted) * weight / (total or 1)
                _continue(law, target, (*prefix, emitted), emitting, length)

    step((), Fraction(1))
    return law


def block_law(
    target: Callable[[tuple[int, ...]], Probs],
    draft: Callable[[tuple[int, ...]], Probs],
    length: int,
    *,
    cap: Callable[[Fraction], Fraction] = lambda a: min(Fraction(1), a),
    scaled_residual: bool = True,
    early_stop: bool = False,
) -> tuple[Law, Fraction]:
    """As :func:`chain_law` for the block rule (algorithms.md, 2), and the expected number of accepted drafts."""
    law: Law = {}
    expected = Fraction(0)
    for drafted in product(range(len(target(()))), repeat=length):
        p = [target(drafted[:i]) for i in range(length + 1)]
        q = [draft(drafted[:i]) for i in range(length)]
        mass = Fraction(1)
        for i, token in enumerate(drafted):
            mass *= q[i][token]
        if not mass:
            continue
        reach = [Fraction(1)]
        for i, token in enumerate(drafted):
            reach.append(cap(reach[-1] * p[i][token] / q[i][token]))
        rests = [[max(Fraction(0), reach[i] * a - b) for a, b in zip(p[i], q[i], strict=True)] for i in range(length)]
        keep = [_ratio(left, left + 1 - a) for a, left in zip(reach, map(_total, rests), strict=False)] + [
            reach[length]
        ]
        for tau in range(length + 1):
            if early_stop:  # a wrong rule: the first failure ends the look
                stays = _product(keep[1 : tau + 1]) * (1 - keep[tau + 1] if tau < length else 1)
            else:
                stays = (keep[tau] if tau else Fraction(1)) * _product(1 - h for h in keep[tau + 1 :])
            expected += mass * stays * tau
            weights = p[length] if tau == length else rests[tau]
            if tau < length and not scaled_residual:
                weights = [max(Fraction(0), a - b) for a, b in zip(p[tau], q[tau], strict=True)]
            total = sum(weights)
            for emitted, weight in enumerate(weights if total else p[tau]):
                _continue(law, target, (*drafted[:tau], emitted), mass * stays * weight / (total or 1), length)
    return law, expected


def tree_law(
    target: Callable[[tuple[int, ...]], Probs],
    draft: Callable[[tuple[int, ...]], Probs],
    widths: Sequence[int],
    kind: str,
    rule: str,
    *,
    updated: bool = True,
    merged: bool = False,
) -> tuple[Law, Fraction]:
    """As :func:`block_law` for trees, ``widths[d]`` children for every node of depth d (algorithms.md, 3 to 5).

    ``kind``: "iid", "without_replacement", or "top" (the most probable tokens, each a point mass). ``rule``: "walk",
    "recursive" or "traversal". The keywords build wrong rules: every sibling tested against the target as it was; equal
    siblings tested once.

    The children of a node are drawn as they are come to: nothing that comes before depends on those that come after.
    """
    law: Law = {}
    length = len(widths)
    expected = Fraction(0)

    def accept(prefix: tuple[int, ...], weights: Probs, mass: Fraction) -> None:
        """A node was accepted: emit."""
        nonlocal expected
        expected += mass * len(prefix)
        total = sum(weights, Fraction(0))
        for token, weight in enumerate(weights):
            _continue(law, target, (*prefix, token), mass * weight / total, length)

    def child_law(prefix: tuple[int, ...], earlier: tuple[int, ...]) -> Probs:
        """The law of a node's next child; nothing where there is none."""
        q = draft(prefix)
        nothing = [Fraction(0)] * len(q)
        if len(prefix) == length or len(earlier) == widths[len(prefix)]:
            return nothing
        if kind == "iid":
            return q
        left = [Fraction(0) if v in earlier else x for v, x in enumerate(q)]
        if not any(left):
            return nothing
        if kind == "top":
            best = max(range(len(q)), key=lambda v: (left[v], -v))
            return [Fraction(int(v == best)) for v in range(len(q))]
        return [x / sum(left) for x in left]

    def visit(
        prefix: tuple[int, ...], earlier: tuple[int, ...], left: Probs, reach: Fraction, mass: Fraction
    ) -> Fraction:
        """A node whose children ``earlier`` were rejected; the mass with which it is rejected itself. Under the recursive
        rule a node that was reached is never rejected; under traversal a child is tested by what is below it."""
        law_of_child = child_law(prefix, earlier)
        if not any(law_of_child):
            if reach:
                accept(prefix, left if any(left) else target(prefix), mass * reach)
            return mass * (1 - reach)
        rejected = Fraction(0)
        for token, drafted in enumerate(law_of_child):
            if not drafted:
                continue
            if merged and token in earlier:
                rejected += visit(prefix, (*earlier, token), left, reach, mass * drafted)
                continue
            # A point mass is what it is to traversal; walking accepts the child that the target draws.
            certain = rule == "walk" or kind == "top"
            test_law = [Fraction(int(v == token)) for v in range(len(left))] if certain else law_of_child
            below = min(Fraction(1), reach * left[token] / test_law[token])
            if rule == "traversal":
                failed = visit((*prefix, token), (), target((*prefix, token)), below, mass * drafted)
            else:
                visit((*prefix, token), (), target((*prefix, token)), Fraction(1), mass * drafted * below)
                failed = mass * drafted * (1 - below)
            rest = [max(Fraction(0), reach * r - q) for r, q in zip(left, test_law, strict=True)]
            total = sum(rest, Fraction(0))
            after = _ratio(total, total + 1 - reach)
            new = ([r / total for r in rest] if total else rest) if updated else left
            if failed:
                rejected += visit(prefix, (*earlier, token), new, after, failed)
        return rejected

    visit((), (), target(()), Fraction(1), Fraction(1))
    return law, expected


def _continue(
    law: Law, target: Callable[[tuple[int, ...]], Probs], prefix: tuple[int, ...], mass: Fraction, length: int
) -> None:
    """Add the mass of a prefix that target sampling extends to ``length + 1`` tokens."""
    if mass == 0:
        return
    if len(prefix) == length + 1:
        law[prefix] = law.get(prefix, Fraction(0)) + mass
        return
    for token, prob in enumerate(target(prefix)):
        _continue(law, target, (*prefix, token), mass * prob, length)


def _ratio(numerator: Fraction, denominator: Fraction) -> Fraction:
    """0/0 is 1."""
    return numerator / denominator if denominator else Fraction(1)


def _total(values: Iterable[Fraction]) -> Fraction:
    return sum(values, Fraction(0))


def _product(factors: Iterable[Fraction]) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
    return result


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
