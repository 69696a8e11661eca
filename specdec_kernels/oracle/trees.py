"""``sample_children`` and ``verify_tree`` of one request, with every decision's margin (docs/algorithms.md, 3 to 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec_kernels.contract import LEAST_DIFFERENCE, NOTHING_LEFT, Children, Purpose, TreeRule
from specdec_kernels.oracle.distributions import (
    Processing,
    Sampling,
    distribution,
    flat_race,
    largest_finite,
    row_is_valid,
    rows_of_target,
    two_level_race,
)
from specdec_kernels.oracle.noise import Floats, Noise
from specdec_kernels.oracle.step import PLAIN, UNPROCESSED, Step, Verified


@dataclass
class Drawn:
    """One row of :func:`specdec_kernels.sample_children`; ``tokens`` without padding."""

    tokens: list[int]
    logprobs: list[float]
    stats: tuple[float, float, float]
    margin: float = np.inf


def sample_children(
    logits: Floats,
    count: int,
    method: Children,
    noise: Noise,
    row: int = 0,
    sampling: Sampling = PLAIN,
    processing: Processing = UNPROCESSED,
) -> Drawn:
    """Choose the children of one node; see :func:`specdec_kernels.sample_children`."""
    logits = processing.apply(logits, 0, ())
    if not row_is_valid(logits):
        return Drawn([largest_finite(logits)], [np.nan], (np.nan,) * 3)
    dist = distribution(logits, sampling)
    drawn = Drawn([], [], dist.stats, dist.margin)
    scale, cutoff, logsumexp = dist.stats
    greedy = np.isinf(scale)
    weights = dist.probs.copy()
    if method == Children.RACE:
        weights[weights < NOTHING_LEFT] = 0.0
    kept = weights > 0 if greedy else np.isfinite(logits) & (logits >= cutoff)
    for child in range(count):
        if not kept.any() if method == Children.TOP else weights.sum() < NOTHING_LEFT:
            break
        if method == Children.TOP:
            token, margin = int(np.argmax(np.where(kept, logits, -np.inf))), np.inf
        elif method == Children.RACE:
            token, margin = flat_race(weights, weights, noise, row)
        else:
            token, margin = two_level_race(weights, weights, noise, Purpose.DRAFT, row + child)
        drawn.tokens.append(token)
        drawn.logprobs.append(0.0 if greedy else float(scale * logits[token] - logsumexp))
        drawn.margin = min(drawn.margin, margin)
        if method != Children.IID:
            weights[token], kept[token] = 0.0, False
    return drawn


@dataclass
class Tree(Step):
    """A tree of drafts: row n is the target's after the path to node n, and what node n's children were drawn from."""

    parents: Sequence[int] = ()
    replacement: bool = False
    valid: bool = True
    children: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.children = [[c for c, up in enumerate(self.parents) if up == node] for node in range(len(self.parents))]

    def path(self, node: int) -> list[int]:
        """The nodes from the root to ``node``."""
        return [0] if node == 0 else [*self.path(self.parents[node]), node]

    def drafted(self, row: int) -> list[int]:
        """The drafts on the path to a node."""
        return [int(self.tokens[node]) for node in self.path(row)[1:]]

    def child_distributions(self, node: int) -> list[Floats] | None:
        """What each child of a node was drawn from, given its earlier siblings; None where one is not usable."""
        dists: list[Floats] = []
        used = np.zeros(self.target_logits.shape[1], bool)
        for child in self.children[node]:
            token = int(self.tokens[child])
            dist = self.draft(node, token)
            if dist is None:
                return None
            if not self.replacement and used.any() and not self.certain(node):
                dist = np.where(used, 0.0, dist)
                dist = dist / dist.sum() if dist.sum() >= NOTHING_LEFT else np.zeros_like(dist)
            dists.append(dist)
            used[token] = True
        return dists

    def stop(self, node: int, last: int) -> Verified:
        """The drafts up to ``node`` are accepted; ``last`` is the recovered or bonus token."""
        rows = self.path(node)
        result = self.scored([*self.drafted(node), last], rows, len(rows) - 1, self.valid)
        result.nodes = rows
        return result

    def stop_unusable(self, node: int) -> Verified:
        """As :meth:`stop`, where the target's row is not usable."""
        self.valid = False
        return self.stop(node, largest_finite(self.logits(node)))


@dataclass
class Residual:
    """What a node's recovered or bonus token is drawn from once some of its children were rejected.

    ``probs`` are normalised, ``weights`` are in proportion to them and better known; ``path_prob`` is the chance that
    the node is accepted, 1 under the recursive rule. ``*_error`` is how far each moves under a relative error of one in
    all probabilities, to first order.
    """

    probs: Floats
    probs_error: Floats
    weights: Floats
    weights_error: Floats
    path_prob: float
    path_prob_error: float

    @classmethod
    def of(cls, target: Floats, path_prob: float, path_prob_error: float) -> Residual:
        """Nothing was rejected yet."""
        return cls(target, target, target, target, path_prob, path_prob_error)

    def without(self, draft: Floats, draft_error: Floats) -> Residual:
        """``(path_prob * probs - draft)+``, normalised, and the chance of the node without this child."""
        weights = np.fmax(self.path_prob * self.probs - draft, 0.0)
        error = self.path_prob * self.probs_error + self.path_prob_error * self.probs + draft_error
        total = float(weights.sum())
        if total == 0:  # a path probability of 1 stays: then it is rounding alone that brought us here
            path_prob = self.path_prob if self.path_prob == 1 else 0.0
            return Residual(weights, weights, weights, weights, path_prob, 0.0)
        total_error = float(error[weights > 0].sum())
        denominator = total + 1 - self.path_prob
        moved = ((1 - self.path_prob) * total_error + total * self.path_prob_error) / denominator**2
        dist = weights / total
        probs_error = np.where(weights > 0, error / total + dist * total_error / total, 0.0)
        return Residual(dist, probs_error, weights, error, total / denominator, moved)


