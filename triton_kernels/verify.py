"""``verify_chain``: one program a request. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Purpose, Rule
from specdec_kernels.triton_kernels.launch import config_for
from specdec_kernels.triton_kernels.laws import row_law, sampling_of
from specdec_kernels.triton_kernels.noise import coin, exponentials
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    TILE,
    block_ids,
    draw_from_row,
    draw_inside,
    first_arrival,
    flat_race,
    load_block,
    load_logit,
    load_tile,
    probs,
    race_tag,
    raw_source,
    row_argmax,
    row_stats,
    source_of,
    split,
)

TARGET = tl.constexpr(int(Purpose.TARGET))
TOKEN_RULE = tl.constexpr(int(Rule.TOKEN))
BLOCK_RULE = tl.constexpr(int(Rule.BLOCK))
COUPLED_RULE = tl.constexpr(int(Rule.COUPLED))

# What the block rule remembers of a row, in doubles.
MEMORY = tl.constexpr(8)


@triton.jit
def target_law(source, sampling, vocab, seed, position, i, RACE: tl.constexpr, TILES: tl.constexpr):
    """(argmax or -1 where a law is sampled, logsumexp, winner of the tile race, cutoff, whether the row is valid); the
    argmax of a row that is not valid is its largest finite logit."""
    scale, top_k, top_p, min_p = sampling
    logsumexp = tl.full([], 0.0, tl.float64)
    tile = tl.full([], 0, tl.int64)
    cutoff = tl.full([], float("-inf"), tl.float32)
    valid = tl.full([], 1, tl.int1)
    argmax = tl.full([], -1, tl.int64)
    greedy = scale == float("inf")
    if not greedy:
        logsumexp, tile, valid, cutoff = row_law(
            source, scale, top_k, top_p, min_p, vocab, seed, position, race_tag(TARGET, i), RACE, TILES
        )
    if greedy | (valid == 0):
        _top, argmax, valid = row_argmax(source, vocab, TILES)
    return argmax, logsumexp, tile, cutoff, valid


@triton.jit
def target_logprob(source, scale, cutoff, logsumexp, argmax, token, vocab):
    """Of one token of a valid row, float64."""
    logit = load_logit(source, token, vocab)
    sampled = scale.to(tl.float64) * logit - logsumexp
    sampled = tl.where(logit < cutoff.to(tl.float64), float("-inf"), sampled)
    return tl.where(argmax < 0, sampled, tl.where(token == argmax, 0.0, float("-inf")))


@triton.jit
def draft_law(draft, target_source, token, i, usable, vocab, seed, position, TILES: tl.constexpr):
    """(source, scale, cutoff, logsumexp, probability of the token, point mass?, usable?) of the law that the draft of row
    i was drawn from: a point mass, its own softmax, or the scalars handed over. ``draft``: (logits of the request or
    None, row stride, its scalars or None)."""
    source = raw_source(target_source)
    scale = tl.full([], 1.0, tl.float32)
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    prob = tl.full([], 1.0, tl.float64)
    certain = tl.full([], 1, tl.int1)
    if draft[0] is not None:
        row_ptr = draft[0] + i * draft[1]
        if usable:
            source = (row_ptr, None, None, None, None, 0, 1.0, 0.0, 0.0, target_source[9], target_source[10], 0)
            if draft[2] is not None:
                stats = draft[2] + 3 * i
                scale, cutoff = tl.load(stats), tl.load(stats + 1)
                logsumexp = tl.load(stats + 2).to(tl.float64)
                certain = scale == float("inf")
            else:
                certain = tl.full([], 0, tl.int1)
                logsumexp, _tile, usable, _top, _least = row_stats(
                    source, scale, cutoff, vocab, seed, position, tl.full([], 0, tl.int64), False, TILES
                )
            if not certain:
                logit = tl.load(row_ptr + token).to(tl.float64)
                prob = tl.exp(scale.to(tl.float64) * logit - logsumexp)
                prob = tl.where(logit < cutoff.to(tl.float64), 0.0, prob)
                usable = usable & (prob < float("inf"))
    return source, scale, cutoff, logsumexp, prob, certain, usable


@triton.jit
def residuals(target_logits, draft_logits, target, draft, token, ids, certain):
    """(target - draft)+ of ``ids``; laws as (scale, cutoff, logsumexp in two floats)."""
    probability = probs(target_logits, target[0], target[1], target[2], target[3])
    if certain:
        weights = tl.where(ids == token, 0.0, probability)
    else:
        difference = probability - probs(draft_logits, draft[0], draft[1], draft[2], draft[3])
        weights = tl.where(difference > 0, difference, 0.0)  # nothing where the draft is not a number
    return weights


@triton.jit
def residual_block(source, draft_source, target, draft, token, start, certain, vocab, TILES: tl.constexpr):
    """The residual's weights of one block: [TILES, TILE]."""
    logits = load_block(source, start, vocab, TILES)
    draft_logits = load_block(draft_source, start, vocab, TILES)
    return residuals(logits, draft_logits, target, draft, token, block_ids(start, TILES), certain)


