"""The distribution a draft was drawn from, what rejected drafts leave of the target's, and draws from that."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.contract import Purpose
from specdec_kernels.triton_kernels.noise import exponentials
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    STAGES,
    TILE,
    Law,
    block_ids,
    draw_from_row,
    draw_inside,
    first_arrival,
    law_scalars,
    load_logits,
    log_prob,
    measure_row,
    probs,
    race_tag,
    race_tiles,
    summary,
    tile_weights,
)

TARGET = tl.constexpr(int(Purpose.TARGET))

# Where `remember` puts the reach of a row.
REACH = tl.constexpr(9)

# Tiles that are looked at one by one before a pass over the row is the quicker way.
MOST_LOOKS = tl.constexpr(64)

# Nodes that are looked through at a time.
WINDOW = tl.constexpr(32)


class Tree(NamedTuple):
    """The drafts of one request."""

    parents: Any
    tokens: Any
    """Pointers to int64 [nodes]."""
    nodes: Any
    """How many there are; what is behind them has no parent."""
    vocab: Any
    replacement: Any
    """Whether siblings were drawn with it; 0 or 1."""


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
def draft_law(
    draft_rows, stats_ptr, draft_scale, i, token, needed, key, table, TABLED: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """(the law that draft i was drawn from, the draft's probability, whether both are usable): its own softmax at
    ``draft_scale``, or the scalars handed over; the point mass on it where there are no logits, where it was drawn
    greedily, or where no law is ``needed``. ``TABLED``: the draft's row was measured."""
    scale = tl.full([], 0.0, tl.float32) + draft_scale
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    prob = tl.full([], 1.0, tl.float64)
    argmax = token
    usable = tl.full([], 1, tl.int1)
    if draft_rows.logits is not None:
        if needed:
            argmax = tl.full([], -1, tl.int64)
            if stats_ptr is not None:
                stats = stats_ptr + 3 * i
                scale, cutoff = tl.load(stats), tl.load(stats + 1)
                logsumexp = tl.load(stats + 2).to(tl.float64)
                argmax = tl.where(scale == float("inf"), token, -1)
            elif scale == float("inf"):
                argmax = token
            else:
                no_tag = tl.full([], 0, tl.int64)
                if not TABLED:
                    measure_row(draft_rows, i, scale, table, ENTRIES, TILES)
                total, _tile, usable, top, _first = summary(draft_rows, scale, table, key, no_tag, False, ENTRIES)
                scale, cutoff, logsumexp = law_scalars(scale, cutoff, total, top)
            if argmax < 0:
                prob = tl.exp(log_prob(draft_rows, i, Law(scale, cutoff, logsumexp, argmax, argmax), token))
                usable = usable & (prob < float("inf"))
    return Law(scale, cutoff, logsumexp, argmax, argmax), prob, usable


@triton.jit
def remember(place, law, draft, reach):
    """The laws of a row and its reach, in ten doubles."""
    tl.store(place, law.scale.to(tl.float64))
    tl.store(place + 1, law.cutoff.to(tl.float64))
    tl.store(place + 2, law.logsumexp)
    tl.store(place + 3, law.argmax.to(tl.float64))
    tl.store(place + 4, law.tile.to(tl.float64))
    tl.store(place + 5, draft.scale.to(tl.float64))
    tl.store(place + 6, draft.cutoff.to(tl.float64))
    tl.store(place + 7, draft.logsumexp)
    tl.store(place + 8, draft.argmax.to(tl.float64))
    tl.store(place + REACH, reach)


@triton.jit
def recalled_laws(place, factor):
    """(law of the target, of the draft, of the draft divided by ``factor``)."""
    law = Law(
        tl.load(place).to(tl.float32), tl.load(place + 1).to(tl.float32), tl.load(place + 2),
        tl.load(place + 3).to(tl.int64), tl.load(place + 4).to(tl.int64),
    )  # fmt: skip
    draft_scale, draft_cutoff = tl.load(place + 5).to(tl.float32), tl.load(place + 6).to(tl.float32)
    logsumexp, argmax = tl.load(place + 7), tl.load(place + 8).to(tl.int64)
    draft = Law(draft_scale, draft_cutoff, logsumexp, argmax, argmax)
    return law, draft, Law(draft_scale, draft_cutoff, logsumexp + tl.log(factor), argmax, argmax)


@triton.jit
def residuals(rows, draft_rows, i, law, draft, rejected, ids, first, last):
    """What is left of ``ids`` in row i, all of them in [first, last): (target - draft)+, but for rejected siblings."""
    weights = probs(load_logits(rows, i, ids, first, last), law)
    certain = draft.argmax >= 0
    if certain:
        if rejected is None:
            weights = tl.where(ids == draft.argmax, 0.0, weights)
        else:
            child = next_child(rejected.tree, i, i)
            while child <= rejected.last:
                weights = tl.where(ids == tl.load(rejected.tree.tokens + child), 0.0, weights)
                child = next_child(rejected.tree, i, child)
    if draft_rows.logits is not None:
        if not certain:
            target = weights
            drafted = probs(load_logits(draft_rows, i, ids, first, last), draft)
            difference = target - drafted
            weights = tl.where(difference > 0, difference, 0.0)  # nothing where the draft is not a number
            if rejected is not None:
                if rejected.tree.replacement == 0:
                    child = next_child(rejected.tree, i, i)
                    while child <= rejected.last:
                        # ``drafted`` is what the last rejection took of it: of this child its own took another part.
                        share = (rejected.factor / tl.load(rejected.factors + child * rejected.stride)).to(tl.float32)
                        own = target - drafted * share
                        if share != 1.0:
                            here = ids == tl.load(rejected.tree.tokens + child)
                            weights = tl.where(here, tl.where(own > 0, own, 0.0), weights)
                        child = next_child(rejected.tree, i, child)
    return weights


@triton.jit
def residual_sums(rows, draft_rows, i, law, draft, rejected, start, TILES: tl.constexpr):
    """The residual's weight of every tile of a block: [TILES]."""
    first = tl.full([], TILE, tl.int64) * start
    ids = block_ids(start, TILES)
    return tl.sum(residuals(rows, draft_rows, i, law, draft, rejected, ids, first, first + TILES * TILE), axis=1)


@triton.jit
def residual_mass(rows, draft_rows, i, law, draft, rejected, TILES: tl.constexpr):
    """The sum of the residual's weights, float64."""
    mass = tl.zeros([TILES], tl.float32)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        mass += residual_sums(rows, draft_rows, i, law, draft, rejected, start, TILES)
    return tl.sum(mass).to(tl.float64)


@triton.jit
def race_below(rows, draft_rows, i, law, draft, rejected, key, tag, table, ENTRIES: tl.constexpr):
    """(the tile that wins the residual's race, ``NO_ID`` if none has weight; whether that is settled). The row's own
    tiles bound the residual's: no tile can arrive before its bound does, so tiles are looked at in the order of their
    bounds until none of the others can win. Exact, and about 1 / (what is left of the probability) tiles are looked at;
    where that is next to nothing, a pass over the row will be quicker."""
    tiles = tl.arange(0, ENTRIES)
    weights = tile_weights(rows, law, table, ENTRIES)
    bounds = tl.where(
        weights > 0, exponentials(key.seed, key.position, tag, tiles.to(tl.int64)) / weights, float("inf")
    )
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int64)
    looks = tl.full([], 0, tl.int32)
    bound = tl.min(bounds)
    # The bounds and the weights are rounded apart: leave room for that.
    while (bound * 0.9999 < best) & (looks < MOST_LOOKS):
        tile = tl.min(tl.where(bounds == bound, tiles, ENTRIES))
        first = tile.to(tl.int64) * TILE
        ids = first + tl.arange(0, TILE)
        weight = tl.sum(residuals(rows, draft_rows, i, law, draft, rejected, ids, first, first + TILE))
        time = exponentials(key.seed, key.position, tag, tile.to(tl.int64)) / weight
        sooner = (weight > 0) & ((time < best) | ((time == best) & (tile < winner)))
        best = tl.where(sooner, time, best)
        winner = tl.where(sooner, tile.to(tl.int64), winner)
        bounds = tl.where(tiles == tile, float("inf"), bounds)
        bound = tl.min(bounds)
        looks += 1
    return winner, bound * 0.9999 >= best


