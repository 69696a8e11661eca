"""``verify_chain``: one launch. Semantics: :mod:`specdec_kernels.ops`.

Several programs measure a row, each its slice of the tiles. The last of them to finish judges the row, and whoever
completes the path decides: rows come in the order of the drafts, so where programs begin in that order, those of rows
behind a draft that was not accepted find that out and read nothing. Rule block looks at every row: the last to be
judged finds what residuals have to be summed, and programs that begin later do that, each a slice of a row again.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Rule
from specdec_kernels.triton_kernels.arguments import (
    BITMASK,
    CU_ROWS,
    INDEPENDENT,
    LOGPROBS,
    NUM_DRAFT,
    SAMPLING,
    given,
    instead,
    processing_arguments,
)
from specdec_kernels.triton_kernels.arrivals import JUDGED, NEXT, arrive, follow, passed_by, rest, ticket, wait
from specdec_kernels.triton_kernels.distributions import sampling_of, table_scale
from specdec_kernels.triton_kernels.draws import STATE, Drafts, draft_scale_of, measure_draft, measure_residual
from specdec_kernels.triton_kernels.launch import config_for, empty, launch, scratch, scratch_in, slices_of
from specdec_kernels.triton_kernels.rows import Key, Reduced, Rows, measure, processing_of
from specdec_kernels.triton_kernels.rules import (
    BLOCK_RULE,
    COUPLED_RULE,
    VALID,
    end_block,
    end_chain,
    find_path_probs,
    judge_draft,
    load_divided,
    logprobs_of,
    wants_mass,
)


@triton.jit
def count_drafts(tokens, stride, most, vocab):
    """How many of ``most`` drafts there are: -1, or an id that is none, ends them."""
    drafted = tl.full([], 0, tl.int32)
    going = most > 0
    while going:
        token = tl.load(tokens + drafted * stride).to(tl.int64)
        going = (token >= 0) & (token < vocab)
        drafted += going.to(tl.int32)
        going = going & (drafted < most)
    return drafted


@triton.jit(
    do_not_specialize=[
        "top_k", "adjustments", "draft_width", "token_request_stride", "longest", "batch", "slices", "flags",
    ]
)  # fmt: skip # 1 would become a constant, of another type
def verify_chain_kernel(
    target_ptr, tokens_ptr, draft_ptr, draft_stats_ptr, target_to_draft_ptr, draft_temperatures_ptr, draft_temperature,
    seed_ptr, position_ptr, num_draft_ptr, cu_rows_ptr, sampling_ptr, temperature, top_k, top_p, min_p, bitmask_ptr,
    edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, adjustments, tables_ptr, states_ptr, counters_ptr,
    out_tokens_ptr, out_accepted_ptr, out_valid_ptr, out_counters_ptr, out_logprobs_ptr, out_raw_logprobs_ptr,
    target_request_stride, target_row_stride, draft_request_stride, draft_row_stride, draft_width,
    token_request_stride, token_row_stride, longest, vocab, batch, slices, flags, RULE: tl.constexpr,
    PROCESSED: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) % batch).to(tl.int64)
    # At rest all counters are 0: of every row its programs that came (see `follow`), how many rows are done, and how
    # far the path is known or, of rule block, how many programs began.
    arrived = counters_ptr + b * (longest + 3)
    done = arrived + longest + 1
    frontier = done + 1
    own = tl.program_id(0) // batch
    if RULE == BLOCK_RULE:
        own = ticket(frontier, 2 * (longest + 1) * slices)
    i = (own // slices % (longest + 1)).to(tl.int64)
    part = own % slices

    key = Key(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    sampling = sampling_of(sampling_ptr, flags & SAMPLING != 0, temperature, top_k, top_p, min_p, b)
    first_row = b * (longest + 1)
    logits = target_ptr + b * target_request_stride
    most = longest
    if flags & CU_ROWS != 0:
        first_row = tl.load(cu_rows_ptr + b)
        logits = target_ptr + first_row * target_row_stride
        most = tl.minimum(most, (tl.load(cu_rows_ptr + b + 1) - first_row).to(tl.int32) - 1)
    if flags & NUM_DRAFT != 0:
        most = tl.minimum(tl.load(num_draft_ptr + b).to(tl.int32), most)
    tokens = tokens_ptr + b * token_request_stride
    drafted = count_drafts(tokens, token_row_stride, most, vocab)
    plain = Rows(logits, target_row_stride, vocab, None, None)
    if PROCESSED:
        processing = processing_of(
            bitmask_ptr, flags & BITMASK != 0, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr,
            adjustments, first_row, b, vocab, tokens - token_row_stride, token_row_stride, seed_ptr, True,
        )  # fmt: skip
        rows = Rows(logits, target_row_stride, vocab, processing, None)
    else:
        rows = plain
    draft_logits = draft_ptr + b * draft_request_stride
    draft_rows = Rows(draft_logits, draft_row_stride, vocab, None, None)
    reduced_rows = Rows(draft_logits, draft_row_stride, vocab, None, Reduced(target_to_draft_ptr, draft_width))
    draft_scale = draft_scale_of(draft_temperatures_ptr, flags, draft_temperature, b)
    drafts = Drafts(draft_rows, reduced_rows, draft_stats_ptr + 3 * b * longest, draft_scale, flags)
    states = states_ptr + b * (longest + 1) * STATE
    tables = tables_ptr + b * (longest + 1) * 4 * ENTRIES
    table = tables + i * 4 * ENTRIES

    end = tl.full([], -1, tl.int64)
    drawn = tl.full([], -1, tl.int64)
    valid = tl.full([], 0, tl.int1)
    if (i <= drafted) & (own < (longest + 1) * slices):
        every = (RULE == BLOCK_RULE) | (flags & INDEPENDENT != 0)
        if every | (passed_by(frontier, seed_ptr, i, False) == 0):
            measure(rows, i, table_scale(sampling[0]), part, slices, table, ENTRIES, TILES)
            if RULE != COUPLED_RULE:
                if (i < drafted) & (sampling[0] < float("inf")):
                    measure_draft(drafts, i, part, slices, table + 2 * ENTRIES, ENTRIES, TILES)
        if arrive(arrived + i, slices - 1):
            # Where a program of this row read nothing, the end that it saw can be seen here.
            if every | (passed_by(frontier, seed_ptr, i, False) == 0):
                judge_draft(
                    rows, drafts, tokens, token_row_stride, i, drafted, sampling, key, table, states, RULE, ENTRIES,
                    TILES,
                )  # fmt: skip
                if RULE != BLOCK_RULE:
                    end = follow(arrived, frontier, states, i)
                    if end >= 0:
                        drawn, valid = end_chain(
                            rows, drafts, drafted, end, key, tables + end * 4 * ENTRIES, states, RULE, ENTRIES, TILES
                        )
            if arrive(done, drafted):
                if RULE == BLOCK_RULE:
                    find_path_probs(drafted, states)
                    tl.debug_barrier()
                    tl.atomic_add(done, JUDGED, sem="release")
                else:
                    independent = tl.full([], 0, tl.int32)
                    for index in range(0, drafted):
                        independent += (tl.load(states + index * STATE + NEXT) >= 0).to(tl.int32)
                    tl.store(out_counters_ptr + 2 * b + 1, tl.where(flags & INDEPENDENT != 0, independent, -1))
                    rest(arrived, longest + 3)
    if RULE == BLOCK_RULE:
        if (i <= drafted) & (own >= (longest + 1) * slices):
            wait(done, JUDGED)
            if wants_mass(i, states):
                target, divided, _path_prob = load_divided(states + i * STATE)
                measure_residual(
                    rows, drafts, i, target, divided, None, part, slices, table + 2 * ENTRIES, ENTRIES, TILES
                )
            if arrive(arrived, ((drafted + 1) * slices - 1).to(tl.int32)):
                tl.store(done, 0)
                end, drawn, valid = end_block(rows, drafts, drafted, key, tables, states, ENTRIES, TILES)
                tl.store(out_counters_ptr + 2 * b + 1, -1)

    if end >= 0:
        tl.store(out_accepted_ptr + b, end.to(tl.int32))
        tl.store(out_valid_ptr + b, valid)
        tl.store(out_counters_ptr + 2 * b, drafted)
        out = b * (longest + 1)
        for index in range(0, longest + 1):
            row = tl.full([], 0, tl.int64) + index
            token = tl.where(row == end, drawn, -1)
            if row < end:
                token = tl.load(tokens + row * token_row_stride).to(tl.int64)
            tl.store(out_tokens_ptr + out + row, token)
            if flags & LOGPROBS != 0:
                score = tl.full([], float("nan"), tl.float32)
                raw_score = score
                if row <= end:
                    place = states + row * STATE
                    usable = tl.load(place + VALID) != 0
                    score, raw_score = logprobs_of(
                        rows, plain, row, token, key, tables + row * 4 * ENTRIES, place, usable, ENTRIES, TILES
                    )
                tl.store(out_logprobs_ptr + out + row, score)
                tl.store(out_raw_logprobs_ptr + out + row, raw_score)


def verify_chain(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, draft_stats: Tensor | None,
    target_to_draft: Tensor | None, draft_temperatures: Tensor | None, draft_temperature: float, seed: Tensor,
    position: Tensor, num_draft: Tensor | None, cu_rows: Tensor | None, sampling: Tensor | None, temperature: float,
    top_k: int, top_p: float, min_p: float, bitmask: Tensor | None, edit_ids: Tensor | None, edit_counts: Tensor | None,
    edit_bias: Tensor | None, penalties: Tensor | None, rule: int, logprobs: bool, independent: bool,
    workspace: Tensor | None = None, *, out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, rows, vocab = draft_tokens.shape[0], draft_tokens.shape[1] + 1, target_logits.shape[-1]
    if out is None:
        score = torch.float32, (batch, rows) if logprobs else (0,)
        counts = (torch.int32, (batch,)), (torch.bool, (batch,)), (torch.int32, (batch, 2))
        out = empty(target_logits, (torch.int64, (batch, rows)), *counts, score, score)
    tokens, accepted, valid, counters, scores, raw_scores = out
    if batch:
        config = config_for(vocab, target_logits.device, bitmask, edit_ids, large=rule == Rule.BLOCK)
        sizes = batch * (rows + 2), batch * rows * STATE.value, batch * rows * 4 * config.entries
        own = scratch(target_logits.device, *sizes) if workspace is None else scratch_in(workspace, *sizes)
        at_rest, states, tables = own
        slices = slices_of(batch * rows, config, target_logits.device)
        if rule == Rule.COUPLED:
            draft_logits = draft_stats = target_to_draft = draft_temperatures = None
        flags = given(
            sampling=sampling, bitmask=bitmask, draft_logits=draft_logits, draft_stats=draft_stats,
            draft_temperatures=draft_temperatures, num_draft=num_draft, cu_rows=cu_rows, logprobs=logprobs,
            independent=independent, reduced=target_to_draft,
        )  # fmt: skip
        drafted = (0, 0, vocab) if draft_logits is None else (*draft_logits.stride()[:2], draft_logits.shape[2])
        target_strides = target_logits.stride()[:2] if cu_rows is None else (0, target_logits.stride(0))
        launch(
            verify_chain_kernel, batch * rows * slices * (2 if rule == Rule.BLOCK else 1), target_logits, draft_tokens,
            instead(draft_logits, target_logits), instead(draft_stats, tables), instead(target_to_draft, at_rest),
            instead(draft_temperatures, tables), draft_temperature, seed, position, instead(num_draft, seed),
            instead(cu_rows, seed), instead(sampling, tables), temperature, top_k, top_p, min_p,
            *processing_arguments(bitmask, edit_ids, edit_counts, edit_bias, penalties, at_rest, tables), tables,
            states, at_rest, tokens, accepted, valid, counters, scores if logprobs else tables,
            raw_scores if logprobs else tables, *target_strides, *drafted, *draft_tokens.stride(), rows - 1,
            vocab, batch, slices, flags, RULE=rule, PROCESSED=bitmask is not None or edit_ids is not None,
            **config.named,
        )  # fmt: skip
    return out