@triton.jit
def residual_mass(source, draft_source, target, draft, token, certain, vocab, TILES: tl.constexpr):
    """The sum of the residual's weights."""
    mass = tl.zeros([TILES], tl.float32)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        weights = residual_block(source, draft_source, target, draft, token, start, certain, vocab, TILES)
        mass += tl.sum(weights, axis=1)
    return tl.sum(mass).to(tl.float64)


@triton.jit
def residual_draw(
    source, draft_source, target, draft, token, certain, vocab, seed, position, tag, TILES: tl.constexpr
):
    """A token from (target - draft)+ by the two-level race; ``NO_ID`` where nothing is left of it."""
    best = tl.full([TILES], float("inf"), tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    for start in range(0, tl.cdiv(vocab, TILE), TILES):
        weights = residual_block(source, draft_source, target, draft, token, start, certain, vocab, TILES)
        sums = tl.sum(weights, axis=1)
        tiles = (start + tl.arange(0, TILES)).to(tl.int64)
        time = exponentials(seed, position, tag, tiles) / sums
        sooner = (sums > 0) & (time < best)
        winner = tl.where(sooner, tiles, winner)
        best = tl.where(sooner, time, best)
    tile = first_arrival(best, winner)
    drawn = tile
    if tile < NO_ID:
        ids = tile * TILE + tl.arange(0, TILE)
        logits, draft_logits = load_tile(source, tile, vocab), load_tile(draft_source, tile, vocab)
        weights = residuals(logits, draft_logits, target, draft, token, ids, certain)
        drawn = draw_inside(weights, tile, seed, position, tag)
    return drawn


@triton.jit
def emit(
    source, draft_source, sampling, law, draft, token, certain, use_residual, vocab, seed, position, i,
    TILES: tl.constexpr,
):  # fmt: skip
    """The token that ends the step. ``law``: (argmax, logsumexp, tile, cutoff), ``draft``: (scale, cutoff, logsumexp)."""
    tag = race_tag(TARGET, i)
    emitted = law[0]
    if law[0] < 0:
        emitted = tl.full([], NO_ID, tl.int64)
        if use_residual:
            high, low = split(law[1])
            draft_high, draft_low = split(draft[2])
            emitted = residual_draw(
                source, draft_source, (sampling[0], law[3], high, low), (draft[0], draft[1], draft_high, draft_low),
                token, certain, vocab, seed, position, tag, TILES,
            )  # fmt: skip
        if emitted == NO_ID:
            emitted = draw_from_row(source, sampling[0], law[3], law[1], law[2], vocab, seed, position, tag)
    return emitted


@triton.jit
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
    seed, position = tl.load(seed_ptr + b), tl.load(position_ptr + b)
    sampling = sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, b)
    scale = sampling[0]
    first_row = b * (longest + 1)
    rows_ptr = target_ptr + b * target_request_stride
    drafted = longest
    if cu_rows_ptr is not None:
        first_row = tl.load(cu_rows_ptr + b)
        rows_ptr = target_ptr + first_row * target_row_stride
        drafted = tl.minimum(drafted, (tl.load(cu_rows_ptr + b + 1) - first_row).to(tl.int32) - 1)
    if num_draft_ptr is not None:
        drafted = tl.maximum(tl.minimum(tl.load(num_draft_ptr + b).to(tl.int32), drafted), 0)
    drafts = tokens_ptr + b * token_request_stride
    # -1, or an id that is none, ends the draft.
    live = tl.full([], 0, tl.int32)
    token = tl.full([], 0, tl.int64)
    while (live < drafted) & (token >= 0):
        token = tl.load(drafts + live * token_row_stride).to(tl.int64)
        token = tl.where(token < vocab, token, -1)
        live += tl.where(token >= 0, 1, 0)
    drafted = live
    draft_rows = None
    draft_stats = None
    if RULE != COUPLED_RULE:
        if draft_ptr is not None:
            draft_rows = draft_ptr + b * draft_request_stride
            if draft_stats_ptr is not None:
                draft_stats = draft_stats_ptr + 3 * b * longest
    draft = (draft_rows, draft_row_stride, draft_stats)
    memory = memory_ptr + b * (longest + 1) * MEMORY
    out = out_tokens_ptr + b * (longest + 1)

    i = tl.full([], 0, tl.int64)
    emitted = tl.full([], -1, tl.int64)
    all_valid = tl.full([], 1, tl.int32)
    reach = tl.full([], 1.0, tl.float64)
    independent = tl.full([], 0, tl.int32)
    looking = tl.full([], 1, tl.int32)
    kept = tl.full([], 0, tl.int64)
    while looking != 0:
        source = source_of(
            rows_ptr + i * target_row_stride, bitmask_ptr, first_row + i, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr,
            penalties_ptr, num_edits, b, drafts, token_row_stride, i, vocab,
        )  # fmt: skip
        argmax, logsumexp, tile, cutoff, valid = target_law(
            source, sampling, vocab, seed, position, i, RULE != COUPLED_RULE, TILES
        )
        token = tl.full([], -1, tl.int64)
        if i < drafted:
            token = tl.load(drafts + i * token_row_stride).to(tl.int64)
        # A greedy target accepts its argmax and emits its argmax: there no law of the draft matters.
        usable = (token >= 0) & valid
        draft_source, draft_scale, draft_cutoff, draft_logsumexp, draft_prob, certain, lawful = draft_law(
            draft, source, token, i, usable & (argmax < 0), vocab, seed, position, TILES
        )
        usable = usable & (lawful | (argmax >= 0))
        accepted = usable & (token == argmax)
        prob = tl.where(accepted, 1.0, 0.0).to(tl.float64)
        if RULE == COUPLED_RULE:
            if valid & (argmax < 0):
                argmax = flat_race(source, scale, cutoff, logsumexp, vocab, seed, position + i, TILES)
                accepted = usable & (token == argmax)
                prob = tl.exp(scale.to(tl.float64) * load_logit(source, argmax, vocab) - logsumexp)
        else:
            if usable & (argmax < 0):
                prob = tl.exp(target_logprob(source, scale, cutoff, logsumexp, argmax, token, vocab))
                # Strict: a token the target gives probability 0 is never accepted, even by coin 0.
                accepted = coin(seed, position, i) * draft_prob < prob
        if RULE == BLOCK_RULE:
            # Remembered for the way back; the names follow algorithms.md, 2.
            place = memory + i * MEMORY
            tl.store(place, logsumexp)
            tl.store(place + 1, cutoff.to(tl.float64))
            tl.store(place + 2, tile.to(tl.float64))
            tl.store(place + 3, draft_scale.to(tl.float64))
            tl.store(place + 4, draft_cutoff.to(tl.float64))
            tl.store(place + 5, draft_logsumexp)
            tl.store(place + 6, argmax.to(tl.float64))
            tl.store(place + 7, reach)
            all_valid = all_valid & (valid & (usable | (token < 0))).to(tl.int32)
            looking = (usable & (reach > 0)).to(tl.int32)
            if looking != 0:
                reach = tl.minimum(1.0, reach * prob / draft_prob)
                i += 1
                looking = tl.where((reach > 0) | (i == drafted), 1, 0)
        else:
            independent += accepted.to(tl.int32)
            if emitted < 0:
                all_valid = all_valid & (valid & (usable | (token < 0))).to(tl.int32)
                if accepted:
                    kept += 1
                else:
                    emitted = emit(
                        source, draft_source, sampling, (argmax, logsumexp, tile, cutoff),
                        (draft_scale, draft_cutoff, draft_logsumexp), token, certain, usable, vocab, seed, position, i,
                        TILES,
                    )  # fmt: skip
            i += 1
            looking = (emitted < 0).to(tl.int32)
            if INDEPENDENT:
                looking = tl.where((emitted < 0) | (i < drafted), 1, 0)

    if RULE == BLOCK_RULE:
        # i rows were usable, row i was not or is the bonus row; or reach is 0, and i is behind what was read.
        tl.debug_barrier()
        read = tl.where(reach > 0, i, i - 1)
        looked_at = i
        kept = i
        deciding = tl.full([], 1, tl.int32)
        while (kept > 0) & (deciding != 0):
            place = memory + kept * MEMORY
            source = source_of(
                rows_ptr + kept * target_row_stride, bitmask_ptr, first_row + kept, edit_ids_ptr, edit_counts_ptr,
                edit_bias_ptr, penalties_ptr, num_edits, b, drafts, token_row_stride, kept, vocab,
            )  # fmt: skip
            threshold = reach
            if kept < looked_at:
                reach = tl.load(place + 7)
                threshold = tl.full([], 1.0, tl.float64)
                if reach < 1.0:
                    mass = block_mass(source, draft, place, scale, reach, drafts, token_row_stride, kept, vocab, TILES)
                    threshold = mass / (mass + 1.0 - reach)
            if coin(seed, position, kept - 1) < threshold:
                deciding = tl.full([], 0, tl.int32)
            else:
                kept -= 1
        if kept == 0:
            reach = tl.full([], 1.0, tl.float64)
        place = memory + kept * MEMORY
        source = source_of(
            rows_ptr + kept * target_row_stride, bitmask_ptr, first_row + kept, edit_ids_ptr, edit_counts_ptr,
            edit_bias_ptr, penalties_ptr, num_edits, b, drafts, token_row_stride, kept, vocab,
        )  # fmt: skip
        token = tl.full([], -1, tl.int64)
        if kept < looked_at:
            token = tl.load(drafts + kept * token_row_stride).to(tl.int64)
        draft_source, draft_scale, certain = remembered_draft(draft, source, place, kept)
        law = (
            tl.load(place + 6).to(tl.int64), tl.load(place), tl.load(place + 2).to(tl.int64),
            tl.load(place + 1).to(tl.float32),
        )  # fmt: skip
        divided = tl.load(place + 5) + tl.log(reach)
        emitted = emit(
            source, draft_source, sampling, law, (draft_scale, tl.load(place + 4).to(tl.float32), divided), token,
            certain, (kept < looked_at) & (read >= 0), vocab, seed, position, kept, TILES,
        )  # fmt: skip

    for index in range(0, longest):
        if index < kept:
            tl.store(out + index, tl.load(drafts + index * token_row_stride).to(tl.int64))
        else:
            tl.store(out + index + 1, tl.full([], -1, tl.int64))
    tl.store(out + kept, emitted)
    tl.store(out_accepted_ptr + b, kept.to(tl.int32))
    tl.store(out_valid_ptr + b, all_valid != 0)
    tl.store(out_counters_ptr + 2 * b, drafted)
    tl.store(out_counters_ptr + 2 * b + 1, independent if INDEPENDENT else -1)
    if out_logprobs_ptr is not None:
        score = b * (longest + 1)
        for index in range(0, longest + 1):
            logprob = tl.full([], float("nan"), tl.float64)
            raw_logprob = tl.full([], float("nan"), tl.float64)
            if index <= kept:
                token = emitted
                if index < kept:
                    token = tl.load(drafts + index * token_row_stride).to(tl.int64)
                source = source_of(
                    rows_ptr + index * target_row_stride, bitmask_ptr, first_row + index, edit_ids_ptr,
                    edit_counts_ptr, edit_bias_ptr, penalties_ptr, num_edits, b, drafts, token_row_stride,
                    index, vocab,
                )  # fmt: skip
                argmax, logsumexp, _tile, cutoff, valid = target_law(
                    source, sampling, vocab, seed, position, i, False, TILES
                )
                if valid:
                    logprob = target_logprob(source, scale, cutoff, logsumexp, argmax, token, vocab)
                plain = (tl.full([], 1.0, tl.float32), tl.full([], 0, tl.int32), 1.0, 0.0)
                raw = raw_source(source)
                argmax, logsumexp, _tile, cutoff, valid = target_law(
                    raw, plain, vocab, seed, position, i, False, TILES
                )
                if valid:
                    raw_logprob = target_logprob(raw, plain[0], cutoff, logsumexp, argmax, token, vocab)
            tl.store(out_logprobs_ptr + score + index, logprob.to(tl.float32))
            tl.store(out_raw_logprobs_ptr + score + index, raw_logprob.to(tl.float32))


