"""``sample``: one launch. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Purpose
from specdec_kernels.triton_kernels.launch import config_for, counters_at_rest, slices_of
from specdec_kernels.triton_kernels.laws import sampling_of, table_scale, tabled_law
from specdec_kernels.triton_kernels.rows import Key, Rows, draw_from_row, flat_race, log_prob, own_edits, race_tag
from specdec_kernels.triton_kernels.teams import arrive, measure

DRAFT = tl.constexpr(int(Purpose.DRAFT))


@triton.jit(do_not_specialize=["top_k", "num_edits", "slices"])  # 1 would become a constant, of another type
def sample_kernel(
    logits_ptr,
    seed_ptr,
    position_ptr,
    row_ptr,
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
    tokens_ptr,
    logprobs_ptr,
    stats_ptr,
    tables_ptr,
    counters_ptr,
    row_stride,
    vocab,
    slices,
    COUPLED_RULE: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):
    r = (tl.program_id(0) // slices).to(tl.int64)
    part = tl.program_id(0) % slices
    key = Key(tl.load(seed_ptr + r), tl.load(position_ptr + r))
    sampling = sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, r)
    mask = None
    if bitmask_ptr is not None:
        mask = bitmask_ptr + r * ((vocab + 31) // 32)
    if edit_ids_ptr is not None:
        edits, counts, bias, penalties = own_edits(
            edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, num_edits, r
        )
        rows = Rows(
            logits_ptr + r * row_stride, 0, vocab, mask, edits, counts, bias, num_edits, penalties, row_ptr, 0, None
        )
    else:
        rows = Rows(logits_ptr + r * row_stride, 0, vocab, mask, None, None, None, 0, None, row_ptr, 0, None)
    here = tl.full([], 0, tl.int64)
    table = tables_ptr + r * 2 * ENTRIES
    measure(rows, here, table_scale(sampling[0]), part, slices, table, ENTRIES, TILES)
    if arrive(counters_ptr + r, slices - 1):
        tl.store(counters_ptr + r, 0)
        row = tl.load(row_ptr + r)
        tag = race_tag(DRAFT, row)
        law, valid = tabled_law(rows, here, sampling, key, tag, table, True, ENTRIES, TILES)
        token = law.argmax
        if token < 0:
            if COUPLED_RULE:
                token = flat_race(rows, here, law, Key(key.seed, key.position + row), TILES)
            else:
                token = draw_from_row(rows, here, law, key, tag)
        logprob = log_prob(rows, here, law, token)
        nan = float("nan")
        tl.store(tokens_ptr + r, token)
        tl.store(logprobs_ptr + r, tl.where(valid, logprob.to(tl.float32), nan))
        tl.store(stats_ptr + 3 * r, tl.where(valid, law.scale, nan))
        tl.store(stats_ptr + 3 * r + 1, tl.where(valid, law.cutoff, nan))
        tl.store(stats_ptr + 3 * r + 2, tl.where(valid, law.logsumexp.to(tl.float32), nan))


def sample(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    row: Tensor,
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
    coupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens = logits.new_empty((rows,), dtype=torch.int64)
    logprobs = logits.new_empty((rows,), dtype=torch.float32)
    stats = logits.new_empty((rows, 3), dtype=torch.float32)
    if rows:
        config = config_for(logits, bitmask, edit_ids)
        tables = logits.new_empty((rows, 2 * config.entries), dtype=torch.float32)
        slices = slices_of(rows, config, logits.device)
        sample_kernel[(rows * slices,)](
            logits, seed, position, row, sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts,
            edit_bias, penalties, 0 if edit_ids is None else edit_ids.shape[1], tokens, logprobs, stats, tables,
            counters_at_rest(rows, logits.device), logits.stride(0), vocab, slices, COUPLED_RULE=coupled,
            **config.constants, **config.options,
        )  # fmt: skip
    return tokens, logprobs, stats
