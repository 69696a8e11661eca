"""From the table of a row and its sampling parameters to its distribution, and draws from that: by the two-level race,
and by the flat race."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import MIN_TEMPERATURE
from specdec_kernels.contract import NOTHING_LEFT as _NOTHING_LEFT
from specdec_kernels.triton_kernels.filters import drop_below, filter_bound, has_top_k
from specdec_kernels.triton_kernels.noise import FLAT_RACE, TOKEN_LEVEL, exponentials
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    TILE,
    Distribution,
    block_ids,
    ids_in,
    is_steep,
    largest_finite,
    load_logits,
    load_table,
    measure,
    probs,
    scalars_of,
    weights_from,
)

GREEDY_BELOW = tl.constexpr(MIN_TEMPERATURE)
NOTHING_LEFT = tl.constexpr(_NOTHING_LEFT)


@triton.jit
def scale_of(temperature):
    """inf: greedy."""
    greedy = temperature < GREEDY_BELOW
    return tl.where(greedy, float("inf"), 1.0 / tl.where(greedy, 1.0, temperature))


@triton.jit
def sampling_of(sampling_ptr, own_row, temperature, top_k, top_p, min_p, index):
    """(scale, top_k, top_p, min_p) of a request: its ``own_row`` of ``sampling [B, 4]``, or if there is none the
    scalars. Scale inf: greedy."""
    own = sampling_ptr + 4 * index
    temperature = tl.load(own, mask=own_row, other=temperature)
    top_k = tl.load(own + 1, mask=own_row, other=top_k).to(tl.int32)
    top_p = tl.load(own + 2, mask=own_row, other=top_p)
    min_p = tl.load(own + 3, mask=own_row, other=min_p)
    return scale_of(temperature), top_k, top_p, min_p


@triton.jit
def first_arrival(times, ids, none=NO_ID):
    """The id of the smallest time, the lowest one on ties; ``none`` if none is finite."""
    earliest = tl.min(times)
    return tl.min(tl.where((times == earliest) & (times < float("inf")), ids, none))


@triton.jit
def summary(rows, scale, table, key, tag, RACE: tl.constexpr, ENTRIES: tl.constexpr):
    """What the table of a row says: (the sum of exp(scale * (logit - the largest)) in float64, the tile that wins the
    tile race if ``RACE``, whether the row is valid, the largest logit, the first tile that has it)."""
    tiles = tl.arange(0, ENTRIES)
    maxima, sums = load_table(table, tiles, rows.vocab, ENTRIES)
    top = tl.max(maxima)
    weights = sums * weights_from(top, scale, maxima)
    total = tl.sum(weights)
    winner = tl.full([], 0, tl.int32)
    if RACE:
        times = exponentials(key.seed, key.position, tag, tiles) / weights
        winner = first_arrival(tl.where(weights > 0, times, float("inf")), tiles)
    largest = tl.min(tl.where(maxima == top, tiles, ENTRIES))
    return total.to(tl.float64), winner, (total > 0) & (total < float("inf")), top, largest


@triton.jit
def table_scale(scale):
    """What a row is measured with: greedily the scale is infinite, and only its largest logit is needed."""
    return tl.where(scale == float("inf"), 1.0, scale)


@triton.jit
def distribution_of(
    rows, i, sampling, key, tag, race, table, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """(the distribution of row i, whether the row is valid), from its table; where tokens are filtered out, the table
    has what is left. ``race``: what it was measured with; where there is none, the tile race is held. Greedy is the
    point mass on the largest logit; so is, for what is drawn then, a row that is not valid, on its largest finite
    one."""
    scale, top_k, top_p, min_p = sampling
    cutoff = tl.full([], float("-inf"), tl.float32)
    argmax = tl.full([], -1, tl.int64)
    greedy = scale == float("inf")
    finite = table_scale(scale)
    logsumexp = tl.full([], 0.0, tl.float64)
    total, tile, valid, top, largest = summary(rows, finite, table, key, tag, race is None, ENTRIES)
    if greedy | (valid == 0):
        cutoff = top
        first = tl.where(valid, largest, 0).to(tl.int32)
        argmax = largest_finite(rows, i, first, tl.where(valid, first + 1, tl.cdiv(rows.vocab, TILE)), TILES)
    else:
        filters = has_top_k(top_k, rows) | (top_p < 1.0) | (min_p > 0.0)
        if filters & (is_steep(scale, top) == 0):
            bound = filter_bound(rows, i, sampling, top, total, table, ENTRIES)
            cutoff = drop_below(rows, i, scale, race, bound, top, table, ENTRIES)
            total, tile, valid, top, largest = summary(rows, scale, table, key, tag, race is None, ENTRIES)
        scale, cutoff, logsumexp = scalars_of(scale, cutoff, total, top)
    return Distribution(scale, cutoff, logsumexp, argmax, tile), valid


@triton.jit
def raw_distribution(rows, i, key, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """(The plain softmax of row i, whether the row is valid); measured by this program alone."""
    one = tl.full([], 1.0, tl.float32)
    tl.debug_barrier()  # everybody has read what is overwritten now
    measure(rows, i, one, None, 0, 1, table, ENTRIES, TILES)
    tl.debug_barrier()
    total, tile, valid, top, _first = summary(rows, one, table, key, tl.full([], 0, tl.int64), False, ENTRIES)
    scale, cutoff, logsumexp = scalars_of(one, tl.full([], float("-inf"), tl.float32), total, top)
    return Distribution(scale, cutoff, logsumexp, tl.full([], -1, tl.int64), tile), valid


@triton.jit
def tile_weights(rows, distribution, table, tiles, ENTRIES: tl.constexpr):
    """What tiles of a row weigh under its distribution, from its table."""
    maxima, sums = load_table(table, tiles, rows.vocab, ENTRIES)
    return sums * probs(maxima, distribution)


@triton.jit
def race_tag(purpose, row):
    return tl.full([], 0, tl.int64) + purpose | (row.to(tl.int64) << 16)


@triton.jit
def draw_inside(weights, tile, key, tag):
    """The token race inside a tile, weights [TILE]."""
    entry = tl.arange(0, TILE)
    time = exponentials(key.seed, key.position, tag | TOKEN_LEVEL, entry) / weights
    return first_arrival(tl.where(weights > 0, time, float("inf")), ids_in(tile)).to(tl.int64)


@triton.jit
def draw_from_row(rows, i, distribution, key, tag):
    """A token of the winning tile by the row's own probabilities."""
    weights = probs(load_logits(rows, i, ids_in(distribution.tile)), distribution)
    return draw_inside(weights, distribution.tile, key, tag)


