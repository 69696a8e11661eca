"""Draws from rows: by the two-level race from a distribution or from what rejected drafts leave of it, and by the flat
race. And the distribution that a draft was drawn from."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.contract import Level, Purpose
from specdec_kernels.triton_kernels.arguments import DRAFT_LOGITS, DRAFT_STATS, DRAFT_TEMPERATURES, REDUCED
from specdec_kernels.triton_kernels.distributions import first_arrival, scale_of, summary, tile_weights
from specdec_kernels.triton_kernels.noise import exponentials
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    STAGES,
    TILE,
    Distribution,
    block_ids,
    first_of_groups,
    grouped_tiles,
    ids_of,
    load_block,
    load_logits,
    load_tile,
    log_prob,
    measure,
    probs,
    scalars_of,
)

TARGET, COUPLED = tl.constexpr(int(Purpose.TARGET)), tl.constexpr(int(Purpose.COUPLED))
TOKEN_LEVEL = tl.constexpr(int(Level.TOKEN) << 8)
# Nodes that are looked through at a time.
WINDOW = tl.constexpr(32)

# The state of a row once it was judged, in doubles: `store_state` fills the first nine.
PATH_PROB = tl.constexpr(9)
STATE = tl.constexpr(16)


class Drafts(NamedTuple):
    """What is known of how a request's drafts were drawn."""

    rows: Any
    reduced: Any
    """The same rows, where they have some of the vocabulary only: what is read of them where REDUCED is ``given``."""
    stats: Any
    """Pointer to the scalars of the first draft."""
    scale: Any
    """Of drafts that came without them."""
    given: Any
    """Flags of :mod:`.arguments`: without DRAFT_LOGITS the drafts are point masses."""


class Tree(NamedTuple):
    """The drafts of one request."""

    parents: Any
    tokens: Any
    """Pointers to int64 [nodes]."""
    nodes: Any
    """How many there are; what is behind them has no parent."""
    vocab: Any
    replacement: Any
    """Whether siblings were drawn with it."""


class Rejected(NamedTuple):
    """The siblings that were rejected: the children of a node up to ``last``. Rejecting them one after the other
    leaves, up to a factor, (target - draft / factor)+ with one number ``factor``; but siblings drawn without
    replacement were not drawn from what was rejected before them, so a rejected token has a factor of its own."""

    tree: Any
    last: Any
    factor: Any
    factors: Any
    """Pointer to the factors of the nodes, ``stride`` apart."""
    stride: Any


@triton.jit
def draft_scale_of(temperatures_ptr, given, temperature, request):
    """Of the drafts of a request that came without stats."""
    some = given & DRAFT_TEMPERATURES != 0
    return scale_of(tl.load(temperatures_ptr + request, mask=some, other=temperature))


@triton.jit
def race_tag(purpose, row):
    return tl.full([], 0, tl.int64) + purpose | (row.to(tl.int64) << 16)


@triton.jit
def next_child(tree, node, after):
    """The first child of ``node`` behind ``after``; the number of nodes if there is none. A node whose token is none is
    no child."""
    child = tree.nodes
    start = after + 1
    while (start < tree.nodes) & (child == tree.nodes):
        index = start + tl.arange(0, WINDOW)
        inside = index < tree.nodes
        parent = tl.load(tree.parents + index, mask=inside, other=-1)
        token = tl.load(tree.tokens + index, mask=inside, other=-1)
        found = (parent == node) & (token >= 0) & (token < tree.vocab)
        child = tl.min(tl.where(found, index, tree.nodes))
        start += WINDOW
    return child


@triton.jit
def load_draft_logits(drafts, i, ids):
    """float32 logits of draft i for the target's ``ids``."""
    return load_logits(drafts.reduced, i, ids) if drafts.given & REDUCED != 0 else load_logits(drafts.rows, i, ids)


