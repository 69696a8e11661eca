"""``sample`` and ``verify_chain``: one program a row, or a request. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import MIN_TEMPERATURE, Purpose
from specdec_kernels.contract import TILE as _TILE
from specdec_kernels.triton_kernels.noise import coin
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    TILE,
    block_ids,
    draw_from_row,
    draw_inside,
    exponentials,
    first_arrival,
    load_logits,
    probs,
    race_tag,
    row_argmax,
    row_stats,
    split,
)

DRAFT = tl.constexpr(int(Purpose.DRAFT))
TARGET = tl.constexpr(int(Purpose.TARGET))
GREEDY_BELOW = tl.constexpr(MIN_TEMPERATURE)


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles a block, and warps a program."""

    tiles: int
    warps: int


def launch_config(vocab: int, platform: str) -> LaunchConfig:
    """The launch for ``platform``: "cuda", "hip" or "interpreter".

    A thread loads 16 bytes of bfloat16 at a time. 32 tiles over 16 warps is what spills on none of sm_80, sm_90 and
    sm_100 (over 8 and 4 warps one kernel does, ptxas of CUDA 12.9), 16 over 8 what does not on gfx942. The
    interpreter takes 0.1 ms an operation whatever its size, so there a block is a whole row.
    """
    tiles, warps = {"cuda": (32, 16), "hip": (16, 8), "interpreter": (1024, 1)}[platform]
    return LaunchConfig(min(tiles, triton.next_power_of_2(triton.cdiv(vocab, _TILE))), warps)


def _launch_config(logits: Tensor) -> LaunchConfig:
    platform = "interpreter" if logits.device.type == "cpu" else "hip" if torch.version.hip else "cuda"
    return launch_config(logits.shape[-1], platform)


@triton.jit
def temperature_scale(temperature_ptr, temperature, index):
    """1 / temperature; inf is greedy."""
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + index)
    greedy = temperature < GREEDY_BELOW
    return tl.where(greedy, float("inf"), 1.0 / tl.where(greedy, 1.0, temperature))


