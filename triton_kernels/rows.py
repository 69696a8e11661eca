"""Passes over one row of logits, in blocks of ``TILES`` tiles of 128 ids, and the draws that follow from them."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.contract import STEEP as _STEEP
from specdec_kernels.contract import TILE as _TILE
from specdec_kernels.contract import Level, Purpose
from specdec_kernels.triton_kernels.noise import exponentials

TILE = tl.constexpr(_TILE)
STEEP = tl.constexpr(_STEEP)
TOKEN_LEVEL = tl.constexpr(int(Level.TOKEN) << 8)
COUPLED = tl.constexpr(int(Purpose.COUPLED))
# Blocks of a row that are asked for before the first is there, and one.
STAGES = tl.constexpr(4)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Larger than any id: what a minimum over ids starts from.
NO_ID = tl.constexpr(1 << 40)


class Rows(NamedTuple):
    """The rows of one request as its law sees them: what :mod:`specdec_kernels.ops.processing` does to the logits is
    done as they are loaded, and never written. ``mask`` and ``ids`` may be None; a kernel has to build it where it
    stands, since a function of Triton cannot return None."""

    logits: Any
    """Pointer to the first row."""
    stride: Any
    vocab: Any
    mask: Any
    """Pointer to the words of the first row."""
    ids: Any
    """Pointers to the request's edits."""
    counts: Any
    bias: Any
    num_edits: Any
    penalties: Any
    """(repetition, presence, frequency)."""
    drafts: Any
    """Pointer to the drafts; row i of a chain counts the i first of them as output, a node those on its path."""
    draft_stride: Any
    parents: Any
    """Of the nodes of a tree; None for a chain."""


class Law(NamedTuple):
    """What tokens are drawn from: the scalars of a distribution, or the point mass on ``argmax`` where that is one."""

    scale: Any
    cutoff: Any
    logsumexp: Any
    """float64."""
    argmax: Any
    """-1, or the token of the point mass."""
    tile: Any
    """The winner of the tile race, where one was held."""


class Key(NamedTuple):
    """What noise is keyed on, beside its tag."""

    seed: Any
    position: Any


@triton.jit
def first_edit(ids_ptr, count, token):
    """Index of the first edit whose id is not below ``token``."""
    low = token * 0
    high = low + count
    while low < high:
        middle = (low + high) // 2
        if tl.load(ids_ptr + middle) < token:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def edited(logit, rows, i, edit, token):
    """A logit of row i after bias and penalties."""
    repetition, presence, frequency = rows.penalties
    output = tl.load(rows.counts + 2 * edit + 1)
    if rows.parents is not None:
        node = i
        while node > 0:
            output += (tl.load(rows.drafts + node * rows.draft_stride).to(tl.int64) == token).to(tl.int32)
            node = tl.load(rows.parents + node)
    else:
        for index in range(0, i):
            output += (tl.load(rows.drafts + index * rows.draft_stride).to(tl.int64) == token).to(tl.int32)
    logit += tl.load(rows.bias + edit)
    repeated = tl.where(logit > 0, logit / repetition, logit * repetition)
    logit = tl.where((output > 0) | (tl.load(rows.counts + 2 * edit) > 0), repeated, logit)
    return tl.where(output > 0, logit - (frequency * output.to(tl.float32) + presence), logit)


