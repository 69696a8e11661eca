"""The rules: how many drafts are kept, and what is emitted after them. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import Purpose, Rule
from specdec_kernels.triton_kernels.laws import row_law
from specdec_kernels.triton_kernels.noise import coin, exponentials
from specdec_kernels.triton_kernels.rows import (
    NO_ID,
    TILE,
    Law,
    block_ids,
    draw_from_row,
    draw_inside,
    first_arrival,
    flat_race,
    load_logits,
    log_prob,
    probs,
    race_tag,
    row_stats,
)

TARGET = tl.constexpr(int(Purpose.TARGET))
COUPLED_RULE = tl.constexpr(int(Rule.COUPLED))

# What the block rule remembers of a row, in doubles.
MEMORY = tl.constexpr(9)


@triton.jit
def draft_law(draft_rows, stats_ptr, i, token, needed, key, TILES: tl.constexpr):
    """(the law that draft i was drawn from, the draft's probability, whether both are usable): its own softmax, or the
    scalars handed over; the point mass on it where there are no logits, or where no law is ``needed``."""
    scale = tl.full([], 1.0, tl.float32)
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    prob = tl.full([], 1.0, tl.float64)
    argmax = token
    usable = tl.full([], 1, tl.int1)
    if draft_rows is not None:
        if needed:
            argmax = tl.full([], -1, tl.int64)
            if stats_ptr is not None:
                stats = stats_ptr + 3 * i
                scale, cutoff = tl.load(stats), tl.load(stats + 1)
                logsumexp = tl.load(stats + 2).to(tl.float64)
                argmax = tl.where(scale == float("inf"), token, -1)
            else:
                no_tag = tl.full([], 0, tl.int64)
                logsumexp, _tile, usable, _top, _least = row_stats(
                    draft_rows, i, scale, cutoff, key, no_tag, False, TILES
                )
            if argmax < 0:
                prob = tl.exp(log_prob(draft_rows, i, Law(scale, cutoff, logsumexp, argmax, argmax), token))
                usable = usable & (prob < float("inf"))
    return Law(scale, cutoff, logsumexp, argmax, argmax), prob, usable


@triton.jit
def residuals(rows, draft_rows, i, law, draft, ids, first, last):
    """(target - draft)+ of ``ids`` in row i, all of them in [first, last)."""
    weights = probs(load_logits(rows, i, ids, first, last), law)
    certain = draft.argmax >= 0
    if certain:
        weights = tl.where(ids == draft.argmax, 0.0, weights)
    if draft_rows is not None:
        if not certain:
            difference = weights - probs(load_logits(draft_rows, i, ids, first, last), draft)
            weights = tl.where(difference > 0, difference, 0.0)  # nothing where the draft is not a number
    return weights


@triton.jit
def residual_sums(rows, draft_rows, i, law, draft, start, TILES: tl.constexpr):
    """The residual's weight of every tile of a block: [TILES]."""
    first = tl.full([], TILE, tl.int64) * start
    ids = block_ids(start, TILES)
    return tl.sum(residuals(rows, draft_rows, i, law, draft, ids, first, first + TILES * TILE), axis=1)


@triton.jit
def residual_mass(rows, draft_rows, i, law, draft, TILES: tl.constexpr):
    """The sum of the residual's weights, float64."""
    mass = tl.zeros([TILES], tl.float32)
    for start in range(0, tl.cdiv(rows.vocab, TILE), TILES):
        mass += residual_sums(rows, draft_rows, i, law, draft, start, TILES)
    return tl.sum(mass).to(tl.float64)


@triton.jit
def residual_draw(rows, draft_rows, i, law, draft, key, tag, TILES: tl.constexpr):
    """A token from (target - draft)+ by the two-level race; ``NO_ID`` where nothing is left of it."""
    best = tl.full([TILES], float("inf"), tl.float32)
    winner = tl.full([TILES], NO_ID, tl.int64)
    for start in range(0, tl.cdiv(rows.vocab, TILE), TILES):
        sums = residual_sums(rows, draft_rows, i, law, draft, start, TILES)
        tiles = (start + tl.arange(0, TILES)).to(tl.int64)
        time = exponentials(key.seed, key.position, tag, tiles) / sums
        sooner = (sums > 0) & (time < best)
        winner = tl.where(sooner, tiles, winner)
        best = tl.where(sooner, time, best)
    drawn = first_arrival(best, winner)
    if drawn < NO_ID:
        first = drawn * TILE
        ids = first + tl.arange(0, TILE)
        weights = residuals(rows, draft_rows, i, law, draft, ids, first, first + TILE)
        drawn = draw_inside(weights, drawn, key, tag)
    return drawn


@triton.jit
def emit(rows, draft_rows, i, law, draft, use_residual, key, TILES: tl.constexpr):
    """The token that ends the step in row i."""
    tag = race_tag(TARGET, i)
    emitted = law.argmax
    if emitted < 0:
        emitted = tl.full([], NO_ID, tl.int64)
        if use_residual:
            emitted = residual_draw(rows, draft_rows, i, law, draft, key, tag, TILES)
        if emitted == NO_ID:
            emitted = draw_from_row(rows, i, law, key, tag)
    return emitted


@triton.jit
def load_draft(rows, i, drafted):
    """Draft i, -1 behind the last."""
    token = tl.full([], -1, tl.int64)
    if i < drafted:
        token = tl.load(rows.drafts + i * rows.draft_stride).to(tl.int64)
    return token


@triton.jit
def one_by_one(
    rows, draft_rows, stats_ptr, drafted, sampling, key, RULE: tl.constexpr, INDEPENDENT: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Rules token and coupled: (drafts kept, emitted token, all rows valid?, drafts acceptable each by itself)."""
    i = tl.full([], 0, tl.int64)
    kept = tl.full([], 0, tl.int64)
    emitted = tl.full([], -1, tl.int64)
    all_valid = tl.full([], 1, tl.int32)
    independent = tl.full([], 0, tl.int32)
    looking = tl.full([], 1, tl.int32)
    while looking != 0:
        law, valid = row_law(rows, i, sampling, key, race_tag(TARGET, i), RULE != COUPLED_RULE, TILES)
        token = load_draft(rows, i, drafted)
        drafting = (token >= 0) & valid
        drawn = law.argmax
        if RULE == COUPLED_RULE:
            if drawn < 0:
                drawn = flat_race(rows, i, law, key, TILES)
            usable = drafting
            accepted = drafting & (token == drawn)
        else:
            # A greedy target accepts its argmax and emits its argmax: there no law of the draft matters.
            draft, draft_prob, lawful = draft_law(
                draft_rows, stats_ptr, i, token, drafting & (law.argmax < 0), key, TILES
            )
            usable = drafting & lawful
            accepted = usable
            if usable:
                # Strict: a token the target gives probability 0 is never accepted, even by coin 0.
                accepted = coin(key.seed, key.position, i) * draft_prob < tl.exp(log_prob(rows, i, law, token))
        independent += accepted.to(tl.int32)
        if emitted < 0:
            all_valid = all_valid & (valid & (usable | (token < 0))).to(tl.int32)
            if accepted:
                kept += 1
            elif RULE == COUPLED_RULE:
                emitted = drawn
            else:
                emitted = emit(rows, draft_rows, i, law, draft, usable, key, TILES)
        i += 1
        looking = (emitted < 0).to(tl.int32)
        if INDEPENDENT:
            looking = tl.where((emitted < 0) | (i < drafted), 1, 0)
    return kept, emitted, all_valid, independent


@triton.jit
def remember(place, law, draft, reach):
    tl.store(place, law.cutoff.to(tl.float64))
    tl.store(place + 1, law.logsumexp)
    tl.store(place + 2, law.argmax.to(tl.float64))
    tl.store(place + 3, law.tile.to(tl.float64))
    tl.store(place + 4, draft.scale.to(tl.float64))
    tl.store(place + 5, draft.cutoff.to(tl.float64))
    tl.store(place + 6, draft.logsumexp)
    tl.store(place + 7, draft.argmax.to(tl.float64))
    tl.store(place + 8, reach)


@triton.jit
def recall(place, scale):
    """(law of the target, of the draft divided by reach, reach): (reach * target - draft)+ is in proportion to
    (target - draft / reach)+."""
    reach = tl.load(place + 8)
    law = Law(
        scale, tl.load(place).to(tl.float32), tl.load(place + 1), tl.load(place + 2).to(tl.int64),
        tl.load(place + 3).to(tl.int64),
    )  # fmt: skip
    argmax = tl.load(place + 7).to(tl.int64)
    divided = tl.load(place + 6) + tl.log(reach)
    draft = Law(tl.load(place + 4).to(tl.float32), tl.load(place + 5).to(tl.float32), divided, argmax, argmax)
    return law, draft, reach


@triton.jit
def all_together(rows, draft_rows, stats_ptr, drafted, sampling, key, memory, TILES: tl.constexpr):
    """Rule block: (drafts kept, emitted token, all rows valid?). The names follow algorithms.md, 2."""
    reach = tl.full([], 1.0, tl.float64)
    looked_at = tl.full([], 0, tl.int64)
    all_valid = tl.full([], 1, tl.int32)
    looking = (drafted > 0).to(tl.int32)
    while looking != 0:
        law, valid = row_law(rows, looked_at, sampling, key, race_tag(TARGET, looked_at), True, TILES)
        token = load_draft(rows, looked_at, drafted)
        draft, draft_prob, lawful = draft_law(
            draft_rows, stats_ptr, looked_at, token, valid & (law.argmax < 0), key, TILES
        )
        remember(memory + looked_at * MEMORY, law, draft, reach)
        looking = (valid & lawful).to(tl.int32)
        all_valid = all_valid & looking
        if looking != 0:
            # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
            prob = tl.exp(log_prob(rows, looked_at, law, token))
            reach = tl.where(prob > 0, tl.minimum(1.0, reach * prob / draft_prob), 0.0)
            looked_at += 1
            looking = tl.where((reach > 0) & (looked_at < drafted), 1, 0)
    tl.debug_barrier()  # what one thread remembered, others recall

    # From the end, so that a residual's mass is only taken of rows behind the kept prefix.
    kept = looked_at
    deciding = (kept > 0).to(tl.int32)
    while deciding != 0:
        threshold = reach
        if kept < looked_at:
            law, draft, here = recall(memory + kept * MEMORY, sampling[0])
            threshold = tl.full([], 1.0, tl.float64)
            if here < 1.0:
                left = here * residual_mass(rows, draft_rows, kept, law, draft, TILES)
                threshold = left / (left + 1.0 - here)
        if coin(key.seed, key.position, kept - 1) < threshold:
            deciding = tl.full([], 0, tl.int32)
        else:
            kept -= 1
            deciding = (kept > 0).to(tl.int32)

    emitted = tl.full([], 0, tl.int64)
    if kept == drafted:
        law, valid = row_law(rows, kept, sampling, key, race_tag(TARGET, kept), True, TILES)
        all_valid = all_valid & valid.to(tl.int32)
        emitted = emit(rows, draft_rows, kept, law, law, False, key, TILES)
    else:
        law, draft, _here = recall(memory + kept * MEMORY, sampling[0])
        emitted = emit(rows, draft_rows, kept, law, draft, kept < looked_at, key, TILES)
    return kept, emitted, all_valid
