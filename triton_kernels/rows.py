"""Passes over one row of logits, in blocks of ``TILES`` tiles of 128 ids, and the draws that follow from them.

A *source* is a tuple that stands for one row as its law sees it: (row, mask, edit ids, edit counts, edit bias, number of
edits, repetition, presence, frequency, drafts, stride of the drafts, drafts before the row); mask and edits may be None.
See `specdec_kernels/ops/processing.py`. Nothing of it is ever written: every load processes what it loads.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import TILE as _TILE
from specdec_kernels.contract import Level, Purpose
from specdec_kernels.triton_kernels.noise import exponentials

TILE = tl.constexpr(_TILE)
TOKEN_LEVEL = tl.constexpr(int(Level.TOKEN) << 8)
COUPLED = tl.constexpr(int(Purpose.COUPLED))
# Larger than any id: what a minimum over ids starts from.
NO_ID = tl.constexpr(1 << 40)


@triton.jit
def source_of(
    row_ptr, bitmask_ptr, mask_row, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, num_edits, request,
    drafts_ptr, draft_stride, prefix, vocab,
):  # fmt: skip
    """The source of one row of a request."""
    mask = None
    if bitmask_ptr is not None:
        mask = bitmask_ptr + mask_row * ((vocab + 31) // 32)
    if edit_ids_ptr is None:
        return (row_ptr, mask, None, None, None, 0, 1.0, 0.0, 0.0, drafts_ptr, draft_stride, prefix)
    else:
        begin = request * num_edits
        penalties = penalties_ptr + 3 * request
        return (
            row_ptr, mask, edit_ids_ptr + begin, edit_counts_ptr + 2 * begin, edit_bias_ptr + begin, num_edits,
            tl.load(penalties), tl.load(penalties + 1), tl.load(penalties + 2), drafts_ptr, draft_stride, prefix,
        )  # fmt: skip


@triton.jit
def raw_source(source):
    """The same row without processing."""
    return (source[0], None, None, None, None, 0, 1.0, 0.0, 0.0, source[9], source[10], 0)


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
def edited(logit, source, edit, token):
    """A logit after bias and penalties."""
    output = tl.load(source[3] + 2 * edit + 1)
    for index in range(0, source[11]):
        output += (tl.load(source[9] + index * source[10]).to(tl.int64) == token).to(tl.int32)
    logit += tl.load(source[4] + edit)
    repeated = tl.where(logit > 0, logit / source[6], logit * source[6])
    logit = tl.where((output > 0) | (tl.load(source[3] + 2 * edit) > 0), repeated, logit)
    return tl.where(output > 0, logit - (source[8] * output.to(tl.float32) + source[7]), logit)


@triton.jit
def load_logits(source, ids, first, last, vocab):
    """float32 logits of ``ids``, all of them in [first, last); -inf past the end of the row."""
    x = tl.load(source[0] + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    if source[2] is not None:
        edit = first_edit(source[2], source[5], first)
        end = first_edit(source[2], source[5], tl.minimum(last, vocab))
        while edit < end:
            token = tl.load(source[2] + edit).to(tl.int64)
            logit = edited(tl.load(source[0] + token).to(tl.float32), source, edit, token)
            x = tl.where(ids == token, logit, x)
            edit += 1
    if source[1] is not None:
        words = tl.load(source[1] + ids // 32, mask=ids < vocab, other=0)
        x = tl.where((words >> (ids % 32).to(tl.int32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def block_ids(start, TILES: tl.constexpr):
    """Ids of a block that starts at tile ``start``: [TILES, TILE]."""
    return (start + tl.arange(0, TILES))[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def load_block(source, start, vocab, TILES: tl.constexpr):
    """The block that starts at tile ``start``: [TILES, TILE]."""
    first = tl.full([], TILE, tl.int64) * start
    return load_logits(source, block_ids(start, TILES), first, first + TILES * TILE, vocab)


@triton.jit
def load_tile(source, tile, vocab):
    """One tile: [TILE]."""
    first = tile * TILE
    return load_logits(source, first + tl.arange(0, TILE), first, first + TILE, vocab)


@triton.jit
def load_logit(source, token, vocab):
    """One logit, float64."""
    return load_logits(source, token, token, token + 1, vocab).to(tl.float64)


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
def row_stats(source, scale, pivot, vocab, seed, position, tag, RACE: tl.constexpr, TILES: tl.constexpr):
    """One pass over what is not below ``pivot``: (logsumexp in float64, the tile that wins the tile race if ``RACE``,
    whether the row is valid, the largest logit, the smallest one).

    The race is held on logarithms of arrival times, so that no tile needs the largest logit of the whole row, and on
    their differences, so that a low temperature costs no precision.
    """
    maximum = tl.full([TILES], float("-inf"), tl.float32)
    least = tl.full([TILES], float("inf"), tl.float32)
    total = tl.zeros([TILES], tl.float32)
    best = tl.full([TILES], float("inf"), tl.float32)  # log(E / tile_sum), to be read relative to best_base
    best_base = tl.zeros([TILES], tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        logits = load_block(source, start, vocab, TILES)
        below = logits < pivot
        least = tl.minimum(least, tl.min(tl.where(below, float("inf"), logits), axis=1))
        logits = tl.where(below, float("-inf"), logits)
        tile_max = tl.max(logits, axis=1)
        base = usable_base(tile_max)
        tile_sum = tl.sum(tl.exp(scale * (logits - base[:, None])), axis=1)
        new_max = tl.maximum(maximum, tile_max)
        new_base = usable_base(new_max)
        total = total * tl.exp(scale * (maximum - new_base)) + tile_sum * tl.exp(scale * (tile_max - new_base))
        maximum = new_max
        if RACE:
            tiles = (start + tl.arange(0, TILES)).to(tl.int64)
            time = tl.log(exponentials(seed, position, tag, tiles)) - tl.log(tile_sum)
            sooner = (time - best < scale * (base - best_base)) & (tile_sum > 0)
            winner = tl.where(sooner, tiles, winner)
            best = tl.where(sooner, time, best)
            best_base = tl.where(sooner, base, best_base)
    top = tl.max(maximum)
    sum_of_row = tl.sum(total * tl.exp(scale * (maximum - usable_base(top))))
    valid = (sum_of_row > 0) & (sum_of_row < float("inf")) & (top < float("inf"))
    logsumexp = scale.to(tl.float64) * top.to(tl.float64) + tl.log(sum_of_row.to(tl.float64))
    time = tl.where(winner < NO_ID, best - scale * (best_base - usable_base(top)), float("inf"))
    return logsumexp, first_arrival(time, winner), valid, top, tl.min(least)


@triton.jit
def row_argmax(source, vocab, TILES: tl.constexpr):
    """(the largest logit, its lowest id, whether the row is valid); infinities and nan are passed over."""
    best = tl.full([TILES, TILE], float("-inf"), tl.float32)
    winner = tl.full([TILES, TILE], NO_ID, tl.int64)
    bad = tl.zeros([TILES, TILE], tl.int32)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        ids = block_ids(start, TILES)
        logits = load_block(source, start, vocab, TILES)
        unusable = (logits != logits) | (logits == float("inf"))
        bad = bad | unusable.to(tl.int32)
        larger = (logits > best) & (unusable == 0)
        winner = tl.where(larger, ids, winner)
        best = tl.where(larger, logits, best)
    top = tl.max(tl.max(best, axis=1), axis=0)
    token = tl.min(tl.min(tl.where(best == top, winner, NO_ID), axis=1), axis=0)
    found = token < NO_ID
    return top, tl.where(found, token, 0), found & (tl.max(tl.max(bad, axis=1), axis=0) == 0)


@triton.jit
def probs(logits, scale, cutoff, high, low):
    """[logit >= cutoff] * exp(scale * logit - logsumexp), the logsumexp as a sum of two floats."""
    return tl.where(logits < cutoff, 0.0, tl.exp(tl.fma(logits, scale, -high) - low))


@triton.jit
def split(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def draw_inside(weights, tile, seed, position, tag):
    """The token race inside a tile, weights [TILE]."""
    entry = tl.arange(0, TILE)
    time = exponentials(seed, position, tag | TOKEN_LEVEL, entry.to(tl.int64)) / weights
    return first_arrival(tl.where(weights > 0, time, float("inf")), tile * TILE + entry)


@triton.jit
def draw_from_row(source, scale, cutoff, logsumexp, tile, vocab, seed, position, tag):
    """A token of the winning tile by the row's own probabilities."""
    high, low = split(logsumexp)
    return draw_inside(probs(load_tile(source, tile, vocab), scale, cutoff, high, low), tile, seed, position, tag)


@triton.jit
def flat_race(source, scale, cutoff, logsumexp, vocab, seed, position, TILES: tl.constexpr):
    """All ids in one race, its noise keyed on the absolute position: the draw of the coupled rule."""
    high, low = split(logsumexp)
    tag = tl.full([], COUPLED | TOKEN_LEVEL, tl.int64)
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int64)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        ids = block_ids(start, TILES)
        weights = probs(load_block(source, start, vocab, TILES), scale, cutoff, high, low)
        times = tl.where(weights > 0, exponentials(seed, position, tag, ids) / weights, float("inf"))
        earliest = tl.min(tl.min(times, axis=1), axis=0)
        if earliest < best:
            winner = tl.min(tl.min(tl.where(times == earliest, ids, NO_ID), axis=1), axis=0)
            best = earliest
    return winner
