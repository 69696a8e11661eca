"""``sample``: one launch. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from specdec_kernels.contract import Purpose
from specdec_kernels.triton_kernels.arguments import BITMASK, SAMPLING, given, instead, processing_arguments
from specdec_kernels.triton_kernels.arrivals import arrive
from specdec_kernels.triton_kernels.distributions import distribution_of, sampling_of, table_scale
from specdec_kernels.triton_kernels.draws import draw_from_row, flat_race, race_tag
from specdec_kernels.triton_kernels.launch import config_for, empty, launch, scratch, slices_of
from specdec_kernels.triton_kernels.rows import Key, Reduced, Rows, load_logits, log_prob, measure, processing_of

DRAFT = tl.constexpr(int(Purpose.DRAFT))


@triton.jit
def store_stats(stats, distribution, valid):
    """The three scalars; nan of a row that is not valid."""
    nan = float("nan")
    tl.store(stats, tl.where(valid, distribution.scale, nan))
    tl.store(stats + 1, tl.where(valid, distribution.cutoff, nan))
    tl.store(stats + 2, tl.where(valid, distribution.logsumexp.to(tl.float32), nan))


@triton.jit(do_not_specialize=["top_k", "adjustments", "draft_width", "slices", "flags"])  # 1 would become a constant
def sample_kernel(
    logits_ptr, target_to_draft_ptr, seed_ptr, position_ptr, row_ptr, sampling_ptr, temperature, top_k, top_p, min_p,
    bitmask_ptr, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, adjustments, tokens_ptr, logprobs_ptr,
    stats_ptr, tables_ptr, counters_ptr, row_stride, draft_width, vocab, slices, flags, COUPLED_RULE: tl.constexpr,
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
        tag = race_tag(DRAFT, row)
        distribution, valid = distribution_of(rows, here, sampling, key, tag, table, True, ENTRIES, TILES)
        token = distribution.argmax
        if token < 0:
            if COUPLED_RULE:
                token = flat_race(rows, here, distribution, Key(key.seed, key.position + row), TILES)
            else:
                token = draw_from_row(rows, here, distribution, key, tag)
        logprob = log_prob(load_logits(rows, here, token), distribution, token).to(tl.float32)
        tl.store(tokens_ptr + r, token)
        tl.store(logprobs_ptr + r, tl.where(valid, logprob, float("nan")))
        store_stats(stats_ptr + 3 * r, distribution, valid)


def draw(
    kernel: JITFunction[Any], columns: tuple[int, ...], logits: Tensor, target_to_draft: Tensor | None, seed: Tensor,
    position: Tensor, row: Tensor, sampling: Tensor | None, temperature: float, top_k: int, top_p: float, min_p: float,
    bitmask: Tensor | None, edit_ids: Tensor | None, edit_counts: Tensor | None, edit_bias: Tensor | None,
    penalties: Tensor | None, *, out: tuple[Tensor, ...] | None, **constants: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch a kernel that draws ``columns`` tokens from each row: the tokens, their log-probabilities, and the scalars
    of the distributions."""
    rows, width = logits.shape
    vocab = width if target_to_draft is None else target_to_draft.shape[0]
    if out is None:
        drawn = rows, *columns
        out = empty(logits, (torch.int64, drawn), (torch.float32, drawn), (torch.float32, (rows, 3)))
    tokens, logprobs, stats = out
    if rows:
        config = config_for(vocab, logits.device, bitmask, edit_ids, large=target_to_draft is not None)
        counters, _, tables = scratch(logits.device, rows, 0, rows * 2 * config.entries)
        slices = slices_of(rows, config, logits.device)
        launch(
            kernel, rows * slices, logits, instead(target_to_draft, counters), seed, position, row,
            instead(sampling, tables), temperature, top_k, top_p, min_p,
            *processing_arguments(bitmask, edit_ids, edit_counts, edit_bias, penalties, counters, tables),
            tokens, logprobs, stats, tables, counters, logits.stride(0), width, vocab, slices,
            given(sampling=sampling, bitmask=bitmask), *columns, **constants,
            PROCESSED=bitmask is not None or edit_ids is not None, REDUCED=target_to_draft is not None, **config.named,
        )  # fmt: skip
    return out


def sample(*arguments: Any, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """The last argument: whether by the coupled rule; those before are of ``draw``."""
    return draw(sample_kernel, (), *arguments[:-1], out=out, COUPLED_RULE=arguments[-1])
