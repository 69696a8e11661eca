"""What top-k, then top-p, then min-p keep of a row, without sorting it, and hardly ever by going over it again: the
largest logits of the tiles are in the table, and only the few tiles whose largest is not below the k-th largest of them
can hold what top-k keeps. Those logits are gathered, and what is kept of them is found by bisection."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from specdec_kernels.triton_kernels.rows import (
    LIST,
    TILE,
    VISITED,
    ids_of,
    load_logits,
    load_table,
    measured,
    store_tiles,
    weights_from,
)

# The least float there is.
LEAST = tl.constexpr(torch.finfo(torch.float32).min)
# How many more tiles than the k may have a logit not below the bound: of top-k 50, 64 tiles.
SLACK = tl.constexpr(15.0)


class Listed(NamedTuple):
    """The tiles of a row that have logits not below some bound."""

    rows: Any
    i: Any
    tiles: Any
    """Pointer to their numbers, as floats, in the row's table; behind them logits are gathered."""
    count: Any
    top: Any
    """The row's largest logit, which weighs 1."""


@triton.jit
def has_top_k(top_k, rows):
    """Whether top-k takes anything away."""
    return (top_k > 0) & (top_k < rows.vocab)


@triton.jit
def list_tiles(rows, bound, table, ENTRIES: tl.constexpr):
    """Write the numbers of those that have a logit not below ``bound``; how many there are."""
    tiles = tl.arange(0, ENTRIES)
    maxima, _sums = load_table(table, tiles, rows.vocab, ENTRIES)
    some = (maxima >= bound) & (maxima > float("-inf"))
    slots = tl.cumsum(some.to(tl.int32), 0)
    tl.debug_barrier()  # everybody has read what is overwritten now
    tl.store(table + LIST * ENTRIES + slots - 1, tiles.to(tl.float32), mask=some)
    tl.debug_barrier()
    return tl.max(slots)


@triton.jit
def load_listed(listed, start):
    """(``VISITED`` of the tiles, their ids, their logits); behind the last, tiles without ids."""
    slots = start + tl.arange(0, VISITED)
    there = slots < listed.count
    tiles = tl.load(listed.tiles + slots, mask=there, other=0.0).to(tl.int32)
    tiles = tl.where(there, tiles, tl.cdiv(listed.rows.vocab, TILE))
    ids = ids_of(tiles)
    return tiles, ids, load_logits(listed.rows, listed.i, ids)


@triton.jit
def above(x, weights, bound):
    """Of finite values not below ``bound``: their weight, the smallest; and the largest one below."""
    some = (x >= bound) & (x > float("-inf"))
    least = tl.min(tl.where(some, x, float("inf")))
    return tl.sum(tl.where(some, weights, 0.0)), least, tl.max(tl.where(some, float("-inf"), x))


@triton.jit
def all_above(listed, scale, bound):
    """The same of all logits of the tiles, by their exp(scale * (logit - top))."""
    mass = tl.full([], 0.0, tl.float32)
    least = tl.full([], float("inf"), tl.float32)
    below = tl.full([], float("-inf"), tl.float32)
    for start in tl.range(0, listed.count, VISITED, num_stages=1):
        _tiles, _ids, logits = load_listed(listed, start)
        more, smallest, largest = above(logits, weights_from(listed.top, scale, logits), bound)
        mass += more
        least = tl.minimum(least, smallest)
        below = tl.maximum(below, largest)
    return mass, least, below


@triton.jit
def gather(listed, scale, bound, ENTRIES: tl.constexpr):
    """(how many logits of the tiles are not below ``bound``, their weight); as many as there are places for are left
    behind the list."""
    count = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float32)
    for start in tl.range(0, listed.count, VISITED, num_stages=1):
        _tiles, _ids, logits = load_listed(listed, start)
        some = (logits >= bound) & (logits > float("-inf"))
        inside = tl.cumsum(some.to(tl.int32), 1)
        of_tiles = tl.sum(some.to(tl.int32), axis=1)
        slots = listed.count + count + (tl.cumsum(of_tiles, 0) - of_tiles)[:, None] + inside
        tl.store(listed.tiles + slots - 1, logits, mask=some & (slots <= ENTRIES))
        count += tl.sum(of_tiles)
        mass += tl.sum(tl.where(some, weights_from(listed.top, scale, logits), 0.0))
    tl.debug_barrier()
    return count, mass


