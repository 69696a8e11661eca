"""``sample_children``: one launch. Semantics: :mod:`specdec_kernels.ops.tree_rules`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import NOTHING_LEFT as _NOTHING_LEFT
from specdec_kernels.contract import Children
from specdec_kernels.triton_kernels.arguments import BITMASK, SAMPLING
from specdec_kernels.triton_kernels.arrivals import arrive
from specdec_kernels.triton_kernels.distributions import distribution_of, first_arrival, sampling_of, table_scale
from specdec_kernels.triton_kernels.draws import COUPLED, TOKEN_LEVEL, draw_inside, race_tag
from specdec_kernels.triton_kernels.noise import exponentials
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    STAGES,
    TILE,
    Key,
    Reduced,
    Rows,
    block_ids,
    load_block,
    load_logits,
    load_tile,
    log_prob,
    measure,
    probs,
    processing_of,
)
from specdec_kernels.triton_kernels.sample import DRAFT, draw, store_stats

NOTHING_LEFT = tl.constexpr(_NOTHING_LEFT)
TOP = tl.constexpr(int(Children.TOP))
IID = tl.constexpr(int(Children.IID))
RACE = tl.constexpr(int(Children.RACE))


@triton.jit
def without(weights, ids, taken_ptr, taken):
    """Weights of ``ids``, 0 for the first ``taken`` tokens at ``taken_ptr``."""
    for index in range(0, taken):
        weights = tl.where(ids == tl.load(taken_ptr + index), 0.0, weights)
    return weights


@triton.jit
def draw_without(rows, i, distribution, taken_ptr, taken, key, tag, TILES: tl.constexpr):
    """A token by the two-level race, not one of those taken; ``NO_ID`` where they left nothing."""
    best = tl.full([TILES], float("inf"), tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    share = tl.zeros([TILES], tl.float32)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        weights = probs(load_block(rows, i, start, TILES), distribution)
        weights = without(weights, block_ids(start, TILES), taken_ptr, taken)
        sums = tl.sum(weights, axis=1)
        share += sums
        tiles = (start + tl.arange(0, TILES)).to(tl.int64)
        time = exponentials(key.seed, key.position, tag, tiles) / sums
        sooner = (sums > 0) & (time < best)
        best, winner = tl.where(sooner, time, best), tl.where(sooner, tiles, winner)
    drawn = tl.full([], NO_ID, tl.int64)
    if tl.sum(share) >= NOTHING_LEFT:
        tile = first_arrival(best, winner)
        weights = probs(load_tile(rows, i, tile), distribution)
        weights = without(weights, tile * TILE + tl.arange(0, TILE), taken_ptr, taken)
        drawn = draw_inside(weights, tile, key, tag)
    return drawn


@triton.jit
def next_best(rows, i, distribution, value, token, key, HOW: tl.constexpr, TILES: tl.constexpr):
    """(value, id) of what comes behind (value, token) when ids are ordered by falling logit, or by arrival in the flat
    race, lower id first on ties; ``NO_ID`` if nothing does. Values rise in that order."""
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int64)
    for start in tl.range(0, tl.cdiv(rows.vocab, TILE), TILES, num_stages=STAGES):
        ids = block_ids(start, TILES)
        logits = load_block(rows, i, start, TILES)
        if HOW == RACE:
            weights = probs(logits, distribution)
            tag = tl.full([], COUPLED | TOKEN_LEVEL, tl.int64)
            values = exponentials(key.seed, key.position, tag, ids) / weights
            takes_part = weights >= NOTHING_LEFT
        else:
            values = -logits
            takes_part = (logits >= distribution.cutoff) & (logits > float("-inf"))
        behind = takes_part & ((values > value) | ((values == value) & (ids > token)))
        values = tl.where(behind, values, float("inf"))
        least = tl.min(tl.min(values, axis=1), axis=0)
        if least < best:
            winner = tl.min(tl.min(tl.where(behind & (values == least), ids, NO_ID), axis=1), axis=0)
            best = least
    return best, winner


@triton.jit(do_not_specialize=["top_k", "adjustments", "draft_width", "count", "slices", "flags"])  # 1: a constant
def sample_children_kernel(
    logits_ptr, target_to_draft_ptr, seed_ptr, position_ptr, row_ptr, sampling_ptr, temperature, top_k, top_p, min_p,
    bitmask_ptr, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, adjustments, tokens_ptr, logprobs_ptr,
    stats_ptr, tables_ptr, counters_ptr, row_stride, draft_width, vocab, slices, flags, count, HOW: tl.constexpr,
    PROCESSED: tl.constexpr, REDUCED: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) // slices).to(tl.int64)
    part = tl.program_id(0) % slices
    key = Key(tl.load(seed_ptr + r), tl.load(position_ptr + r))
    sampling = sampling_of(sampling_ptr, flags & SAMPLING != 0, temperature, top_k, top_p, min_p, r)
    processing = None
    if PROCESSED:
        processing = processing_of(
            bitmask_ptr, flags & BITMASK != 0, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr,
            adjustments, r, r, vocab, row_ptr, 0, row_ptr, True,
        )  # fmt: skip
    reduced = None
    if REDUCED:
        reduced = Reduced(target_to_draft_ptr, draft_width)
    rows = Rows(logits_ptr + r * row_stride, 0, vocab, processing, reduced)
    here = tl.full([], 0, tl.int64)
    table = tables_ptr + r * 2 * ENTRIES
    measure(rows, here, table_scale(sampling[0]), part, slices, table, ENTRIES, TILES)
    if arrive(counters_ptr + r, slices - 1):
        row = tl.load(row_ptr + r)
        distribution, valid = distribution_of(
            rows, here, sampling, key, race_tag(DRAFT, row), table, False, ENTRIES, TILES
        )
        tokens = tokens_ptr + r * count
        value = tl.full([], float("-inf"), tl.float32)
        token = tl.full([], -1, tl.int64)
        for child in range(0, count):
            drawn = distribution.argmax
            if drawn >= 0:
                # A point mass has one child, unless it is drawn again; a row that is not valid has one.
                over = child > 0
                if HOW == IID:
                    over = over & (valid == 0)
                if over:
                    drawn = tl.full([], NO_ID, tl.int64)
            elif (HOW == TOP) | (HOW == RACE):
                if token < NO_ID:
                    value, token = next_best(
                        rows, here, distribution, value, token, Key(key.seed, key.position + row), HOW, TILES
                    )
                drawn = token
            else:
                tl.debug_barrier()  # the tokens before were stored by one thread
                taken = 0 if HOW == IID else child
                drawn = draw_without(rows, here, distribution, tokens, taken, key, race_tag(DRAFT, row + child), TILES)
            there = drawn < NO_ID
            score = tl.full([], float("nan"), tl.float32)
            if there & valid:
                score = log_prob(load_logits(rows, here, drawn), distribution, drawn).to(tl.float32)
            tl.store(tokens + child, tl.where(there, drawn, -1))
            tl.store(logprobs_ptr + r * count + child, score)
        store_stats(stats_ptr + 3 * r, distribution, valid)


def sample_children(*arguments: Any, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """The last arguments: how many, and the number of the method; those before are of ``draw``."""
    *of_rows, count, how = arguments
    return draw(sample_children_kernel, (count,), *of_rows, out=out, HOW=how)
