"""The exact distribution of a tree of drafts, enumerated with fractions. The keywords exist to build wrong rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from specdec_kernels.oracle.exact import Probs, SequenceDistribution, continued, ratio

Prefix = tuple[int, ...]


@dataclass
class _Tree:
    """The arguments of :func:`tree_distribution`, and its results so far."""

    target: Callable[[Prefix], Probs]
    draft: Callable[[Prefix], Probs]
    widths: Sequence[int]
    kind: str
    rule: str
    updated: bool
    merged: bool
    distribution: SequenceDistribution = field(default_factory=dict)
    expected: Fraction = Fraction(0)

    def accept(self, prefix: Prefix, weights: Probs, mass: Fraction) -> None:
        """A node was accepted: its recovered or bonus token, and what the target continues it with."""
        self.expected += mass * len(prefix)
        total = sum(weights, Fraction(0))
        for token, weight in enumerate(weights):
            continued(self.distribution, self.target, (*prefix, token), mass * weight / total, len(self.widths))

    def child_distribution(self, prefix: Prefix, earlier: Prefix) -> Probs:
        """The distribution of a node's next child; nothing where there is none."""
        q = self.draft(prefix)
        nothing = [Fraction(0)] * len(q)
        if len(prefix) == len(self.widths) or len(earlier) == self.widths[len(prefix)]:
            return nothing
        if self.kind == "iid":
            return q
        left = [Fraction(0) if v in earlier else x for v, x in enumerate(q)]
        if not any(left):
            return nothing
        if self.kind == "top":
            best = max(range(len(q)), key=lambda v: (left[v], -v))
            return _certain(best, len(q))
        return [x / sum(left) for x in left]

    def visit(self, prefix: Prefix, earlier: Prefix, left: Probs, path_prob: Fraction, mass: Fraction) -> Fraction:
        """A node whose children ``earlier`` were rejected; the mass with which it is rejected itself. Under the
        recursive rule a node that was visited is never rejected; under traversal a child is tested by what is below."""
        distribution = self.child_distribution(prefix, earlier)
        if not any(distribution):
            if path_prob:
                self.accept(prefix, left if any(left) else self.target(prefix), mass * path_prob)
            return mass * (1 - path_prob)
        rejected = Fraction(0)
        for token, drafted in enumerate(distribution):
            if not drafted:
                continue
            if self.merged and token in earlier:
                rejected += self.visit(prefix, (*earlier, token), left, path_prob, mass * drafted)
                continue
            # Walking accepts the child that the target draws, whatever it was drawn from.
            tested = _certain(token, len(left)) if self.rule == "walk" else distribution
            below = min(Fraction(1), path_prob * left[token] / tested[token])
            failed = self.failed((*prefix, token), below, mass * drafted)
            if failed:
                new, after = self.without(left, path_prob, tested)
                rejected += self.visit(prefix, (*earlier, token), new, after, failed)
        return rejected

    def failed(self, child: Prefix, below: Fraction, mass: Fraction) -> Fraction:
        """The mass with which a child is rejected that has the chance ``below``."""
        if self.rule == "traversal":
            return self.visit(child, (), self.target(child), below, mass)
        self.visit(child, (), self.target(child), Fraction(1), mass * below)
        return mass * (1 - below)

    def without(self, left: Probs, path_prob: Fraction, tested: Probs) -> tuple[Probs, Fraction]:
        """What a rejected child leaves, and the node's chance without it."""
        rest = [max(Fraction(0), path_prob * r - q) for r, q in zip(left, tested, strict=True)]
        total = sum(rest, Fraction(0))
        after = ratio(total, total + 1 - path_prob)
        if not self.updated:
            return left, after
        return [r / total for r in rest] if total else rest, after


def _certain(token: int, vocab: int) -> Probs:
    return [Fraction(int(v == token)) for v in range(vocab)]


def tree_distribution(
    target: Callable[[Prefix], Probs],
    draft: Callable[[Prefix], Probs],
    widths: Sequence[int],
    kind: str,
    rule: str,
    *,
    updated: bool = True,
    merged: bool = False,
) -> tuple[SequenceDistribution, Fraction]:
    """The exact distribution of ``len(widths) + 1`` tokens when one step of a tree rule (docs/algorithms.md, 3 to 5) is
    continued by target sampling, and the expected number of accepted drafts. ``widths[d]``: children of every node of
    depth d.

    ``kind``: "iid", "without_replacement", or "top" (the most probable tokens, each a point mass). ``rule``: "walk",
    "recursive" or "traversal". The keywords build wrong rules: every sibling tested against the target as it was; equal
    siblings tested once.

    The children of a node are drawn as they are visited: nothing that comes before depends on those that come after.
    """
    tree = _Tree(target, draft, widths, kind, rule, updated, merged)
    tree.visit((), (), target(()), Fraction(1), Fraction(1))
    return tree.distribution, tree.expected
