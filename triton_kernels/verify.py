"""``verify_chain``: one launch. Semantics: :mod:`specdec_kernels.ops`.

Several programs measure a row, each its slice of the tiles. The last of them to finish judges the row, and the last row
of a request to be judged decides. Rows come
in the order of the drafts, so where programs start in that order, those of rows behind a draft that was not accepted
find that out and read nothing. Nobody waits for anybody.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Rule
from specdec_kernels.triton_kernels.launch import config_for, counters_at_rest, scratch_in, slices_of
from specdec_kernels.triton_kernels.laws import draft_scale_of, raw_logprob, sampling_of, table_scale
from specdec_kernels.triton_kernels.residuals import recalled_laws
from specdec_kernels.triton_kernels.rows import Key, Rows, log_prob, own_edits, tables_of
from specdec_kernels.triton_kernels.rules import MEMORY, PASSED, VALID, all_together, judge, one_by_one
from specdec_kernels.triton_kernels.teams import arrive, measure, seen

BLOCK_RULE = tl.constexpr(int(Rule.BLOCK))
COUPLED_RULE = tl.constexpr(int(Rule.COUPLED))


@triton.jit
def live_drafts(drafts, stride, most, vocab):
    """How many of ``most`` drafts there are: -1, or an id that is none, ends them."""
    live = tl.full([], 0, tl.int32)
    going = tl.full([], 1, tl.int32)
    while (live < most) & (going != 0):
        token = tl.load(drafts + live * stride).to(tl.int64)
        going = ((token >= 0) & (token < vocab)).to(tl.int32)
        live += going
    return live


@triton.jit(
    do_not_specialize=["top_k", "num_edits", "token_request_stride", "longest", "batch", "slices"]
)  # 1 would become a constant, of another type
def verify_chain_kernel(
    target_ptr,
    tokens_ptr,
    draft_ptr,
    draft_stats_ptr,
    draft_temperatures_ptr,
    draft_temperature,
    seed_ptr,
    position_ptr,
    num_draft_ptr,
    cu_rows_ptr,
    sampling_ptr,
    temperature,
    top_k,
    top_p,
    min_p,
    bitmask_ptr,
    edit_ids_ptr,
    edit_counts_ptr,
    edit_bias_ptr,
    penalties_ptr,
    num_edits,
    tables_ptr,
    memory_ptr,
    counters_ptr,
    out_tokens_ptr,
    out_accepted_ptr,
    out_valid_ptr,
    out_counters_ptr,
    out_logprobs_ptr,
    out_raw_logprobs_ptr,
    target_request_stride,
    target_row_stride,
    draft_request_stride,
    draft_row_stride,
    token_request_stride,
    token_row_stride,
    longest,
    vocab,
    batch,
    slices,
    RULE: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):
    b = (tl.program_id(0) % batch).to(tl.int64)
    i = (tl.program_id(0) // batch // slices).to(tl.int64)
    part = tl.program_id(0) // batch % slices
    key = Key(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    sampling = sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, b)
    first_row = b * (longest + 1)
    draft_scale = draft_scale_of(draft_temperatures_ptr, draft_temperature, b)
    logits = target_ptr + b * target_request_stride
    most = longest
    if cu_rows_ptr is not None:
        first_row = tl.load(cu_rows_ptr + b)
        logits = target_ptr + first_row * target_row_stride
        most = tl.minimum(most, (tl.load(cu_rows_ptr + b + 1) - first_row).to(tl.int32) - 1)
    if num_draft_ptr is not None:
        most = tl.minimum(tl.load(num_draft_ptr + b).to(tl.int32), most)
    drafts = tokens_ptr + b * token_request_stride
    drafted = live_drafts(drafts, token_row_stride, most, vocab)

    mask = None
    if bitmask_ptr is not None:
        mask = bitmask_ptr + first_row * ((vocab + 31) // 32)
    plain = Rows(logits, target_row_stride, vocab, None, None, None, None, 0, None, drafts, token_row_stride, None)
    if edit_ids_ptr is not None:
        edits, counts, bias, penalties = own_edits(
            edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, num_edits, b
        )
        rows = Rows(
            logits, target_row_stride, vocab, mask, edits, counts, bias, num_edits, penalties, drafts,
            token_row_stride, None,
        )  # fmt: skip
    else:
        rows = Rows(logits, target_row_stride, vocab, mask, None, None, None, 0, None, drafts, token_row_stride, None)
    draft_logits = None
    stats = None
    if draft_ptr is not None:
        draft_logits = draft_ptr + b * draft_request_stride
        if draft_stats_ptr is not None:
            stats = draft_stats_ptr + 3 * b * longest
    draft_rows = Rows(draft_logits, draft_row_stride, vocab, None, None, None, None, 0, None, drafts, 0, None)

    if i <= drafted:
        memory = memory_ptr + b * (longest + 1) * MEMORY
        tables = tables_of(tables_ptr, b * (longest + 1), ENTRIES)
        own = tables_of(tables, i, ENTRIES)
        # At rest all counters are 0: of every row its programs that came, rows that were judged, and how many rows from
        # the last there are behind the earliest known stop.
        arrived = counters_ptr + b * (longest + 3)
        judged = arrived + longest + 1
        stopped = judged + 1
        behind = longest + 1 - i.to(tl.int32)
        if seen(stopped) <= behind:
            measure(rows, i, table_scale(sampling[0]), part, slices, own, ENTRIES, TILES)
            if draft_ptr is not None:
                if draft_stats_ptr is None:
                    if (i < drafted) & (sampling[0] < float("inf")) & (draft_scale < float("inf")):
                        measure(draft_rows, i, draft_scale, part, slices, own + 2 * ENTRIES, ENTRIES, TILES)
        if arrive(arrived + i, slices - 1):
            tl.store(arrived + i, 0)
            # Where a program of this row read nothing, the stop it saw can be seen here.
            if seen(stopped) <= behind:
                passed = judge(
                    rows, draft_rows, stats, draft_scale, i, drafted, sampling, key, own, memory, RULE, ENTRIES, TILES
                )  # fmt: skip
                if RULE != BLOCK_RULE:
                    if not INDEPENDENT:
                        if passed == 0:
                            tl.atomic_max(stopped, behind)
            if arrive(judged, drafted):
                tl.store(judged, 0)
                tl.store(stopped, 0)
                if RULE == BLOCK_RULE:
                    kept, emitted, valid = all_together(rows, draft_rows, drafted, key, tables, memory, ENTRIES, TILES)
                else:
                    kept, emitted, valid = one_by_one(
                        rows, draft_rows, drafted, key, tables, memory, RULE, ENTRIES, TILES
                    )
                independent = tl.full([], -1, tl.int32)
                if INDEPENDENT:
                    independent = tl.full([], 0, tl.int32)
                    for index in range(0, drafted):
                        independent += (tl.load(memory + index * MEMORY + PASSED) != 0).to(tl.int32)
                tl.store(out_accepted_ptr + b, kept.to(tl.int32))
                tl.store(out_valid_ptr + b, valid)
                tl.store(out_counters_ptr + 2 * b, drafted)
                tl.store(out_counters_ptr + 2 * b + 1, independent)
                out = b * (longest + 1)
                for index in range(0, longest + 1):
                    token = tl.where(index == kept, emitted, -1)
                    if index < kept:
                        token = tl.load(drafts + index * token_row_stride).to(tl.int64)
                    tl.store(out_tokens_ptr + out + index, token)
                    if out_logprobs_ptr is not None:
                        score = tl.full([], float("nan"), tl.float64)
                        raw_score = tl.full([], float("nan"), tl.float32)
                        if index <= kept:
                            row = tl.full([], 0, tl.int64) + index
                            place = memory + row * MEMORY
                            if tl.load(place + VALID) != 0:
                                unit = tl.full([], 1.0, tl.float64)
                                law, _draft, _divided = recalled_laws(place, unit)
                                score = log_prob(rows, row, law, token)
                            raw_score = raw_logprob(plain, row, token, key, own, ENTRIES, TILES)
                        tl.store(out_logprobs_ptr + out + index, score.to(tl.float32))
                        tl.store(out_raw_logprobs_ptr + out + index, raw_score)


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    draft_temperatures: Tensor | None,
    draft_temperature: float,
    seed: Tensor,
    position: Tensor,
    num_draft: Tensor | None,
    cu_rows: Tensor | None,
    sampling: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    bitmask: Tensor | None,
    edit_ids: Tensor | None,
    edit_counts: Tensor | None,
    edit_bias: Tensor | None,
    penalties: Tensor | None,
    rule: int,
    logprobs: bool,
    independent: bool,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows, vocab = draft_tokens.shape[0], draft_tokens.shape[1] + 1, target_logits.shape[-1]

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return target_logits.new_empty(shape, dtype=dtype)

    tokens, accepted = empty(torch.int64, batch, rows), empty(torch.int32, batch)
    valid, counters = empty(torch.bool, batch), empty(torch.int32, batch, 2)
    scores, raw_scores = (empty(torch.float32, *((batch, rows) if logprobs else (0,))) for _ in range(2))
    if batch:
        config = config_for(target_logits, bitmask, edit_ids, large=rule == Rule.BLOCK)
        sizes = batch * (rows + 2), batch * rows * MEMORY.value, batch * rows * 4 * config.entries
        if workspace is not None:
            at_rest, memory, tables = scratch_in(workspace, *sizes)
        else:
            at_rest = counters_at_rest(sizes[0], target_logits.device)
            memory = empty(torch.float64, sizes[1])
            tables = empty(torch.float32, sizes[2])
        slices = slices_of(batch * rows, config, target_logits.device)
        if rule == Rule.COUPLED:
            draft_logits = draft_stats = draft_temperatures = None
        draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
        target_strides = target_logits.stride()[:2] if cu_rows is None else (0, target_logits.stride(0))
        verify_chain_kernel[(batch * rows * slices,)](
            target_logits, draft_tokens, draft_logits, draft_stats, draft_temperatures,
            draft_temperature, seed, position, num_draft, cu_rows, sampling, temperature, top_k, top_p, min_p,
            bitmask, edit_ids, edit_counts, edit_bias, penalties, 0 if edit_ids is None else edit_ids.shape[1], tables,
            memory, at_rest, tokens, accepted, valid, counters,
            scores if logprobs else None, raw_scores if logprobs else None, *target_strides,
            *draft_strides, *draft_tokens.stride(), rows - 1, vocab, batch, slices, RULE=rule,
            INDEPENDENT=independent, **config.constants, **config.options,
        )  # fmt: skip
    return tokens, accepted, valid, counters, scores, raw_scores
