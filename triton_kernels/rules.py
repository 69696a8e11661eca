"""The rules: how many drafts are kept, and what is emitted after them. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import Rule
from specdec_kernels.triton_kernels.laws import row_law
from specdec_kernels.triton_kernels.noise import coin
from specdec_kernels.triton_kernels.residuals import (
    REACH,
    TARGET,
    draft_law,
    emit,
    recalled_laws,
    remember,
    residual_mass,
)
from specdec_kernels.triton_kernels.rows import flat_race, log_prob, race_tag

COUPLED_RULE = tl.constexpr(int(Rule.COUPLED))

# What the block rule remembers of a row, in doubles: what `remember` stores.
MEMORY = tl.constexpr(9)


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
                emitted = emit(rows, draft_rows, i, law, draft, None, usable, key, TILES)
        i += 1
        looking = (emitted < 0).to(tl.int32)
        if INDEPENDENT:
            looking = tl.where((emitted < 0) | (i < drafted), 1, 0)
    return kept, emitted, all_valid, independent


@triton.jit
def recall(place, scale):
    """(law of the target, of the draft divided by reach, reach): (reach * target - draft)+ is in proportion to
    (target - draft / reach)+."""
    reach = tl.load(place + REACH)
    law, _draft, divided = recalled_laws(place, scale, reach)
    return law, divided, reach


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
                left = here * residual_mass(rows, draft_rows, kept, law, draft, None, TILES)
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
        emitted = emit(rows, draft_rows, kept, law, law, None, False, key, TILES)
    else:
        law, draft, _here = recall(memory + kept * MEMORY, sampling[0])
        emitted = emit(rows, draft_rows, kept, law, draft, None, kept < looked_at, key, TILES)
    return kept, emitted, all_valid
