"""``sample``: one program a row. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Purpose
from specdec_kernels.triton_kernels.launch import config_for
from specdec_kernels.triton_kernels.laws import row_law, sampling_of
from specdec_kernels.triton_kernels.rows import draw_from_row, flat_race, load_logit, race_tag, row_argmax, source_of

DRAFT = tl.constexpr(int(Purpose.DRAFT))


@triton.jit
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
    row_stride,
    vocab,
    COUPLED_RULE: tl.constexpr,
    TILES: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    seed, position = tl.load(seed_ptr + r), tl.load(position_ptr + r)
    scale, top_k, top_p, min_p = sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, r)
    source = source_of(
        logits_ptr + r * row_stride, bitmask_ptr, r, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr,
        num_edits, r, row_ptr, 0, 0, vocab,
    )  # fmt: skip
    logprob = tl.full([], 0.0, tl.float64)
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    if scale == float("inf"):
        cutoff, token, valid = row_argmax(source, vocab, TILES)
    else:
        row = tl.load(row_ptr + r)
        tag = race_tag(DRAFT, row)
        logsumexp, tile, valid, cutoff = row_law(
            source, scale, top_k, top_p, min_p, vocab, seed, position, tag, True, TILES
        )
        if valid:
            if COUPLED_RULE:
                token = flat_race(source, scale, cutoff, logsumexp, vocab, seed, position + row, TILES)
            else:
                token = draw_from_row(source, scale, cutoff, logsumexp, tile, vocab, seed, position, tag)
            logprob = scale.to(tl.float64) * load_logit(source, token, vocab) - logsumexp
        else:
            _top, token, _valid = row_argmax(source, vocab, TILES)
    nan = float("nan")
    tl.store(tokens_ptr + r, token)
    tl.store(logprobs_ptr + r, tl.where(valid, logprob.to(tl.float32), nan))
    tl.store(stats_ptr + 3 * r, tl.where(valid, scale, nan))
    tl.store(stats_ptr + 3 * r + 1, tl.where(valid, cutoff, nan))
    tl.store(stats_ptr + 3 * r + 2, tl.where(valid, logsumexp.to(tl.float32), nan))


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
        config = config_for(logits)
        sample_kernel[(rows,)](
            logits, seed, position, row, sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts,
            edit_bias, penalties, 0 if edit_ids is None else edit_ids.shape[1], tokens, logprobs, stats,
            logits.stride(0), vocab, COUPLED_RULE=coupled, TILES=config.tiles, num_warps=config.warps,
        )  # fmt: skip
    return tokens, logprobs, stats