@triton.jit
def measure_draft(drafts, i, part, slices, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """``measure`` the row that draft i was drawn from, unless that needs no table: there are the scalars that it would
    be asked for, or no logits, or the draft was drawn greedily."""
    if (drafts.given & DRAFT_LOGITS != 0) & (drafts.given & DRAFT_STATS == 0) & (drafts.scale < float("inf")):
        # Apart, so that whole rows are loaded 16 bytes at a time, blocks ahead.
        if drafts.given & REDUCED != 0:
            measure(drafts.reduced, i, drafts.scale, part, slices, table, ENTRIES, TILES)
        else:
            measure(drafts.rows, i, drafts.scale, part, slices, table, ENTRIES, TILES)


@triton.jit
def drafted_prob(drafts, i, distribution, token):
    """The draft's probability of a token: float64. A point mass is on whatever was drafted."""
    prob = tl.full([], 1.0, tl.float64)
    if distribution.argmax < 0:
        prob = tl.exp(log_prob(load_draft_logits(drafts, i, token), distribution, token))
    return prob


@triton.jit
def draft_distribution(drafts, i, token, needed, key, table, ENTRIES: tl.constexpr):
    """(the distribution that draft i was drawn from, the draft's probability, whether both are usable): its own softmax
    at ``drafts.scale`` from its table, or the scalars handed over; the point mass on it where there are no logits,
    where it was drawn greedily, or where no distribution is ``needed``."""
    scale = tl.full([], 0.0, tl.float32) + drafts.scale
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    argmax = token
    prob = tl.full([], 1.0, tl.float64)
    usable = tl.full([], 1, tl.int1)
    if needed & (drafts.given & DRAFT_LOGITS != 0):
        if drafts.given & DRAFT_STATS != 0:
            stats = drafts.stats + 3 * i
            scale, cutoff = tl.load(stats), tl.load(stats + 1)
            logsumexp = tl.load(stats + 2).to(tl.float64)
        elif scale < float("inf"):
            no_tag = tl.full([], 0, tl.int64)
            total, _tile, usable, top, _first = summary(drafts.rows, scale, table, key, no_tag, False, ENTRIES)
            scale, cutoff, logsumexp = scalars_of(scale, cutoff, total, top)
        argmax = tl.where(scale == float("inf"), token, -1)
        prob = drafted_prob(drafts, i, Distribution(scale, cutoff, logsumexp, argmax, argmax), token)
    return Distribution(scale, cutoff, logsumexp, argmax, argmax), prob, usable & (prob < float("inf"))


@triton.jit
def store_state(place, target, draft, path_prob):
    """The distributions of a row and the acceptance probability of the path to it."""
    tl.store(place, target.scale.to(tl.float64))
    tl.store(place + 1, target.cutoff.to(tl.float64))
    tl.store(place + 2, target.logsumexp)
    tl.store(place + 3, target.argmax.to(tl.float64))
    tl.store(place + 4, target.tile.to(tl.float64))
    tl.store(place + 5, draft.scale.to(tl.float64))
    tl.store(place + 6, draft.cutoff.to(tl.float64))
    tl.store(place + 7, draft.logsumexp)
    tl.store(place + 8, draft.argmax.to(tl.float64))
    tl.store(place + PATH_PROB, path_prob)


@triton.jit
def load_state(place, factor):
    """(distribution of the target, of the draft, of the draft divided by ``factor``)."""
    target = Distribution(
        tl.load(place).to(tl.float32), tl.load(place + 1).to(tl.float32), tl.load(place + 2),
        tl.load(place + 3).to(tl.int64), tl.load(place + 4).to(tl.int64),
    )  # fmt: skip
    draft_scale, draft_cutoff = tl.load(place + 5).to(tl.float32), tl.load(place + 6).to(tl.float32)
    logsumexp, argmax = tl.load(place + 7), tl.load(place + 8).to(tl.int64)
    draft = Distribution(draft_scale, draft_cutoff, logsumexp, argmax, argmax)
    return target, draft, Distribution(draft_scale, draft_cutoff, logsumexp + tl.log(factor), argmax, argmax)


@triton.jit
def residuals(rows, drafts, i, target, draft, rejected, ids):
    """What is left of ``ids`` in row i: (target - draft)+, but for rejected siblings."""
    weights = probs(load_logits(rows, i, ids), target)
    if draft.argmax >= 0:
        if rejected is None:
            weights = tl.where(ids == draft.argmax, 0.0, weights)
        else:
            child = next_child(rejected.tree, i, i)
            while child <= rejected.last:
                weights = tl.where(ids == tl.load(rejected.tree.tokens + child), 0.0, weights)
                child = next_child(rejected.tree, i, child)
    else:
        whole = weights
        drafted = probs(load_draft_logits(drafts, i, ids), draft)
        difference = whole - drafted
        weights = tl.where(difference > 0, difference, 0.0)  # nothing where the draft is not a number
        if rejected is not None:
            if rejected.tree.replacement == 0:
                child = next_child(rejected.tree, i, i)
                while child <= rejected.last:
                    # ``drafted`` is what the last rejection took of it: of this child its own took another part.
                    share = (rejected.factor / tl.load(rejected.factors + child * rejected.stride)).to(tl.float32)
                    own = whole - drafted * share
                    if share != 1.0:
                        here = ids == tl.load(rejected.tree.tokens + child)
                        weights = tl.where(here, tl.where(own > 0, own, 0.0), weights)
                    child = next_child(rejected.tree, i, child)
    return weights


@triton.jit
def measure_residual(
    rows, drafts, i, target, draft, rejected, part, slices, sums, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """One of the ``slices`` of row i: what the residual's tiles weigh, written to ``sums [ENTRIES]``."""
    tiles = tl.cdiv(rows.vocab, TILE)
    size = tl.cdiv(tl.cdiv(tiles, TILES), slices) * TILES
    last = tl.minimum((part + 1) * size, tiles)
    for start in tl.range(part * size, last, TILES, num_stages=STAGES):
        weights = residuals(rows, drafts, i, target, draft, rejected, block_ids(start, TILES))
        own = start + tl.arange(0, TILES)
        tl.store(sums + own, tl.sum(weights, axis=1), mask=own < last)


@triton.jit
def measured_mass(rows, sums, ENTRIES: tl.constexpr):
    """The sum of a residual's weights, float64."""
    tiles = tl.arange(0, ENTRIES)
    return tl.sum(tl.load(sums + tiles, mask=tiles < tl.cdiv(rows.vocab, TILE), other=0.0)).to(tl.float64)


@triton.jit
def draw_inside(weights, tile, key, tag):
    """The token race inside a tile, weights [TILE]."""
    entry = tl.arange(0, TILE)
    time = exponentials(key.seed, key.position, tag | TOKEN_LEVEL, entry.to(tl.int64)) / weights
    return first_arrival(tl.where(weights > 0, time, float("inf")), tile * TILE + entry)


@triton.jit
def draw_from_row(rows, i, distribution, key, tag):
    """A token of the winning tile by the row's own probabilities."""
    weights = probs(load_tile(rows, i, distribution.tile), distribution)
    return draw_inside(weights, distribution.tile, key, tag)


@triton.jit
def draw_residual(
    rows, drafts, i, target, draft, rejected, key, tag, table, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """A token from (target - draft)+ by the two-level race; ``NO_ID`` where nothing is left of it.

    The row's own tiles bound the residual's: no tile can arrive before its bound does. So tiles are looked at in the
    order of their bounds, of every group one at a time, until none of the others can win. That is exact, and about 1 /
    (what is left of the probability) tiles are looked at, which is one on average."""
    tiles = grouped_tiles(ENTRIES, TILES)
    weights = tile_weights(rows, target, table, tiles, ENTRIES)
    bounds = exponentials(key.seed, key.position, tag, tiles.to(tl.int64)) / weights
    bounds = tl.where(weights > 0, bounds, float("inf"))
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], ENTRIES, tl.int32)  # in 32 bits: registers are scarce here
    # The bounds and the weights are rounded apart: leave room for that.
    while tl.min(bounds) * 0.9999 < best:
        _first, own = first_of_groups(bounds, tiles, ENTRIES)
        bounds = tl.where(tiles == own[:, None], float("inf"), bounds)
        left = tl.sum(residuals(rows, drafts, i, target, draft, rejected, ids_of(own)), axis=1)
        times = exponentials(key.seed, key.position, tag, own.to(tl.int64)) / left
        times = tl.where(left > 0, times, float("inf"))
        earliest = tl.min(times)
        tile = first_arrival(times, own, ENTRIES)
        sooner = (earliest < best) | ((earliest == best) & (tile < winner))
        best = tl.where(sooner, earliest, best)
        winner = tl.where(sooner, tile, winner)
    drawn = tl.full([], NO_ID, tl.int64)
    if winner < ENTRIES:
        tile = winner.to(tl.int64)
        ids = tile * TILE + tl.arange(0, TILE)
        drawn = draw_inside(residuals(rows, drafts, i, target, draft, rejected, ids), tile, key, tag)
    return drawn


@triton.jit
def draw_last(
    rows, drafts, i, target, draft, rejected, use_residual, key, table, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The token that ends the step in row i."""
    tag = race_tag(TARGET, i)
    drawn = target.argmax
    if drawn < 0:
        drawn = tl.full([], NO_ID, tl.int64)
        if use_residual:
            drawn = draw_residual(rows, drafts, i, target, draft, rejected, key, tag, table, ENTRIES, TILES)
        if drawn == NO_ID:
            drawn = draw_from_row(rows, i, target, key, tag)
    return drawn


@triton.jit
def flat_race(rows, i, distribution, key, TILES: tl.constexpr):
    """All ids in one race, its noise keyed on the absolute position ``key.position + i``: the coupled rule's draw."""
    tag = tl.full([], COUPLED | TOKEN_LEVEL, tl.int64)
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int64)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        ids = block_ids(start, TILES)
        weights = probs(load_block(rows, i, start, TILES), distribution)
        times = exponentials(key.seed, key.position + i, tag, ids) / weights
        times = tl.where(weights > 0, times, float("inf"))
        earliest = tl.min(tl.min(times, axis=1), axis=0)
        if earliest < best:
            winner = tl.min(tl.min(tl.where(times == earliest, ids, NO_ID), axis=1), axis=0)
            best = earliest
    return winner
