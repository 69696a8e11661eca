"""From a row and its sampling parameters to its law: (scale, cutoff, logsumexp), and the winner of its tile race."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import MIN_TEMPERATURE
from specdec_kernels.triton_kernels.rows import TILE, load_block, row_stats

GREEDY_BELOW = tl.constexpr(MIN_TEMPERATURE)


@triton.jit
def sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, index):
    """(scale, top_k, top_p, min_p) of one request: its row of ``sampling [B, 4]``, or the scalars; scale inf is greedy."""
    if sampling_ptr is not None:
        own = sampling_ptr + 4 * index
        temperature, top_p, min_p = tl.load(own), tl.load(own + 2), tl.load(own + 3)
        top_k = tl.load(own + 1).to(tl.int32)
    greedy = temperature < GREEDY_BELOW
    scale = tl.where(greedy, float("inf"), 1.0 / tl.where(greedy, 1.0, temperature))
    return scale, top_k, top_p, min_p


@triton.jit
def measure(source, scale, top, pivot, vocab, TILES: tl.constexpr):
    """Of the finite logits not below ``pivot``: (how many, sum of exp(scale * (logit - top)), the smallest); and the
    largest one below."""
    count = tl.zeros([TILES], tl.int32)
    mass = tl.zeros([TILES], tl.float32)
    least = tl.full([TILES], float("inf"), tl.float32)
    below = tl.full([TILES], float("-inf"), tl.float32)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        logits = load_block(source, start, vocab, TILES)
        above = (logits >= pivot) & (logits > float("-inf"))
        count += tl.sum(above.to(tl.int32), axis=1)
        mass += tl.sum(tl.where(above, tl.exp(scale * (logits - top)), 0.0), axis=1)
        least = tl.minimum(least, tl.min(tl.where(above, logits, float("inf")), axis=1))
        below = tl.maximum(below, tl.max(tl.where(above, float("-inf"), logits), axis=1))
    return tl.sum(count), tl.sum(mass), tl.min(least), tl.max(below)


@triton.jit
def largest_reaching(source, scale, top, goal, low, BY_MASS: tl.constexpr, vocab, TILES: tl.constexpr):
    """The largest logit such that what is not below it reaches ``goal``, in probability or in number. What is not below
    ``low`` does. Bisection by value; both ends move on to the next logit there is, so it ends with the answer."""
    high = top  # the largest logit that may be the answer
    reach = 1.0 / scale
    while low < high:
        middle = 0.5 * low + 0.5 * high
        if low == float("-inf"):
            middle = high - reach
            reach *= 2.0
        middle = tl.where(middle > low, middle, high)
        count, mass, least, below = measure(source, scale, top, middle, vocab, TILES)
        reached = mass if BY_MASS else count.to(tl.float32)
        if reached >= goal:
            low = least
            if BY_MASS == 0:
                if reached == goal:
                    high = least
        else:
            high = tl.maximum(below, low)
    return low


@triton.jit
def row_law(source, scale, top_k, top_p, min_p, vocab, seed, position, tag, RACE: tl.constexpr, TILES: tl.constexpr):
    """(logsumexp, winner of the tile race, whether the row is valid, cutoff) after the filters."""
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp, tile, valid, top, _least = row_stats(
        source, scale, cutoff, vocab, seed, position, tag, RACE, TILES
    )
    few = (top_k > 0) & (top_k < vocab)
    if valid & (few | (top_p < 1.0) | (min_p > 0.0)):
        if few:
            cutoff = largest_reaching(source, scale, top, top_k.to(tl.float32), cutoff, False, vocab, TILES)
        if top_p < 1.0:
            _count, mass, _least, _below = measure(source, scale, top, cutoff, vocab, TILES)
            cutoff = largest_reaching(source, scale, top, top_p * mass, cutoff, True, vocab, TILES)
        if min_p > 0.0:
            cutoff = tl.maximum(cutoff, top + tl.log(min_p) / scale)
        logsumexp, tile, valid, _top, cutoff = row_stats(
            source, scale, cutoff, vocab, seed, position, tag, RACE, TILES
        )
    return logsumexp, tile, valid, cutoff
