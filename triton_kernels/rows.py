"""Passes over one row of logits, in blocks of ``TILES`` tiles of 128 ids, and the draws that follow from them."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import TILE as _TILE
from specdec_kernels.contract import Level
from specdec_kernels.triton_kernels.noise import exponentials

TILE = tl.constexpr(_TILE)
TOKEN_LEVEL = tl.constexpr(int(Level.TOKEN) << 8)
# Larger than any id: what a minimum over ids starts from.
NO_ID = tl.constexpr(1 << 40)


@triton.jit
def block_ids(start, TILES: tl.constexpr):
    """Ids of a block that starts at tile ``start``: [TILES, TILE]."""
    return (start + tl.arange(0, TILES))[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def load_logits(row_ptr, ids, vocab):
    """float32 logits of ``ids``, -inf past the end of the row."""
    return tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)


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
def row_stats(row_ptr, scale, vocab, seed, position, tag, RACE: tl.constexpr, TILES: tl.constexpr):
    """One pass: (logsumexp in float64, the tile that wins the tile race if ``RACE``, whether the row is valid).

    The race is held on logarithms of arrival times, so that no tile needs the largest logit of the whole row, and on
    their differences, so that a low temperature costs no precision.
    """
    maximum = tl.full([TILES], float("-inf"), tl.float32)
    total = tl.zeros([TILES], tl.float32)
    best = tl.full([TILES], float("inf"), tl.float32)  # log(E / tile_sum), to be read relative to best_base
    best_base = tl.zeros([TILES], tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        logits = load_logits(row_ptr, block_ids(start, TILES), vocab)
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
    return logsumexp, first_arrival(time, winner), valid


@triton.jit
def row_argmax(row_ptr, vocab, TILES: tl.constexpr):
    """(the largest logit, its lowest id, whether the row is valid); infinities and nan are passed over."""
    best = tl.full([TILES, TILE], float("-inf"), tl.float32)
    winner = tl.full([TILES, TILE], NO_ID, tl.int64)
    bad = tl.zeros([TILES, TILE], tl.int32)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        ids = block_ids(start, TILES)
        logits = load_logits(row_ptr, ids, vocab)
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
def draw_from_row(row_ptr, scale, logsumexp, tile, vocab, seed, position, tag):
    """A token of the winning tile by the row's own probabilities."""
    high, low = split(logsumexp)
    logits = load_logits(row_ptr, tile * TILE + tl.arange(0, TILE), vocab)
    return draw_inside(probs(logits, scale, float("-inf"), high, low), tile, seed, position, tag)
