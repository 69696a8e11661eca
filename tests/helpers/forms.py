"""What ``make test`` runs of what ``make test-all`` does: the same cases in fewer forms, so that it takes minutes."""

from __future__ import annotations

import os
from itertools import combinations, product
from typing import Any, TypeVar

T = TypeVar("T")

EVERYTHING = bool(os.environ.get("SPECDEC_TEST_EVERYTHING"))


def some(few: T, everything: T) -> T:
    """The number that ``make test`` takes, or that of ``make test-all``."""
    return everything if EVERYTHING else few


def pairwise(*axes: Any) -> list[tuple[Any, ...]]:
    """Combinations of values, one of each axis, in which every two values of different axes meet: as few as a greedy
    search finds. ``make test-all`` takes all there are."""
    everything = list(product(*map(range, map(len, axes))))
    chosen = everything if EVERYTHING else []
    left = {pair for each in everything for pair in _pairs(each)}
    while left and not EVERYTHING:
        chosen.append(max(everything, key=lambda each: len(left.intersection(_pairs(each)))))
        left.difference_update(_pairs(chosen[-1]))
    return [tuple(axis[index] for axis, index in zip(axes, each, strict=True)) for each in chosen]


def _pairs(indices: tuple[int, ...]) -> list[Any]:
    """Every two of them, with their axes."""
    return list(combinations(enumerate(indices), 2))
