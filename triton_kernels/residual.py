"""What rejected drafts leave of a target's distribution in one row: its mass, and draws from it. A chain's row is that
of a tree's node with one child."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.contract import Purpose
from specdec_kernels.triton_kernels.arguments import REPLACEMENT
from specdec_kernels.triton_kernels.distribution import (
    draw_from_row,
    draw_inside,
    first_arrival,
    race_tag,
    tile_weights,
)
from specdec_kernels.triton_kernels.noise import exponentials
from specdec_kernels.triton_kernels.request import OWN_FACTOR, STATE, load_draft_logits, next_child
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    TILE,
    VISITED,
    block_ids,
    first_of_groups,
    grouped_tiles,
    ids_in,
    ids_of,
    in_tiles,
    load_logits,
    probs,
    slice_of,
    store_tiles,
    token_of,
)

TARGET = tl.constexpr(int(Purpose.TARGET))


class Rejected(NamedTuple):
    """The siblings that were rejected: the children of a node up to ``last``. Rejecting them one after the other
    leaves, up to a factor, (target - draft / factor)+ with one number ``factor``; but siblings drawn without
    replacement were not drawn from what was rejected before them, so a rejected token has a factor of its own."""

    tree: Any
    last: Any
    factor: Any
    states: Any
    """Pointer to those of the nodes, which have their factors."""


class Drawn(NamedTuple):
    """Siblings that were drawn without replacement."""

    tokens: Any
    """Pointer to the first."""
    count: Any


@triton.jit
def without_children(weights, ids, tree, node, last):
    """Weights of ``ids``, 0 for the tokens of the children of ``node`` up to ``last``."""
    child = next_child(tree, node, node, None)
    while child <= last:
        weights = tl.where(ids == token_of(tree, child), 0.0, weights)
        child = next_child(tree, node, child, None)
    return weights


@triton.jit
def residuals(rows, drafts, i, target, draft, rejected, ids):
    """What is left of ``ids`` in row i: (target - draft)+, but for rejected siblings. Without a ``draft``, all but what
    was drawn before."""
    weights = probs(load_logits(rows, i, ids), target)
    if draft is None:
        for index in range(0, rejected.count):
            weights = tl.where(ids == tl.load(rejected.tokens + index), 0.0, weights)
    elif draft.argmax >= 0:
        if rejected is None:
            weights = tl.where(ids == draft.argmax, 0.0, weights)
        else:
            weights = without_children(weights, ids, rejected.tree, i, rejected.last)
    else:
        whole = weights
        drafted = probs(load_draft_logits(drafts, i, ids), draft)
        difference = whole - drafted
        weights = tl.where(difference > 0, difference, 0.0)  # nothing where the draft is not a number
        if rejected is not None:
            if drafts.flags & REPLACEMENT == 0:
                child = next_child(rejected.tree, i, i, None)
                while child <= rejected.last:
                    # ``drafted`` is what the last rejection took of it: of this child its own took another part.
                    share = (rejected.factor / tl.load(rejected.states + child * STATE + OWN_FACTOR)).to(tl.float32)
                    own = whole - drafted * share
                    if share != 1.0:
                        here = ids == token_of(rejected.tree, child)
                        weights = tl.where(here, tl.where(own > 0, own, 0.0), weights)
                    child = next_child(rejected.tree, i, child, None)
    return weights


@triton.jit
def measure_residual(
    rows, drafts, i, target, draft, rejected, part, slices, sums, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """One of the ``slices`` of row i: what the residual's tiles weigh, written to ``sums [ENTRIES]``."""
    HALF: tl.constexpr = TILES // 2 if TILES > VISITED else TILES  # of a block, since two rows are loaded
    first, last = slice_of(rows.vocab, part, slices, HALF)
    for start in tl.range(first, last, HALF, num_stages=1):
        weights = residuals(rows, drafts, i, target, draft, rejected, block_ids(rows, start, HALF))
        store_tiles(sums, start + tl.arange(0, HALF), last, (tl.sum(in_tiles(weights), axis=1),), ENTRIES)


@triton.jit
def measured_mass(rows, sums, ENTRIES: tl.constexpr):
    """The sum of a residual's weights, float64."""
    tiles = tl.arange(0, ENTRIES)
    return tl.sum(tl.load(sums + tiles, mask=tiles < tl.cdiv(rows.vocab, TILE), other=0.0)).to(tl.float64)


@triton.jit
def draw_residual(rows, drafts, i, target, draft, rejected, key, tag, table, ENTRIES: tl.constexpr):
    """A token of what is left by the two-level race; ``NO_ID`` where nothing is.

    The row's own tiles bound the residual's: no tile can arrive before its bound does. So tiles are visited in the
    order of their bounds, of every group one at a time, until none of the others can win. That is exact, and about 1 /
    (what is left of the probability) tiles are visited, which is one on average."""
    tiles = grouped_tiles(ENTRIES)
    weights = tile_weights(rows, target, table, tiles, ENTRIES)
    bounds = exponentials(key.seed, key.position, tag, tiles) / weights
    bounds = tl.where(weights > 0, bounds, float("inf"))
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], ENTRIES, tl.int32)  # in 32 bits: registers are scarce here
    # The bounds and the weights are rounded apart: leave room for that.
    while tl.min(bounds) * 0.9999 < best:
        first, own = first_of_groups(bounds, tiles, ENTRIES)
        bounds = tl.where(tiles == own[:, None], float("inf"), bounds)
        left = tl.sum(residuals(rows, drafts, i, target, draft, rejected, ids_of(own)), axis=1)
        times = first * tile_weights(rows, target, table, own, ENTRIES) / left
        times = tl.where(left > 0, times, float("inf"))
        earliest = tl.min(times)
        tile = first_arrival(times, own, ENTRIES)
        sooner = (earliest < best) | ((earliest == best) & (tile < winner))
        best = tl.where(sooner, earliest, best)
        winner = tl.where(sooner, tile, winner)
    drawn = tl.full([], NO_ID, tl.int64)
    if winner < ENTRIES:
        tile = winner.to(tl.int64)
        inside = residuals(rows, drafts, i, target, draft, rejected, ids_in(tile))
        drawn = draw_inside(inside, tile, key, tag)
    return drawn


@triton.jit
def draw_last(rows, drafts, i, target, draft, rejected, use_residual, key, table, ENTRIES: tl.constexpr):
    """The token that ends the step in row i."""
    tag = race_tag(TARGET, i)
    drawn = target.argmax
    if drawn < 0:
        drawn = tl.full([], NO_ID, tl.int64)
        if use_residual:
            drawn = draw_residual(rows, drafts, i, target, draft, rejected, key, tag, table, ENTRIES)
        if drawn == NO_ID:
            drawn = draw_from_row(rows, i, target, key, tag)
    return drawn
