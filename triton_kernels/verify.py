"""``verify_chain``: one program a request. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Rule
from specdec_kernels.triton_kernels.launch import config_for
from specdec_kernels.triton_kernels.laws import sampling_of, token_logprob, unfiltered
from specdec_kernels.triton_kernels.rows import Key, Rows, own_edits
from specdec_kernels.triton_kernels.rules import MEMORY, all_together, one_by_one

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


@triton.jit(do_not_specialize=["top_k", "num_edits", "longest"])  # 1 would become a constant, of another type
def verify_chain_kernel(
    target_ptr,
    tokens_ptr,
    draft_ptr,
    draft_stats_ptr,
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
    memory_ptr,
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
    RULE: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    TILES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    key = Key(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    sampling = sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, b)
    first_row = b * (longest + 1)
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
    draft_rows = None
    stats = None
    if draft_ptr is not None:
        draft_logits = draft_ptr + b * draft_request_stride
        draft_rows = Rows(draft_logits, draft_row_stride, vocab, None, None, None, None, 0, None, drafts, 0, None)
        if draft_stats_ptr is not None:
            stats = draft_stats_ptr + 3 * b * longest

    independent = tl.full([], -1, tl.int32)
    if RULE == BLOCK_RULE:
        memory = memory_ptr + b * longest * MEMORY
        kept, emitted, valid = all_together(rows, draft_rows, stats, drafted, sampling, key, memory, TILES)
    else:
        kept, emitted, valid, alone = one_by_one(
            rows, draft_rows, stats, drafted, sampling, key, RULE, INDEPENDENT, TILES
        )
        if INDEPENDENT:
            independent = alone

    out = b * (longest + 1)
    tl.store(out_accepted_ptr + b, kept.to(tl.int32))
    tl.store(out_valid_ptr + b, valid != 0)
    tl.store(out_counters_ptr + 2 * b, drafted)
    tl.store(out_counters_ptr + 2 * b + 1, independent)
    for index in range(0, longest + 1):
        token = tl.where(index == kept, emitted, -1)
        if index < kept:
            token = tl.load(drafts + index * token_row_stride).to(tl.int64)
        tl.store(out_tokens_ptr + out + index, token)
        if out_logprobs_ptr is not None:
            score = tl.full([], float("nan"), tl.float32)
            raw_score = tl.full([], float("nan"), tl.float32)
            if index <= kept:
                i = tl.full([], 0, tl.int64) + index
                score = token_logprob(rows, i, token, sampling, key, TILES)
                raw_score = token_logprob(plain, i, token, unfiltered(), key, TILES)
            tl.store(out_logprobs_ptr + out + index, score)
            tl.store(out_raw_logprobs_ptr + out + index, raw_score)


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows, vocab = draft_tokens.shape[0], draft_tokens.shape[1] + 1, target_logits.shape[-1]

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return target_logits.new_empty(shape, dtype=dtype)

    tokens, accepted = empty(torch.int64, batch, rows), empty(torch.int32, batch)
    valid, counters = empty(torch.bool, batch), empty(torch.int32, batch, 2)
    scores, raw_scores = (empty(torch.float32, *((batch, rows) if logprobs else (0,))) for _ in range(2))
    if batch:
        config = config_for(target_logits)
        # A kernel wants pointers of one type, used or not.
        memory = empty(torch.float64, (batch * (rows - 1) if rule == Rule.BLOCK else 0) * MEMORY.value)
        if rule == Rule.COUPLED:
            draft_logits = draft_stats = None
        draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
        target_strides = target_logits.stride()[:2] if cu_rows is None else (0, target_logits.stride(0))
        verify_chain_kernel[(batch,)](
            target_logits, draft_tokens, draft_logits, draft_stats, seed, position, num_draft, cu_rows, sampling,
            temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts, edit_bias, penalties,
            0 if edit_ids is None else edit_ids.shape[1], memory, tokens, accepted, valid, counters,
            scores if logprobs else None, raw_scores if logprobs else None, *target_strides, *draft_strides,
            *draft_tokens.stride(), rows - 1, vocab, RULE=rule, INDEPENDENT=independent, TILES=config.tiles,
            **config.options,
        )  # fmt: skip
    return tokens, accepted, valid, counters, scores, raw_scores
