"""Distributions that can be counted, and statistics of those that are drawn."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from specdec_kernels import oracle
from specdec_kernels.contract import Level, Purpose, counter_tag
from specdec_kernels.ops import noise_words

F = Fraction
RACE_CELLS = 4
# Two tokens with probabilities in quarters, so that one race number in each cell of a grid of quarters, and one uniform
# in each cell of a grid of twelfths, are the distribution when counted. Rows by prefix. A third token, which every
# filter takes away, is in the rows of filtered distributions: filters are part of the distribution, so they must not
# change anything here.
QUARTERS = {(): (1, 3), (0,): (3, 1), (1,): (1, 3), (0, 0): (1, 3), (0, 1): (2, 2), (1, 0): (3, 1), (1, 1): (1, 3)}
# For two point masses under the block rule, whose chances then are 1/2, 1/3 and 1/4.
TWELFTHS = {**{k: (3 * a, 3 * b) for k, (a, b) in QUARTERS.items()}, (): (6, 6), (0,): (4, 8), (1,): (8, 4)}
# Where one token is followed for certain: no race behind it has to be tried.
ENDING = {**QUARTERS, (0,): (4, 0), (1,): (0, 4)}
#: Probability of the third token, in quarters, against 4 of the others together.
FILTERED = 0.4


def probs_of(weights):
    total = sum(weights)
    return [F(w, total) for w in weights]


def logits_of(weights, filtered):
    total = sum(weights)
    third = [FILTERED / 4] if filtered else []
    return torch.tensor([*(w / total for w in weights), *third], dtype=torch.float64).log().float()


def uniforms(seeds, purpose, position, row):
    """Uniforms, or for a race between the first two tokens the number below whose probability the first one wins."""
    level = Level.TILE if purpose == Purpose.ACCEPT else Level.TOKEN
    words = noise_words(seeds, torch.full_like(seeds, position), counter_tag(purpose, level, row), backend="cpu")
    words = words[:, :2].double().numpy()
    if purpose == Purpose.ACCEPT:
        return (words[:, 0] + words[:, 1] * 2.0**-32) * 2.0**-32
    first, second = -np.log1p(-(words.T + 0.5) * 2.0**-32)
    return first / (first + second)


def distance_from_target(verified, masses, weights, length):
    """How far the distribution of texts of so many tokens is from the target's, whose probabilities behind a prefix are
    those of ``weights``: the texts that were verified (padded with -1), with a mass each, continued by the target."""
    distribution: oracle.SequenceDistribution = {}

    def add(prefix, mass):
        if mass and len(prefix) == length:
            distribution[prefix] = distribution.get(prefix, F(0)) + mass
        elif mass:
            for token, prob in enumerate(probs_of(weights[prefix])):
                add((*prefix, token), mass * prob)

    texts = (tuple(token for token in row if token >= 0) for row in verified.tolist())
    for (text, mass), times in Counter(zip(texts, masses, strict=True)).items():
        add(text, mass * times)
    return oracle.total_variation(
        distribution, oracle.target_distribution(lambda prefix: probs_of(weights[prefix]), length - 1)
    )


def seeds_by_cell(streams):
    """For each combination of cells the first seed whose numbers lie well inside them. ``streams``: a tuple (purposes,
    positions and rows of uniforms; cells) each. Uniforms of one stream have to share a cell, because only one of them
    will matter."""
    found = {}
    for first in range(0, 1 << 22, 1 << 14):
        seeds = torch.arange(first, first + (1 << 14))
        cells, inside = [], True
        for numbers, count in streams:
            scaled = [uniforms(seeds, *number) * count for number in numbers]
            own = [np.floor(u).astype(int) for u in scaled]
            for u, cell in zip(scaled, own, strict=True):
                inside = inside & (np.abs(u - cell - 0.5) < 0.45) & (cell == own[0])
            cells.append(own[0])
        for index in np.flatnonzero(inside).tolist():
            found.setdefault(tuple(int(cell[index]) for cell in cells), first + index)
        if len(found) == np.prod([count for _, count in streams]):
            return [found[cell] for cell in sorted(found)]
    raise AssertionError("too few seeds")


def g_test(counts, probs):
    """G statistic against probabilities, cells with few expected counts pooled, and its degrees of freedom."""
    expected = counts.sum() * probs
    small = expected < 8
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    seen = counts > 0
    return 2 * float((counts[seen] * np.log(counts[seen] / expected[seen])).sum()), int((expected > 0).sum()) - 1


def limit(freedom):
    """Where a chi-square is exceeded less than once in ten million times (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 5.4 * (2 / (9 * freedom)) ** 0.5) ** 3


def table(vocab: int, seed: int, zeros: bool = False):
    """A conditional distribution: any prefix to probabilities, multiples of 1/12."""

    @cache
    def distribution(prefix):
        rng = np.random.default_rng([seed, *prefix])
        cuts = rng.integers(0, 13, vocab - 1) if zeros else rng.integers(1, 12, vocab - 1)
        edges = [0, *sorted(int(c) for c in cuts), 12]
        return [F(b - a, 12) for a, b in pairwise(edges)]

    return distribution


def point_mass(vocab: int, seed: int):
    @cache
    def distribution(prefix):
        token = np.random.default_rng([seed, *prefix]).integers(vocab)
        return [F(int(v == token)) for v in range(vocab)]

    return distribution


def disjoint(prefix):
    return [F(1, 2), F(1, 2), F(0), F(0)]


def disjoint_draft(prefix):
    return [F(0), F(0), F(1, 3), F(2, 3)]


PAIRS = {
    "random": lambda: (table(3, 1), table(3, 2), 3),
    "zeros": lambda: (table(4, 3, True), table(4, 4, True), 2),
    "equal": lambda: (table(3, 5), table(3, 5), 3),
    "disjoint": lambda: (disjoint, disjoint_draft, 3),
    "point mass": lambda: (table(3, 6), point_mass(3, 7), 4),
    "five": lambda: (table(2, 8), table(2, 9), 5),
}
