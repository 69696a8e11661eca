"""What of a row top-k, top-p and min-p keep, found from its table and the tiles that can have it."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specdec_kernels.triton_kernels.rows import first_of_groups, gap, grouped_tiles, ids_of, load_logits, load_table

# The least float there is.
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def has_top_k(top_k, rows):
    """Whether top-k takes anything away."""
    return (top_k > 0) & (top_k < rows.vocab)


@triton.jit
def compare(x, weights, pivot):
    """Of finite values [M, N] not below ``pivot``: (how many, their weight, the smallest); and the largest below."""
    above = (x >= pivot) & (x > float("-inf"))
    count = tl.sum(tl.sum(above.to(tl.int32), axis=1))
    weight = tl.sum(tl.sum(tl.where(above, weights, 0.0), axis=1))
    least = tl.min(tl.min(tl.where(above, x, float("inf")), axis=1))
    return count, weight, least, tl.max(tl.max(tl.where(above, float("-inf"), x), axis=1))


@triton.jit
def compare_logits(rows, i, scale, top, pivot, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """The same of the logits of row i by their exp(scale * (logit - top)): of the tiles that have one not below
    ``pivot``, ``TILES`` at a time. The others are known by their maxima."""
    tiles = grouped_tiles(ENTRIES, TILES)
    maxima, _sums = load_table(table, tiles, rows.vocab, ENTRIES)
    some = maxima >= pivot
    waiting = tl.where(some, -maxima, float("inf"))
    count = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float32)
    least = tl.full([], float("inf"), tl.float32)
    below = tl.max(tl.max(tl.where(some, float("-inf"), maxima), axis=1))
    while tl.min(waiting) < float("inf"):
        _first, own = first_of_groups(waiting, tiles, ENTRIES)
        waiting = tl.where(tiles == own[:, None], float("inf"), waiting)
        logits = load_logits(rows, i, ids_of(own))
        more, weight, smallest, largest = compare(logits, tl.exp(gap(scale, logits, top)), pivot)
        count += more
        mass += weight
        least = tl.minimum(least, smallest)
        below = tl.maximum(below, largest)
    return count, mass, least, below


@triton.jit
def filter_pivot(rows, i, sampling, top, total, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """What top-k, then top-p, then min-p keep of a valid row is what is not below this.

    The largest logit such that what is not below it reaches a goal is found by bisection by value; both ends move on to
    the next logit there is, so it ends with the answer. That is done up to three times: the k-th largest maximum of a
    tile bounds the k-th largest logit from below, and that what top-p keeps of it."""
    scale, top_k, top_p, min_p = sampling
    of_tiles = has_top_k(top_k, rows)
    by_number = of_tiles
    low = tl.full([], float("-inf"), tl.float32)  # reaches the goal; -inf: not known
    kept = total.to(tl.float32)  # the weight of what is not below that; less than 0: not known
    high = top  # the largest that may do so
    distance = 1.0 / scale
    goal = tl.where(by_number, top_k.to(tl.float32), top_p * kept)
    searching = by_number | (top_p < 1.0)
    while searching:
        pivot = 0.5 * low + 0.5 * high
        if low == float("-inf"):
            pivot = tl.maximum(high - distance, LEAST)
            distance *= 2.0
        pivot = tl.where(pivot > low, pivot, high)
        if (kept < 0) & (of_tiles == 0):
            pivot = low
        if of_tiles:
            maxima, sums = load_table(table, grouped_tiles(ENTRIES, TILES), rows.vocab, ENTRIES)
            count, weight, least, below = compare(maxima, sums, pivot)
        else:
            count, weight, least, below = compare_logits(rows, i, scale, top, pivot, table, ENTRIES, TILES)
        reached = tl.where(by_number, count.to(tl.float32), weight)
        if reached >= goal:
            low = least
            kept = tl.where(of_tiles, -1.0, weight)
            if by_number & (reached == goal):
                high = least
        else:
            high = tl.maximum(below, low)
        if (low >= high) & ((kept >= 0) | of_tiles):
            searching = of_tiles | (by_number & (top_p < 1.0))
            if of_tiles == 0:
                by_number = tl.full([], 0, tl.int1)
                goal = top_p * kept
            of_tiles = tl.full([], 0, tl.int1)
            high = top
    if min_p > 0.0:
        low = tl.maximum(low, top + tl.log(min_p) / scale)
    return low


@triton.jit
def drop_below(rows, i, scale, pivot, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Leave in the table of row i what is not below ``pivot``; the smallest logit of that."""
    tiles = grouped_tiles(ENTRIES, TILES)
    maxima, sums = load_table(table, tiles, rows.vocab, ENTRIES)
    some = maxima >= pivot
    least = tl.full([], float("inf"), tl.float32)
    waiting = tl.where(some, -maxima, float("inf"))
    tl.debug_barrier()  # everybody has read what is overwritten now
    tl.store(table + tiles, tl.where(some, maxima, float("-inf")))
    tl.store(table + ENTRIES + tiles, tl.where(some, sums, 0.0))
    tl.debug_barrier()
    while tl.min(waiting) < float("inf"):
        first, own = first_of_groups(waiting, tiles, ENTRIES)
        waiting = tl.where(tiles == own[:, None], float("inf"), waiting)
        there = first < float("inf")
        logits = load_logits(rows, i, ids_of(own))
        kept = logits >= pivot
        least = tl.minimum(least, tl.min(tl.where(kept, logits, float("inf"))))
        weights = tl.exp(gap(scale, tl.where(kept, logits, float("-inf")), tl.where(there, -first, 0.0)[:, None]))
        tl.store(table + ENTRIES + own, tl.sum(weights, axis=1), mask=there)
    tl.debug_barrier()
    return least