@triton.jit
def next_id(rows, i, distribution, key, value, token, BY_RACE: tl.constexpr, TILES: tl.constexpr):
    """(value, id) of what comes behind (``value``, ``token``) when ids are ordered by arrival in the flat race, or by
    falling logit, lower id first on ties; ``NO_ID`` if nothing does. Values rise in that order."""
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int64)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=1):
        ids = block_ids(rows, start, TILES)
        logits = load_logits(rows, i, ids)
        if BY_RACE:
            weights = probs(logits, distribution)
            tag = tl.full([], FLAT_RACE, tl.int64)
            values = exponentials(key.seed, key.position, tag, ids) / weights
            takes_part = weights >= NOTHING_LEFT
        else:
            values = -logits
            takes_part = (logits >= distribution.cutoff) & (logits > float("-inf"))
        takes_part = takes_part & ((values > value) | ((values == value) & (ids > token)))
        values = tl.where(takes_part, values, float("inf"))
        earliest = tl.min(values)
        if earliest < best:
            winner = tl.min(tl.where(values == earliest, ids, NO_ID)).to(tl.int64)
            best = earliest
    return best, winner


@triton.jit
def flat_race(rows, distribution, table, ENTRIES: tl.constexpr):
    """The winner of the race of all ids, the coupled rule's draw, from the table of a row that was measured with it."""
    tiles = tl.arange(0, ENTRIES)
    maxima, _sums = load_table(table, tiles, rows.vocab, ENTRIES)
    first, winners = load_table(table + 2 * ENTRIES, tiles, rows.vocab, ENTRIES)
    shares = probs(maxima, distribution)
    times = tl.where(shares > 0, first / shares, float("inf"))
    return first_arrival(times, winners.to(tl.int32, bitcast=True)).to(tl.int64)