@triton.jit
def residual_race(rows, draft_rows, i, law, draft, rejected, key, tag, TILES: tl.constexpr):
    """The same by a pass over the row."""
    best = tl.full([TILES], float("inf"), tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        sums = residual_sums(rows, draft_rows, i, law, draft, rejected, start, TILES)
        best, winner = race_tiles(best, winner, sums, start, key, tag, TILES)
    return first_arrival(best, winner)


@triton.jit
def residual_draw(
    rows, draft_rows, i, law, draft, rejected, key, tag, table, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """A token from (target - draft)+ by the two-level race; ``NO_ID`` where nothing is left of it. ``table``: of row i,
    or None."""
    if table is None:
        drawn = residual_race(rows, draft_rows, i, law, draft, rejected, key, tag, TILES)
    else:
        drawn, settled = race_below(rows, draft_rows, i, law, draft, rejected, key, tag, table, ENTRIES)
        if settled == 0:
            drawn = residual_race(rows, draft_rows, i, law, draft, rejected, key, tag, TILES)
    if drawn < NO_ID:
        first = drawn * TILE
        ids = first + tl.arange(0, TILE)
        weights = residuals(rows, draft_rows, i, law, draft, rejected, ids, first, first + TILE)
        drawn = draw_inside(weights, drawn, key, tag)
    return drawn


@triton.jit
def emit(
    rows, draft_rows, i, law, draft, rejected, use_residual, key, table, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The token that ends the step in row i."""
    tag = race_tag(TARGET, i)
    emitted = law.argmax
    if emitted < 0:
        emitted = tl.full([], NO_ID, tl.int64)
        if use_residual:
            emitted = residual_draw(rows, draft_rows, i, law, draft, rejected, key, tag, table, ENTRIES, TILES)
        if emitted == NO_ID:
            emitted = draw_from_row(rows, i, law, key, tag)
    return emitted