@triton.jit
def load_logits(rows, i, ids, first, last):
    """float32 logits of ``ids`` in row i, all of them in [first, last); -inf past the end of the row."""
    row = rows.logits + i * rows.stride
    x = tl.load(row + ids, mask=ids < rows.vocab, other=float("-inf")).to(tl.float32)
    if rows.ids is not None:
        edit = first_edit(rows.ids, rows.num_edits, first)
        end = first_edit(rows.ids, rows.num_edits, tl.minimum(last, rows.vocab))
        while edit < end:
            token = tl.load(rows.ids + edit).to(tl.int64)
            x = tl.where(ids == token, edited(tl.load(row + token).to(tl.float32), rows, i, edit, token), x)
            edit += 1
    if rows.mask is not None:
        words = rows.mask + i * ((rows.vocab + 31) // 32)
        bits = tl.load(words + ids // 32, mask=ids < rows.vocab, other=0) >> (ids % 32).to(tl.int32)
        x = tl.where(bits & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def block_ids(start, TILES: tl.constexpr):
    """Ids of a block that starts at tile ``start``: [TILES, TILE]."""
    return (start + tl.arange(0, TILES))[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def load_block(rows, i, start, TILES: tl.constexpr):
    """The block of row i that starts at tile ``start``: [TILES, TILE]."""
    first = tl.full([], TILE, tl.int64) * start
    return load_logits(rows, i, block_ids(start, TILES), first, first + TILES * TILE)


@triton.jit
def load_tile(rows, i, tile):
    """One tile of row i: [TILE]."""
    first = tile * TILE
    return load_logits(rows, i, first + tl.arange(0, TILE), first, first + TILE)


@triton.jit
def usable_base(maximum):
    """Subtracting -inf from -inf would give nan where the sum is 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def race_tag(purpose, row):
    return tl.full([], 0, tl.int64) + purpose | (row.to(tl.int64) << 16)


@triton.jit
def first_arrival(times, ids):
    """The id of the smallest time, the lowest one on ties; ``NO_ID`` if none is finite."""
    earliest = tl.min(times)
    return tl.min(tl.where((times == earliest) & (times < float("inf")), ids, NO_ID))


@triton.jit
def gap(scale, x, base):
    """scale * (x - base), in halves: the difference of two floats may be none."""
    return 2.0 * scale * (0.5 * x - 0.5 * base)


@triton.jit
def tile_sums(logits, scale):
    """Of tiles of logits [.., TILE] the largest, and the sum of exp(scale * (logit - that)). A nan or +inf shows in the
    sum and not in the maximum."""
    maxima = tl.max(tl.where(logits < float("inf"), logits, float("-inf")), axis=1)
    return maxima, tl.sum(tl.exp(gap(scale, logits, usable_base(maxima)[:, None])), axis=1)


@triton.jit
def tables_of(tables, i, ENTRIES: tl.constexpr):
    """Of row i where every row has its own: the target's table, and the draft's ``2 * ENTRIES`` behind it."""
    return tables + i * 4 * ENTRIES


@triton.jit
def tabulate(rows, i, first, last, scale, pivot, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Measure the tiles [first, last) of row i: of each the largest logit and the sum of exp(scale * (logit - that)),
    written to ``table [2, ENTRIES]``; what is below ``pivot`` counts for -inf. Returns the smallest logit that is not.

    All else that is asked about a row is read from its table, so it does not matter which program measured which tile,
    nor in how large blocks.
    """
    least = tl.full([TILES], float("inf"), tl.float32)
    for start in tl.range(first, last, TILES, num_stages=STAGES):
        logits = load_block(rows, i, start, TILES)
        below = logits < pivot
        least = tl.minimum(least, tl.min(tl.where(below, float("inf"), logits), axis=1))
        maxima, sums = tile_sums(tl.where(below, float("-inf"), logits), scale)
        tiles = start + tl.arange(0, TILES)
        tl.store(table + tiles, maxima, mask=tiles < last)
        tl.store(table + ENTRIES + tiles, sums, mask=tiles < last)
    return tl.min(least)


@triton.jit
def measure_row(rows, i, scale, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """All of row i, by this program alone."""
    tl.debug_barrier()  # everybody has read what is overwritten now
    lowest = tl.full([], float("-inf"), tl.float32)
    tabulate(rows, i, 0, tl.cdiv(rows.vocab, TILE), scale, lowest, table, ENTRIES, TILES)
    tl.debug_barrier()


@triton.jit
def tile_weights(rows, law, table, ENTRIES: tl.constexpr):
    """What the tiles of a row weigh under its law, from its table: [ENTRIES]."""
    tiles = tl.arange(0, ENTRIES)
    there = tiles < tl.cdiv(rows.vocab, TILE)
    maxima = tl.load(table + tiles, mask=there, other=float("-inf"))
    return tl.load(table + ENTRIES + tiles, mask=there, other=0.0) * probs(maxima, law)


@triton.jit
def summary(rows, scale, table, key, tag, RACE: tl.constexpr, ENTRIES: tl.constexpr):
    """What the table of a row says: (the sum of exp(scale * (logit - the largest)) in float64, the tile that wins the
    tile race if ``RACE``, whether the row is valid, the largest logit, the first tile that has it)."""
    tiles = tl.arange(0, ENTRIES)
    there = tiles < tl.cdiv(rows.vocab, TILE)
    maxima = tl.load(table + tiles, mask=there, other=float("-inf"))
    top = tl.max(maxima)
    weights = tl.load(table + ENTRIES + tiles, mask=there, other=0.0) * tl.exp(gap(scale, maxima, usable_base(top)))
    total = tl.sum(weights)
    winner = tl.full([], 0, tl.int64)
    if RACE:
        times = exponentials(key.seed, key.position, tag, tiles.to(tl.int64)) / weights
        winner = first_arrival(tl.where(weights > 0, times, float("inf")), tiles.to(tl.int64))
    largest = tl.min(tl.where(maxima == top, tiles, ENTRIES)).to(tl.int64)
    valid = (total > 0) & (total < float("inf"))
    return total.to(tl.float64), winner, valid, top, largest


@triton.jit
def is_steep(scale, top):
    """Whether a row weighs nothing but its largest logits (docs/noise.md)."""
    return tl.abs(scale * top) >= STEEP


@triton.jit
def law_scalars(scale, cutoff, total, top):
    """(scale, cutoff, logsumexp) of a valid row, from its ``summary``; ``cutoff``: the smallest logit measured."""
    steep = is_steep(scale, top)
    scale = tl.where(steep, 0.0, scale)
    logsumexp = scale.to(tl.float64) * top.to(tl.float64) + tl.log(total)
    return scale, tl.where(steep, top, cutoff), logsumexp


@triton.jit
def largest_token(rows, i, top, tile):
    """The first id in ``tile`` that has its largest logit, and that of the row; 0 where no logit is finite."""
    logits = load_tile(rows, i, tile)
    token = tl.min(tl.where(logits == top, tile * TILE + tl.arange(0, TILE), NO_ID))
    return tl.where(top > float("-inf"), token, 0)


@triton.jit
def split(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def fma(x, y, z):
    """Triton's interpreter rounds the product."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:  # noqa: RET505 - of a constant: one of the two is compiled
        return tl.fma(x, y, z)


@triton.jit
def probs(logits, law):
    """[logit >= cutoff] * exp(scale * logit - logsumexp), the logsumexp as a sum of two floats."""
    high, low = split(law.logsumexp)
    return tl.where(logits < law.cutoff, 0.0, tl.exp(fma(logits, law.scale, -high) - low))


@triton.jit
def log_prob(rows, i, law, token):
    """Of one token of a valid row, float64."""
    logit = load_logits(rows, i, token, token, token + 1)
    sampled = law.scale.to(tl.float64) * logit.to(tl.float64) - law.logsumexp
    sampled = tl.where(logit < law.cutoff, float("-inf"), sampled)
    return tl.where(law.argmax < 0, sampled, tl.where(token == law.argmax, 0.0, float("-inf")))


@triton.jit
def race_tiles(best, winner, sums, start, key, tag, TILES: tl.constexpr):
    """The tile race goes on with the tiles of a block, by their weights: (arrival of the first, its tile), [TILES]."""
    tiles = (start + tl.arange(0, TILES)).to(tl.int64)
    time = exponentials(key.seed, key.position, tag, tiles) / sums
    sooner = (sums > 0) & (time < best)
    return tl.where(sooner, time, best), tl.where(sooner, tiles, winner)


@triton.jit
def own_edits(ids_ptr, counts_ptr, bias_ptr, penalties_ptr, num_edits, index):
    """(ids, counts, bias, penalties) of one request, as :class:`Rows` takes them."""
    first = index * num_edits
    own = penalties_ptr + 3 * index
    penalties = (tl.load(own), tl.load(own + 1), tl.load(own + 2))
    return ids_ptr + first, counts_ptr + 2 * first, bias_ptr + first, penalties


@triton.jit
def draw_inside(weights, tile, key, tag):
    """The token race inside a tile, weights [TILE]."""
    entry = tl.arange(0, TILE)
    time = exponentials(key.seed, key.position, tag | TOKEN_LEVEL, entry.to(tl.int64)) / weights
    return first_arrival(tl.where(weights > 0, time, float("inf")), tile * TILE + entry)


@triton.jit
def draw_from_row(rows, i, law, key, tag):
    """A token of the winning tile by the row's own probabilities."""
    return draw_inside(probs(load_tile(rows, i, law.tile), law), law.tile, key, tag)


@triton.jit
def flat_race(rows, i, law, key, TILES: tl.constexpr):
    """All ids in one race, its noise keyed on the absolute position ``key.position + i``: the coupled rule's draw."""
    tag = tl.full([], COUPLED | TOKEN_LEVEL, tl.int64)
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int64)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        ids = block_ids(start, TILES)
        weights = probs(load_block(rows, i, start, TILES), law)
        times = exponentials(key.seed, key.position + i, tag, ids) / weights
        times = tl.where(weights > 0, times, float("inf"))
        earliest = tl.min(tl.min(times, axis=1), axis=0)
        if earliest < best:
            winner = tl.min(tl.min(tl.where(times == earliest, ids, NO_ID), axis=1), axis=0)
            best = earliest
    return winner
