"""The rules: how many drafts are kept, and what is emitted after them. Semantics: :mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import Rule
from specdec_kernels.triton_kernels.laws import tabled_law
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
from specdec_kernels.triton_kernels.rows import flat_race, log_prob, race_tag, tables_of

COUPLED_RULE = tl.constexpr(int(Rule.COUPLED))

# What is known of a row once it was judged, in doubles, behind what `remember` stores of it: whether it is valid,
# whether its draft can be tested, whether it passes, the coupled draw, the draft's probability under target and draft.
VALID, TESTED, PASSED = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
DRAWN, PROB, DRAFT_PROB = tl.constexpr(13), tl.constexpr(14), tl.constexpr(15)
MEMORY = tl.constexpr(16)


@triton.jit
def load_draft(rows, i, drafted):
    """Draft i, -1 behind the last."""
    token = tl.full([], -1, tl.int64)
    if i < drafted:
        token = tl.load(rows.drafts + i * rows.draft_stride).to(tl.int64)
    return token


@triton.jit
def judge(
    rows, draft_rows, stats_ptr, draft_scale, i, drafted, sampling, key, tables, memory, RULE: tl.constexpr,
    ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Look at row i, whose target's and draft's ``tables`` are made, and remember all that a rule asks of it. Whether
    its draft passes on its own, by coin or, coupled, by being what is drawn."""
    law, valid = tabled_law(rows, i, sampling, key, race_tag(TARGET, i), tables, RULE != COUPLED_RULE, ENTRIES, TILES)
    token = load_draft(rows, i, drafted)
    tested = (token >= 0) & valid
    drawn = law.argmax
    place = memory + i * MEMORY
    if RULE == COUPLED_RULE:
        if drawn < 0:
            drawn = flat_race(rows, i, law, key, TILES)
        passed = tested & (token == drawn)
        remember(place, law, law, tl.full([], 1.0, tl.float64))
    else:
        # A greedy target accepts its argmax and emits its argmax: there no law of the draft matters.
        needed = tested & (law.argmax < 0)
        draft, draft_prob, lawful = draft_law(
            draft_rows, stats_ptr, draft_scale, i, token, needed, key, tables + 2 * ENTRIES, True, ENTRIES, TILES
        )
        tested = tested & lawful
        prob = tl.full([], 0.0, tl.float64)
        if tested:
            prob = tl.exp(log_prob(rows, i, law, token))
        # Strict: a token the target gives probability 0 is never accepted, even by coin 0.
        passed = tested & (coin(key.seed, key.position, i) * draft_prob < prob)
        remember(place, law, draft, tl.full([], 1.0, tl.float64))
        tl.store(place + PROB, prob)
        tl.store(place + DRAFT_PROB, draft_prob)
    tl.store(place + VALID, valid.to(tl.float64))
    tl.store(place + TESTED, tested.to(tl.float64))
    tl.store(place + PASSED, passed.to(tl.float64))
    tl.store(place + DRAWN, drawn.to(tl.float64))
    return passed


@triton.jit
def one_by_one(
    rows, draft_rows, drafted, key, tables, memory, RULE: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Rules token and coupled, from what was judged: (drafts kept, emitted token, all rows valid?)."""
    kept = tl.full([], 0, tl.int64)
    while (kept < drafted) & (tl.load(memory + kept * MEMORY + PASSED) != 0):
        kept += 1
    place = memory + kept * MEMORY
    tested = tl.load(place + TESTED) != 0
    all_valid = (tl.load(place + VALID) != 0) & (tested | (kept == drafted))
    if RULE == COUPLED_RULE:
        emitted = tl.load(place + DRAWN).to(tl.int64)
    else:
        law, draft, _divided = recalled_laws(place, tl.full([], 1.0, tl.float64))
        table = tables_of(tables, kept, ENTRIES)
        emitted = emit(rows, draft_rows, kept, law, draft, None, tested, key, table, ENTRIES, TILES)
    return kept, emitted, all_valid


@triton.jit
def recall(place):
    """(law of the target, of the draft divided by reach, reach): (reach * target - draft)+ is in proportion to
    (target - draft / reach)+."""
    reach = tl.load(place + REACH)
    law, _draft, divided = recalled_laws(place, reach)
    return law, divided, reach


@triton.jit
def all_together(
    rows, draft_rows, drafted, key, tables, memory, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Rule block, from what was judged: (drafts kept, emitted token, all rows valid?). The names follow
    docs/algorithms.md, 2."""
    reach = tl.full([], 1.0, tl.float64)
    looked_at = tl.full([], 0, tl.int64)
    all_valid = tl.full([], 1, tl.int1)
    looking = (drafted > 0).to(tl.int32)
    while looking != 0:
        place = memory + looked_at * MEMORY
        tl.store(place + REACH, reach)
        all_valid = tl.load(place + TESTED) != 0
        looking = all_valid.to(tl.int32)
        if all_valid:
            # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
            prob = tl.load(place + PROB)
            reach = tl.where(prob > 0, tl.minimum(1.0, reach * prob / tl.load(place + DRAFT_PROB)), 0.0)
            looked_at += 1
            looking = tl.where((reach > 0) & (looked_at < drafted), 1, 0)
    tl.debug_barrier()  # what one thread remembered, others recall

    # From the end, so that a residual's mass is only taken of rows behind the kept prefix.
    kept = looked_at
    deciding = (kept > 0).to(tl.int32)
    while deciding != 0:
        threshold = reach
        if kept < looked_at:
            law, draft, here = recall(memory + kept * MEMORY)
            threshold = tl.full([], 1.0, tl.float64)
            if here < 1.0:
                left = here * residual_mass(rows, draft_rows, kept, law, draft, None, TILES)
                threshold = left / (left + 1.0 - here)
        if coin(key.seed, key.position, kept - 1) < threshold:
            deciding = tl.full([], 0, tl.int32)
        else:
            kept -= 1
            deciding = (kept > 0).to(tl.int32)

    # The row after the last draft was not looked at: there is nothing to reject in it.
    place = memory + kept * MEMORY
    all_valid = all_valid & ((kept < drafted) | (tl.load(place + VALID) != 0))
    law, draft, _here = recall(place)
    table = tables_of(tables, kept, ENTRIES)
    emitted = emit(rows, draft_rows, kept, law, draft, None, kept < looked_at, key, table, ENTRIES, TILES)
    return kept, emitted, all_valid