@triton.jit
def threshold(goal, slack, low, high, distance, x, weights, listed):
    """The largest value such that what is not below it has ``goal`` in weight, or one with no more than ``slack``
    beyond; what is not below ``low`` does. Of values ``x``, or of all logits of ``listed`` tiles, whose weights go by a
    scale. Bisection by value; both ends move on to the next one there is."""
    searching = low < high
    while searching:
        bound = 0.5 * low + 0.5 * high
        if low == float("-inf"):
            bound = tl.maximum(high - distance, LEAST)
            distance *= 2.0
        bound = tl.where(bound > low, bound, high)
        if x is None:
            mass, least, below = all_above(listed, weights, bound)
        else:
            mass, least, below = above(x, weights, bound)
        if mass >= goal:
            low = least
        else:
            high = tl.maximum(below, low)
        searching = (low < high) & ((mass < goal) | (mass > goal + slack))
    return low


@triton.jit
def filter_bound(rows, i, sampling, top, total, table, ENTRIES: tl.constexpr):
    """What top-k, then top-p, then min-p keep of a valid row is what is not below this."""
    scale, top_k, top_p, min_p = sampling
    limited = has_top_k(top_k, rows)
    list_ptr = table + LIST * ENTRIES
    k, goal = top_k.to(tl.float32), top_p * total.to(tl.float32)
    low = tl.full([], float("-inf"), tl.float32)
    if limited:
        maxima, _sums = load_table(table, tl.arange(0, ENTRIES), rows.vocab, ENTRIES)
        low = threshold(k, SLACK, low, top, 1.0 / scale, maxima, 1.0, None)
    # Without top-k, what is gathered is what weighs e^-4 of the largest, or less until it has the mass for top-p.
    gap = tl.full([], 4.0, tl.float32)
    bound = low
    listed, count = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    gathering = tl.where(limited, low > float("-inf"), top_p < 1.0)
    while gathering:
        if limited == 0:
            bound = tl.maximum(top - gap / scale, LEAST)
            gap *= 2.0
        listed = list_tiles(rows, bound, table, ENTRIES)
        count, mass = gather(Listed(rows, i, list_ptr, listed, top), scale, bound, ENTRIES)
        reached = limited | (mass >= goal)
        low = tl.where(reached, bound, low)
        gathering = (reached == 0) & (gap < 80.0)
    gathered = (low > float("-inf")) & (listed + count <= ENTRIES)
    slots = tl.arange(0, ENTRIES)
    some = slots < tl.where(gathered, count, 0)
    near = tl.load(list_ptr + listed + slots, mask=some, other=float("-inf"))
    if gathered == 0:  # min-p alone, or what keeps more than there are places for
        listed = list_tiles(rows, low, table, ENTRIES)
    tiles = Listed(rows, i, list_ptr, listed, top)
    for search in range(0, 2):
        by_mass = search > 0
        own_scale = tl.where(by_mass, scale, 0.0)
        weights = weights_from(top, own_scale, near)
        if tl.where(by_mass, top_p < 1.0, limited):
            if gathered:
                if by_mass & limited:
                    goal = top_p * above(near, weights, low)[0]
                wanted = tl.where(by_mass, goal, k)
                low = threshold(wanted, 0.0, low, top, 1.0 / scale, near, weights, None)
            else:
                if by_mass & limited:
                    goal = top_p * all_above(tiles, scale, low)[0]
                wanted = tl.where(by_mass, goal, k)
                low = threshold(wanted, 0.0, low, top, 1.0 / scale, None, own_scale, tiles)
    if min_p > 0.0:
        low = tl.maximum(low, top + tl.log(min_p) / scale)
    return low


@triton.jit
def drop_below(rows, i, scale, race, bound, top, table, ENTRIES: tl.constexpr):
    """Leave in the table of row i what is not below ``bound``; the smallest logit of that."""
    tiles = tl.arange(0, ENTRIES)
    maxima, sums = load_table(table, tiles, rows.vocab, ENTRIES)
    some = maxima >= bound
    listed = Listed(rows, i, table + LIST * ENTRIES, list_tiles(rows, bound, table, ENTRIES), top)
    tl.store(table + tiles, tl.where(some, maxima, float("-inf")))
    tl.store(table + ENTRIES + tiles, tl.where(some, sums, 0.0))
    tl.debug_barrier()
    least = tl.full([], float("inf"), tl.float32)
    for start in tl.range(0, listed.count, VISITED, num_stages=1):
        own, ids, logits = load_listed(listed, start)
        kept = logits >= bound
        least = tl.minimum(least, tl.min(tl.where(kept, logits, float("inf"))))
        found = measured(tl.where(kept, logits, float("-inf")), ids, scale, race)
        store_tiles(table, own, tl.cdiv(rows.vocab, TILE), found, ENTRIES)
    tl.debug_barrier()
    return least