@triton.jit
def remembered_draft(draft, source, place, i):
    """(source, scale, point mass?) of the law that the draft of row i was drawn from, read before."""
    if draft[0] is None:
        return raw_source(source), tl.full([], 1.0, tl.float32), tl.full([], 1, tl.int1)
    else:
        scale = tl.load(place + 3).to(tl.float32)
        row_source = (draft[0] + i * draft[1], None, None, None, None, 0, 1.0, 0.0, 0.0, source[9], source[10], 0)
        return row_source, scale, (scale == float("inf")) | (tl.load(place + 6) >= 0)


@triton.jit
def block_mass(source, draft, place, scale, reach, drafts, draft_stride, i, vocab, TILES: tl.constexpr):
    """Z of algorithms.md, 2: the sum of (reach * target - draft)+ of row i."""
    draft_source, draft_scale, certain = remembered_draft(draft, source, place, i)
    token = tl.load(drafts + i * draft_stride).to(tl.int64)
    logsumexp, cutoff, argmax = tl.load(place), tl.load(place + 1).to(tl.float32), tl.load(place + 6).to(tl.int64)
    if certain:
        left = 1.0 - tl.exp(target_logprob(source, scale, cutoff, logsumexp, argmax, token, vocab))
    else:
        high, low = split(logsumexp)
        draft_high, draft_low = split(tl.load(place + 5) + tl.log(reach))
        left = residual_mass(
            source, draft_source, (scale, cutoff, high, low),
            (draft_scale, tl.load(place + 4).to(tl.float32), draft_high, draft_low), token, certain, vocab, TILES,
        )  # fmt: skip
    return reach * left


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
        memory = empty(torch.float64, batch, rows, MEMORY.value) if rule == Rule.BLOCK else counters
        draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
        target_strides = target_logits.stride()[:2] if cu_rows is None else (0, target_logits.stride(0))
        verify_chain_kernel[(batch,)](
            target_logits, draft_tokens, draft_logits, draft_stats, seed, position, num_draft, cu_rows, sampling,
            temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts, edit_bias, penalties,
            0 if edit_ids is None else edit_ids.shape[1], memory, tokens, accepted, valid, counters,
            scores if logprobs else None, raw_scores if logprobs else None, *target_strides, *draft_strides,
            *draft_tokens.stride(), rows - 1, vocab, RULE=rule, INDEPENDENT=independent, TILES=config.tiles,
            num_warps=config.warps,
        )  # fmt: skip
    return tokens, accepted, valid, counters, scores, raw_scores
