"""From a row and its sampling parameters to its distribution, and to the winner of its tile race."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specdec_kernels.contract import MIN_TEMPERATURE
from specdec_kernels.triton_kernels.rows import (
    STAGES,
    TILE,
    Law,
    gap,
    is_steep,
    largest_token,
    law_scalars,
    load_block,
    log_prob,
    measure_row,
    summary,
    tabulate,
)

GREEDY_BELOW = tl.constexpr(MIN_TEMPERATURE)
# The least float there is.
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def scale_of(temperature):
    """inf: greedy."""
    greedy = temperature < GREEDY_BELOW
    return tl.where(greedy, float("inf"), 1.0 / tl.where(greedy, 1.0, temperature))


@triton.jit
def draft_scale_of(temperatures_ptr, temperature, index):
    """Of the drafts of a request that came without stats."""
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + index)
    return scale_of(temperature)


@triton.jit
def sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, index):
    """(scale, top_k, top_p, min_p) of a request: its row of ``sampling [B, 4]``, or the scalars. Scale inf: greedy."""
    if sampling_ptr is not None:
        own = sampling_ptr + 4 * index
        temperature, top_p, min_p = tl.load(own), tl.load(own + 2), tl.load(own + 3)
        top_k = tl.load(own + 1).to(tl.int32)
    return scale_of(temperature), top_k, top_p, min_p


@triton.jit
def measure(rows, i, scale, top, pivot, TILES: tl.constexpr):
    """Of the finite logits of row i not below ``pivot``: (how many, sum of exp(scale * (logit - top)), the smallest);
    and the largest one below."""
    count = tl.zeros([TILES], tl.int32)
    mass = tl.zeros([TILES], tl.float32)
    least = tl.full([TILES], float("inf"), tl.float32)
    below = tl.full([TILES], float("-inf"), tl.float32)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        logits = load_block(rows, i, start, TILES)
        above = (logits >= pivot) & (logits > float("-inf"))
        count += tl.sum(above.to(tl.int32), axis=1)
        mass += tl.sum(tl.where(above, tl.exp(gap(scale, logits, top)), 0.0), axis=1)
        least = tl.minimum(least, tl.min(tl.where(above, logits, float("inf")), axis=1))
        below = tl.maximum(below, tl.max(tl.where(above, float("-inf"), logits), axis=1))
    return tl.sum(count), tl.sum(mass), tl.min(least), tl.max(below)


@triton.jit
def largest_reaching(rows, i, scale, top, goal, low, BY_MASS: tl.constexpr, TILES: tl.constexpr):
    """The largest logit such that what is not below it reaches ``goal``, in probability or in number. What is not below
    ``low`` does. Bisection by value; both ends move on to the next logit there is, so it ends with the answer."""
    high = top  # the largest logit that may be the answer
    reach = 1.0 / scale
    while low < high:
        middle = 0.5 * low + 0.5 * high
        if low == float("-inf"):
            middle = tl.maximum(high - reach, LEAST)
            reach *= 2.0
        middle = tl.where(middle > low, middle, high)
        count, mass, least, below = measure(rows, i, scale, top, middle, TILES)
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
def keeps_few(top_k, rows):
    """Whether top-k takes anything away."""
    return (top_k > 0) & (top_k < rows.vocab)


@triton.jit
def filter_pivot(rows, i, sampling, top, TILES: tl.constexpr):
    """What top-k, then top-p, then min-p keep of a valid row is what is not below this."""
    scale, top_k, top_p, min_p = sampling
    pivot = tl.full([], float("-inf"), tl.float32)
    if keeps_few(top_k, rows):
        pivot = largest_reaching(rows, i, scale, top, top_k.to(tl.float32), pivot, False, TILES)
    if top_p < 1.0:
        _count, mass, _least, _below = measure(rows, i, scale, top, pivot, TILES)
        pivot = largest_reaching(rows, i, scale, top, top_p * mass, pivot, True, TILES)
    if min_p > 0.0:
        pivot = tl.maximum(pivot, top + tl.log(min_p) / scale)
    return pivot


@triton.jit
def table_scale(scale):
    """What a row is measured with: greedily the scale is infinite, and only its largest logit is asked for."""
    return tl.where(scale == float("inf"), 1.0, scale)


@triton.jit
def tabled_law(
    rows, i, sampling, key, tag, table, RACE: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """(the law of row i, whether the row is valid), from its table; where tokens are filtered out, the row is measured
    again. Greedy is the point mass on the largest logit; so is, for what is emitted then, a row that is not valid, on
    its largest finite one."""
    scale, top_k, top_p, min_p = sampling
    cutoff = tl.full([], float("-inf"), tl.float32)
    argmax = tl.full([], -1, tl.int64)
    greedy = scale == float("inf")
    finite = table_scale(scale)
    logsumexp = tl.full([], 0.0, tl.float64)
    total, tile, valid, top, largest = summary(rows, finite, table, key, tag, RACE, ENTRIES)
    if greedy | (valid == 0):
        cutoff = top
        argmax = largest_token(rows, i, top, largest)
    else:
        filters = keeps_few(top_k, rows) | (top_p < 1.0) | (min_p > 0.0)
        if filters & (is_steep(scale, top) == 0):
            pivot = filter_pivot(rows, i, sampling, top, TILES)
            tl.debug_barrier()  # everybody has read what is overwritten now
            cutoff = tabulate(rows, i, 0, tl.cdiv(rows.vocab, TILE), scale, pivot, table, ENTRIES, TILES)
            tl.debug_barrier()
            total, tile, valid, top, largest = summary(rows, scale, table, key, tag, RACE, ENTRIES)
        scale, cutoff, logsumexp = law_scalars(scale, cutoff, total, top)
    return Law(scale, cutoff, logsumexp, argmax, tile), valid


@triton.jit
def row_law(rows, i, sampling, key, tag, table, RACE: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """The same of a row that was not measured."""
    scale, _top_k, _top_p, _min_p = sampling
    measure_row(rows, i, table_scale(scale), table, ENTRIES, TILES)
    return tabled_law(rows, i, sampling, key, tag, table, RACE, ENTRIES, TILES)


@triton.jit
def token_logprob(rows, i, token, sampling, key, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Of a token under the law of row i, float32; nan where the row is not valid."""
    score = tl.full([], float("nan"), tl.float64)
    no_tag = tl.full([], 0, tl.int64)
    law, usable = row_law(rows, i, sampling, key, no_tag, table, False, ENTRIES, TILES)
    if usable:
        score = log_prob(rows, i, law, token)
    return score.to(tl.float32)


@triton.jit
def raw_logprob(rows, i, token, key, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Of a token under the plain softmax of row i."""
    one = tl.full([], 1.0, tl.float32)
    measure_row(rows, i, one, table, ENTRIES, TILES)
    total, tile, valid, top, _first = summary(rows, one, table, key, tl.full([], 0, tl.int64), False, ENTRIES)
    scale, cutoff, logsumexp = law_scalars(one, tl.full([], float("-inf"), tl.float32), total, top)
    score = log_prob(rows, i, Law(scale, cutoff, logsumexp, tl.full([], -1, tl.int64), tile), token)
    return tl.where(valid, score.to(tl.float32), float("nan"))
