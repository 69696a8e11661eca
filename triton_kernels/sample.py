"""``sample`` and ``sample_children``: one launch. Semantics: :mod:`specdec_kernels.ops` and
:mod:`specdec_kernels.ops.tree_rules`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Children, Purpose, numbers_of
from specdec_kernels.triton_kernels.arguments import BITMASK, SAMPLING, flags_of, instead, processing_arguments
from specdec_kernels.triton_kernels.arrivals import arrive
from specdec_kernels.triton_kernels.distribution import (
    NOTHING_LEFT,
    distribution_of,
    draw_from_row,
    flat_race,
    next_id,
    race_tag,
    sampling_of,
    table_scale,
)
from specdec_kernels.triton_kernels.launch import config_for, empty, launch, scratch, slices_of
from specdec_kernels.triton_kernels.residual import Drawn, draw_residual, measure_residual, measured_mass
from specdec_kernels.triton_kernels.rows import (
    DRAFTS,
    NO_ID,
    NUMBERS,
    Key,
    Reduced,
    Rows,
    Tree,
    load_logits,
    log_prob,
    measure,
    probs,
    processing_of,
)

DRAFT = tl.constexpr(int(Purpose.DRAFT))
#: By the numbers that the operators take. One token a row is by "one", or by "coupled".
CHILDREN = tuple(numbers_of(Children))


@triton.jit
def draw_without(
    rows, i, distribution, before, key, tag, table, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """A token by the two-level race, none of those drawn ``before``; ``NO_ID`` where they left nothing."""
    drawn = draw_residual(rows, None, i, distribution, None, before, key, tag, table, ENTRIES)
    if drawn < NO_ID:
        if probs(load_logits(rows, i, drawn), distribution) < NOTHING_LEFT:
            sums = table + DRAFTS * ENTRIES
            measure_residual(rows, None, i, distribution, None, before, 0, 1, sums, ENTRIES, TILES)
            tl.debug_barrier()
            if measured_mass(rows, sums, ENTRIES) < NOTHING_LEFT:
                drawn = tl.full([], NO_ID, tl.int64)
    return drawn


@triton.jit(do_not_specialize=["top_k", "adjustments", "draft_width", "count", "slices", "flags"])  # 1: a constant
def sample_kernel(
    logits_ptr, target_to_draft_ptr, seed_ptr, position_ptr, row_ptr, sampling_ptr, temperature, top_k, top_p, min_p,
    bitmask_ptr, adjusted_ids_ptr, id_counts_ptr, id_bias_ptr, penalties_ptr, adjustments, tokens_ptr, logprobs_ptr,
    stats_ptr, tables_ptr, counters_ptr, row_stride, draft_width, vocab, slices, flags, count, METHOD: tl.constexpr,
    PROCESSED: tl.constexpr, REDUCED: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) // slices).to(tl.int64)
    part = tl.program_id(0) % slices
    key = Key(tl.load(seed_ptr + r), tl.load(position_ptr + r))
    sampling = sampling_of(sampling_ptr, flags & SAMPLING != 0, temperature, top_k, top_p, min_p, r)
    processing = None
    if PROCESSED:
        processing = processing_of(
            bitmask_ptr, flags & BITMASK != 0, adjusted_ids_ptr, id_counts_ptr, id_bias_ptr, penalties_ptr, adjustments,
            r, r, vocab,
        )  # fmt: skip
    tree = Tree(None, row_ptr, 0, 1, vocab)
    reduced = None
    if REDUCED:
        reduced = Reduced(target_to_draft_ptr, draft_width)
    rows = Rows(logits_ptr + r * row_stride, 0, vocab, tree, processing, reduced)
    here = tl.full([], 0, tl.int64)
    table = tables_ptr + r * NUMBERS * ENTRIES
    row = tl.load(row_ptr + r)
    race = None
    if METHOD == "coupled":
        race = Key(key.seed, key.position + row)
    measure(rows, here, table_scale(sampling[0]), race, part, slices, table, ENTRIES, TILES)
    if arrive(counters_ptr + r, slices - 1):
        tag = race_tag(DRAFT, row)
        distribution, valid = distribution_of(rows, here, sampling, key, tag, race, table, ENTRIES, TILES)
        tokens = tokens_ptr + r * count
        value = tl.full([], float("-inf"), tl.float32)
        token = tl.full([], -1, tl.int64)
        for child in range(0, count):
            drawn = distribution.argmax
            if drawn >= 0:
                # A point mass has one child, unless it is drawn again; a row that is not valid has one.
                over = child > 0
                if METHOD == "iid":
                    over = over & (valid == 0)
                if over:
                    drawn = tl.full([], NO_ID, tl.int64)
            elif METHOD == "one":
                drawn = draw_from_row(rows, here, distribution, key, tag)
            elif METHOD == "coupled":
                drawn = flat_race(rows, distribution, table, ENTRIES)
            elif (METHOD == "top") | (METHOD == "race"):
                if token < NO_ID:
                    at_row = Key(key.seed, key.position + row)
                    value, token = next_id(rows, here, distribution, at_row, value, token, METHOD == "race", TILES)
                drawn = token
            else:
                tl.debug_barrier()  # the tokens before were stored by one thread
                before = Drawn(tokens, 0 if METHOD == "iid" else child)
                child_tag = race_tag(DRAFT, row + child)
                drawn = draw_without(rows, here, distribution, before, key, child_tag, table, ENTRIES, TILES)
            there = drawn < NO_ID
            score = tl.full([], float("nan"), tl.float32)
            if there & valid:
                score = log_prob(load_logits(rows, here, drawn), distribution, drawn).to(tl.float32)
            tl.store(tokens + child, tl.where(there, drawn, -1))
            tl.store(logprobs_ptr + r * count + child, score)
        nan = float("nan")
        tl.store(stats_ptr + 3 * r, tl.where(valid, distribution.scale, nan))
        tl.store(stats_ptr + 3 * r + 1, tl.where(valid, distribution.cutoff, nan))
        tl.store(stats_ptr + 3 * r + 2, tl.where(valid, distribution.logsumexp.to(tl.float32), nan))


def launch_sample(
    method: str, count: int, columns: tuple[int, ...], logits: Tensor, target_to_draft: Tensor | None, seed: Tensor,
    position: Tensor, row: Tensor, sampling: Tensor | None, temperature: float, top_k: int, top_p: float, min_p: float,
    bitmask: Tensor | None, adjusted_ids: Tensor | None, id_counts: Tensor | None, id_bias: Tensor | None,
    penalties: Tensor | None, *, out: tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``count`` tokens of each row, which have ``columns``; their log-probabilities, and the scalars of the
    distributions."""
    rows, width = logits.shape
    vocab = width if target_to_draft is None else target_to_draft.shape[0]
    if out is None:
        drawn = rows, *columns
        out = empty(logits, (torch.int64, drawn), (torch.float32, drawn), (torch.float32, (rows, 3)))
    tokens, logprobs, stats = out
    if rows:
        large, race = target_to_draft is not None, method == "coupled"
        config = config_for(vocab, logits.device, bitmask, adjusted_ids, large=large, race=race)
        counters, _, tables = scratch(logits.device, rows, 0, rows * NUMBERS.value * config.entries)
        slices = slices_of(rows, config, logits.device)
        launch(
            sample_kernel, rows * slices, logits, instead(target_to_draft, counters), seed, position, row,
            instead(sampling, tables), temperature, top_k, top_p, min_p,
            *processing_arguments(bitmask, adjusted_ids, id_counts, id_bias, penalties, counters, tables),
            tokens, logprobs, stats, tables, counters, logits.stride(0), width, vocab, slices,
            flags_of(sampling=sampling, bitmask=bitmask), count, METHOD=method,
            PROCESSED=bitmask is not None or adjusted_ids is not None, REDUCED=target_to_draft is not None,
            **config.named,
        )  # fmt: skip
    return out


def sample(*arguments: Any, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """The last argument: whether by the coupled rule; those before are of ``launch_sample``, from ``logits`` on."""
    return launch_sample("coupled" if arguments[-1] else "one", 1, (), *arguments[:-1], out=out)


def sample_children(*arguments: Any, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """The last arguments: how many, and the number of the method; those before are as for ``sample``."""
    *of_rows, count, method = arguments
    return launch_sample(CHILDREN[method], count, (count,), *of_rows, out=out)