def verify_tree(
    target_logits: Floats,
    draft_tokens: Sequence[int],
    parents: Sequence[int],
    draft_logits: Floats | None,
    draft_stats: Floats | None,
    noise: Noise,
    sampling: Sampling = PLAIN,
    processing: Processing = UNPROCESSED,
    rule: TreeRule = TreeRule.WALK,
    replacement: bool = False,
    draft_temperature: float = 1.0,
    draft_to_target: Sequence[int] | None = None,
) -> Verified:
    """Verify one request; see :func:`specdec_kernels.verify_tree`.

    ``target_logits [N, V]``, ``draft_tokens`` and ``parents`` without padding, the root's among them.
    """
    logits = np.asarray(target_logits, np.float64)
    draft_logits = rows_of_target(draft_logits, draft_to_target, logits.shape[1])
    tree = Tree(
        logits, draft_tokens, draft_logits, draft_stats, noise, sampling, processing, parents=parents,
        replacement=replacement, draft_temperature=draft_temperature,
    )  # fmt: skip
    if rule in (TreeRule.WALK, TreeRule.COUPLED):
        result = _walk(tree, rule)
    elif rule == TreeRule.RECURSIVE:
        result = _recursive(tree)
    else:
        found = _traverse(tree, 0, 1.0, 0.0)
        assert found is not None, "the root is always accepted"
        result = found
    result.num_proposed = len(parents) - 1
    return result


def _walk(tree: Tree, rule: TreeRule) -> Verified:
    """What the target draws, as far as it is among the children."""
    node = 0
    while True:
        dist = tree.read(node)
        if dist is None:
            return tree.stop_unusable(node)
        if rule == TreeRule.COUPLED:
            drawn, margin = flat_race(dist.probs, dist.probs, tree.noise, len(tree.path(node)) - 1)
            tree.margins.append(margin)
        else:
            drawn = tree.draw(dist.probs, dist.probs, node)
        following = [child for child in tree.children[node] if tree.tokens[child] == drawn]
        if not following:
            return tree.stop(node, drawn)
        node = following[0]


def _siblings(tree: Tree, node: int) -> list[tuple[int, Floats, Floats]]:
    """(child, its distribution, the error of that); nothing, and not valid, where a distribution is not usable."""
    dists = tree.child_distributions(node)
    if dists is None:
        tree.valid = False
        return []
    # What earlier siblings leave may be known as one minus what they took, down to LEAST_DIFFERENCE.
    errors = [1.0, *[1.0 if tree.replacement else 1 + 1 / LEAST_DIFFERENCE] * len(dists)]
    return [(child, dist, dist * error) for child, dist, error in zip(tree.children[node], dists, errors, strict=False)]


def _recursive(tree: Tree) -> Verified:
    """Top-down: each child by what its rejected siblings left."""
    node = 0
    while True:
        dist = tree.read(node)
        if dist is None:
            return tree.stop_unusable(node)
        left, accepted = Residual.of(dist.probs, 1.0, 0.0), None
        for child, draft, error in _siblings(tree, node):
            token, uniform = tree.tokens[child], tree.noise.uniform(child - 1)
            gap, moved = left.probs[token] - uniform * draft[token], left.probs_error[token] + uniform * error[token]
            tree.margins.append(abs(gap) / moved if moved > 0 else np.inf)
            if gap > 0:
                accepted = child
                break
            left = left.without(draft, error)
        if accepted is None:
            return tree.stop(node, _last_token(tree, node, dist.probs, left))
        node = accepted


def _last_token(tree: Tree, node: int, target: Floats, left: Residual) -> int:
    """The recovered or bonus token: drawn from what is left, from the target where nothing is."""
    if tree.greedy or not left.weights.any():
        return tree.draw(target, target, node)
    return tree.draw(left.weights, left.weights_error, node)


def _traverse(tree: Tree, node: int, path_prob: float, path_prob_error: float) -> Verified | None:
    """Bottom-up (arXiv:2505.12398): the children one after the other, then the node itself; None rejects it."""
    if path_prob == 0:  # nothing below it can be accepted, and nothing is read
        return None
    dist = tree.read(node)
    left = None
    if dist is None:
        tree.valid = False
    else:
        left = Residual.of(dist.probs, path_prob, path_prob_error)
        for child, draft, error in _siblings(tree, node):
            token = tree.tokens[child]
            # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
            below, below_error = 0.0, 0.0
            if left.probs[token] > 0:
                with np.errstate(divide="ignore"):
                    below = left.path_prob * left.probs[token] / draft[token]
                if below < 1:
                    below_error = below * (
                        left.path_prob_error / left.path_prob + left.probs_error[token] / left.probs[token]
                    )
                    below_error += below * error[token] / draft[token]
                below = min(1.0, below)
            found = _traverse(tree, child, below, below_error)
            if found is not None:
                return found
            left = left.without(draft, error)
        path_prob, path_prob_error = left.path_prob, left.path_prob_error
    if node > 0 and not tree.passes(node - 1, path_prob, path_prob_error):
        return None
    if dist is None or left is None:
        return tree.stop_unusable(node)
    return tree.stop(node, _last_token(tree, node, dist.probs, left))