@triton.jit
def sample_kernel(
    logits_ptr,
    seed_ptr,
    position_ptr,
    row_ptr,
    temperature_ptr,
    temperature,
    tokens_ptr,
    logprobs_ptr,
    stats_ptr,
    row_stride,
    vocab,
    TILES: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + r * row_stride
    seed, position = tl.load(seed_ptr + r), tl.load(position_ptr + r)
    scale = temperature_scale(temperature_ptr, temperature, r)
    logprob = tl.full([], 0.0, tl.float64)
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    if scale == float("inf"):
        cutoff, token, valid = row_argmax(logits_row, vocab, TILES)
    else:
        tag = race_tag(DRAFT, tl.load(row_ptr + r))
        logsumexp, tile, valid = row_stats(logits_row, scale, vocab, seed, position, tag, True, TILES)
        if valid:
            token = draw_from_row(logits_row, scale, logsumexp, tile, vocab, seed, position, tag)
            logprob = scale.to(tl.float64) * tl.load(logits_row + token).to(tl.float64) - logsumexp
        else:
            _top, token, _valid = row_argmax(logits_row, vocab, TILES)
    nan = float("nan")
    tl.store(tokens_ptr + r, token)
    tl.store(logprobs_ptr + r, tl.where(valid, logprob.to(tl.float32), nan))
    tl.store(stats_ptr + 3 * r, tl.where(valid, scale, nan))
    tl.store(stats_ptr + 3 * r + 1, tl.where(valid, cutoff, nan))
    tl.store(stats_ptr + 3 * r + 2, tl.where(valid, logsumexp.to(tl.float32), nan))


@triton.jit
def residual_draw(
    target_row,
    draft_row,
    scale,
    logsumexp,
    draft_scale,
    draft_cutoff,
    draft_logsumexp,
    token,
    point_mass,
    vocab,
    seed,
    position,
    tag,
    TILES: tl.constexpr,
):
    """A token from (target - draft)+ by the two-level race; ``NO_ID`` where nothing is left of it."""
    high, low = split(logsumexp)
    draft_high, draft_low = split(draft_logsumexp)
    best = tl.full([TILES], float("inf"), tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        ids = block_ids(start, TILES)
        weights = residuals(
            target_row, draft_row, scale, high, low, draft_scale, draft_cutoff, draft_high, draft_low,
            token, point_mass, ids, vocab,
        )  # fmt: skip
        sums = tl.sum(weights, axis=1)
        tiles = (start + tl.arange(0, TILES)).to(tl.int64)
        time = exponentials(seed, position, tag, tiles) / sums
        sooner = (sums > 0) & (time < best)
        winner = tl.where(sooner, tiles, winner)
        best = tl.where(sooner, time, best)
    tile = first_arrival(best, winner)
    drawn = tile
    if tile < NO_ID:
        weights = residuals(
            target_row, draft_row, scale, high, low, draft_scale, draft_cutoff, draft_high, draft_low,
            token, point_mass, tile * TILE + tl.arange(0, TILE), vocab,
        )  # fmt: skip
        drawn = draw_inside(weights, tile, seed, position, tag)
    return drawn


@triton.jit
def residuals(
    target_row, draft_row, scale, high, low, draft_scale, draft_cutoff, draft_high, draft_low,
    token, point_mass, ids, vocab,
):  # fmt: skip
    target = probs(load_logits(target_row, ids, vocab), scale, float("-inf"), high, low)
    if point_mass:
        weights = tl.where(ids == token, 0.0, target)
    else:
        draft = probs(load_logits(draft_row, ids, vocab), draft_scale, draft_cutoff, draft_high, draft_low)
        difference = target - draft
        weights = tl.where(difference > 0, difference, 0.0)  # nothing where the draft is not a number
    return weights


@triton.jit
def verify_chain_kernel(
    target_ptr,
    tokens_ptr,
    draft_ptr,
    draft_stats_ptr,
    seed_ptr,
    position_ptr,
    num_draft_ptr,
    temperature_ptr,
    temperature,
    out_tokens_ptr,
    out_accepted_ptr,
    out_valid_ptr,
    target_request_stride,
    target_row_stride,
    draft_request_stride,
    draft_row_stride,
    token_request_stride,
    token_row_stride,
    longest,
    vocab,
    TILES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    seed, position = tl.load(seed_ptr + b), tl.load(position_ptr + b)
    scale = temperature_scale(temperature_ptr, temperature, b)
    greedy = scale == float("inf")
    drafted = longest
    if num_draft_ptr is not None:
        drafted = tl.maximum(tl.minimum(tl.load(num_draft_ptr + b).to(tl.int32), longest), 0)

    i = tl.full([], 0, tl.int64)
    emitted = tl.full([], -1, tl.int64)
    all_valid = tl.full([], 1, tl.int32)
    while emitted < 0:
        target_row = target_ptr + b * target_request_stride + i * target_row_stride
        tag = race_tag(TARGET, i)
        token = tl.full([], -1, tl.int64)
        if i < drafted:
            token = tl.load(tokens_ptr + b * token_request_stride + i * token_row_stride).to(tl.int64)
        live = (token >= 0) & (token < vocab)  # -1, or an id that is none, ends the draft
        logsumexp = tl.full([], 0.0, tl.float64)
        tile = tl.full([], 0, tl.int64)
        valid = tl.full([], 1, tl.int1)
        argmax = tl.full([], -1, tl.int64)
        if not greedy:
            logsumexp, tile, valid = row_stats(target_row, scale, vocab, seed, position, tag, True, TILES)
        if greedy | (valid == 0):
            _top, argmax, valid = row_argmax(target_row, vocab, TILES)

        # The law the draft token was drawn from: a point mass, its own softmax, or the scalars handed over. A greedy
        # target accepts its argmax and emits its argmax, so there it does not matter.
        draft_row = target_row
        draft_scale = tl.full([], 1.0, tl.float32)
        draft_cutoff = tl.full([], float("-inf"), tl.float32)
        draft_logsumexp = tl.full([], 0.0, tl.float64)
        draft_prob = tl.full([], 1.0, tl.float64)
        point_mass = tl.full([], 1, tl.int1)
        usable = live & valid
        if draft_ptr is not None:
            if usable & (argmax < 0):
                draft_row = draft_ptr + b * draft_request_stride + i * draft_row_stride
                if draft_stats_ptr is not None:
                    stats = draft_stats_ptr + 3 * (b * longest + i)
                    draft_scale, draft_cutoff = tl.load(stats), tl.load(stats + 1)
                    draft_logsumexp = tl.load(stats + 2).to(tl.float64)
                    point_mass = draft_scale == float("inf")
                else:
                    point_mass = tl.full([], 0, tl.int1)
                    draft_logsumexp, _tile, usable = row_stats(
                        draft_row, draft_scale, vocab, seed, position, tag, False, TILES
                    )
                if not point_mass:
                    logit = tl.load(draft_row + token).to(tl.float64)
                    draft_prob = tl.exp(draft_scale.to(tl.float64) * logit - draft_logsumexp)
                    draft_prob = tl.where(logit < draft_cutoff.to(tl.float64), 0.0, draft_prob)
                    usable = usable & (draft_prob < float("inf"))

        accepted = usable & (token == argmax)
        if usable & (argmax < 0):
            logit = tl.load(target_row + token).to(tl.float64)
            target_prob = tl.exp(scale.to(tl.float64) * logit - logsumexp)
            # Strict: a token the target gives probability 0 is never accepted, even by coin 0.
            accepted = coin(seed, position, i) * draft_prob < target_prob
        all_valid = all_valid & (valid & (usable | (live == 0))).to(tl.int32)
        if accepted:
            i += 1
        else:
            emitted = argmax
            if argmax < 0:
                emitted = tl.full([], NO_ID, tl.int64)
                if usable:
                    emitted = residual_draw(
                        target_row, draft_row, scale, logsumexp, draft_scale, draft_cutoff, draft_logsumexp,
                        token, point_mass, vocab, seed, position, tag, TILES,
                    )  # fmt: skip
                if emitted == NO_ID:
                    emitted = draw_from_row(target_row, scale, logsumexp, tile, vocab, seed, position, tag)

    out = out_tokens_ptr + b * (longest + 1)
    for index in range(0, longest):
        if index < i:
            kept = tl.load(tokens_ptr + b * token_request_stride + index * token_row_stride).to(tl.int64)
            tl.store(out + index, kept)
        else:
            tl.store(out + index + 1, tl.full([], -1, tl.int64))
    tl.store(out + i, emitted)
    tl.store(out_accepted_ptr + b, i.to(tl.int32))
    tl.store(out_valid_ptr + b, all_valid != 0)


def sample(
    logits: Tensor, seed: Tensor, position: Tensor, row: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens = logits.new_empty((rows,), dtype=torch.int64)
    logprobs = logits.new_empty((rows,), dtype=torch.float32)
    stats = logits.new_empty((rows, 3), dtype=torch.float32)
    if rows:
        config = _launch_config(logits)
        sample_kernel[(rows,)](
            logits, seed, position, row, temperatures, temperature, tokens, logprobs, stats,
            logits.stride(0), vocab, TILES=config.tiles, num_warps=config.warps,
        )  # fmt: skip
    return tokens, logprobs, stats


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    seed: Tensor,
    position: Tensor,
    num_draft: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, vocab = target_logits.shape
    tokens = target_logits.new_empty((batch, rows), dtype=torch.int64)
    accepted = target_logits.new_empty((batch,), dtype=torch.int32)
    valid = target_logits.new_empty((batch,), dtype=torch.bool)
    if batch:
        config = _launch_config(target_logits)
        draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
        verify_chain_kernel[(batch,)](
            target_logits, draft_tokens, draft_logits, draft_stats, seed, position, num_draft, temperatures,
            temperature, tokens, accepted, valid, *target_logits.stride()[:2], *draft_strides, *draft_tokens.stride(),
            rows - 1, vocab, TILES=config.tiles, num_warps=config.warps,
        )  # fmt: skip
    return tokens, accepted, valid
