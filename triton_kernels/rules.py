"""The rules: what is asked of a row once it is measured, and how a path of rows ends. Semantics:
:mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import Rule
from specdec_kernels.triton_kernels.arrivals import NEXT
from specdec_kernels.triton_kernels.distributions import distribution_of, raw_distribution
from specdec_kernels.triton_kernels.draws import (
    PATH_PROB,
    STATE,
    TARGET,
    draft_distribution,
    draw_from_row,
    draw_last,
    flat_race,
    load_state,
    measured_mass,
    next_child,
    race_tag,
    store_state,
)
from specdec_kernels.triton_kernels.noise import uniform
from specdec_kernels.triton_kernels.rows import Key, load_logits, log_prob

BLOCK_RULE = tl.constexpr(int(Rule.BLOCK))
COUPLED_RULE = tl.constexpr(int(Rule.COUPLED))

# What is known of a row once it was judged, in doubles, beside its distributions and NEXT: whether it is valid, whether
# its draft can be tested, the token drawn from it, the draft's probability under target and draft.
VALID, TESTED, DRAWN = tl.constexpr(10), tl.constexpr(11), tl.constexpr(13)
PROB, DRAFT_PROB = tl.constexpr(14), tl.constexpr(15)
# In the first row's place of the token it does not draw, the rows that rule block looks at.
LOOKED_AT = tl.constexpr(13)


@triton.jit
def judge_draft(
    rows, drafts, tokens, stride, i, drafted, sampling, key, table, states, RULE: tl.constexpr,
    ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of row i, whose tables are made, store all that a rule asks for: so whether its draft passes on its own, by its
    uniform or, coupled, by being what is drawn."""
    target, valid = distribution_of(
        rows, i, sampling, key, race_tag(TARGET, i), table, RULE != COUPLED_RULE, ENTRIES, TILES
    )
    token = tl.full([], -1, tl.int64)
    if i < drafted:
        token = tl.load(tokens + i * stride).to(tl.int64)
    tested = (token >= 0) & valid
    one = tl.full([], 1.0, tl.float64)
    place = states + i * STATE
    if RULE == COUPLED_RULE:
        drawn = target.argmax
        if drawn < 0:
            drawn = flat_race(rows, i, target, key, TILES)
        passed = tested & (token == drawn)
        store_state(place, target, target, one)
        tl.store(place + DRAWN, drawn.to(tl.float64))
    else:
        # A greedy target accepts its argmax and draws its argmax: there no distribution of the draft matters.
        needed = tested & (target.argmax < 0)
        draft, draft_prob, usable = draft_distribution(drafts, i, token, needed, key, table + 2 * ENTRIES, ENTRIES)
        tested = tested & usable
        prob = tl.full([], 0.0, tl.float64)
        if tested:
            prob = tl.exp(log_prob(load_logits(rows, i, token), target, token))
        # Strict: a token the target gives probability 0 is never accepted, even by uniform 0.
        passed = tested & (uniform(key.seed, key.position, i) * draft_prob < prob)
        store_state(place, target, draft, one)
        tl.store(place + PROB, prob)
        tl.store(place + DRAFT_PROB, draft_prob)
    tl.store(place + VALID, valid.to(tl.float64))
    tl.store(place + TESTED, tested.to(tl.float64))
    tl.store(place + NEXT, tl.where(passed, i + 1, -1).to(tl.float64))


@triton.jit
def end_chain(
    rows, drafts, drafted, end, key, table, states, RULE: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Rules token and coupled, where the path ends in row ``end``: (drawn token, all rows valid?)."""
    place = states + end * STATE
    tested = tl.load(place + TESTED) != 0
    all_valid = (tl.load(place + VALID) != 0) & (tested | (end == drafted))
    if RULE == COUPLED_RULE:
        drawn = tl.load(place + DRAWN).to(tl.int64)
    else:
        target, draft, _divided = load_state(place, tl.full([], 1.0, tl.float64))
        drawn = draw_last(rows, drafts, end, target, draft, None, tested, key, table, ENTRIES, TILES)
    return drawn, all_valid


@triton.jit
def find_path_probs(drafted, states):
    """Rule block, once all rows are judged: the acceptance probabilities of their paths, docs/algorithms.md, 2."""
    path_prob = tl.full([], 1.0, tl.float64)
    looked_at = tl.full([], 0, tl.int64)
    tested = tl.full([], 1, tl.int1)
    while tested & (path_prob > 0) & (looked_at < drafted):
        place = states + looked_at * STATE
        tested = tl.load(place + TESTED) != 0
        if tested:
            # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
            prob = tl.load(place + PROB)
            path_prob = tl.where(prob > 0, tl.minimum(1.0, path_prob * prob / tl.load(place + DRAFT_PROB)), 0.0)
            looked_at += 1
            tl.store(states + looked_at * STATE + PATH_PROB, path_prob)
    tl.store(states + LOOKED_AT, looked_at.to(tl.float64))


@triton.jit
def load_divided(place):
    """(distribution of the target, of the draft divided by the path's acceptance probability, that): (path_prob *
    target - draft)+ is in proportion to (target - draft / path_prob)+."""
    path_prob = tl.load(place + PATH_PROB)
    target, _draft, divided = load_state(place, path_prob)
    return target, divided, path_prob


@triton.jit
def wants_mass(i, states):
    """Whether rule block asks for the mass of the residual of row i."""
    here = (i > 0) & (i < tl.load(states + LOOKED_AT))
    return here & (tl.load(states + i * STATE + PATH_PROB) < 1.0)


@triton.jit
def end_block(
    rows, drafts, drafted, key, tables, states, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Rule block, from the path probabilities and the residuals' masses: (last row, drawn token, all rows valid?)."""
    looked_at = tl.load(states + LOOKED_AT).to(tl.int64)
    kept = looked_at
    deciding = kept > 0
    while deciding:
        threshold = tl.load(states + kept * STATE + PATH_PROB)
        if kept < looked_at:
            left = tl.full([], 1.0, tl.float64)
            if wants_mass(kept, states):
                left = threshold * measured_mass(rows, tables + (4 * kept + 2) * ENTRIES, ENTRIES)
            threshold = left / (left + 1.0 - threshold)
        if uniform(key.seed, key.position, kept - 1) < threshold:
            deciding = tl.full([], 0, tl.int1)
        else:
            kept -= 1
            deciding = kept > 0
    # The row after the last draft was not looked at: there is nothing to reject in it.
    place = states + kept * STATE
    next_place = states + looked_at * STATE  # a row that was not looked at, unless there is nothing to look for
    all_valid = (looked_at == drafted) | (tl.load(next_place + PATH_PROB) == 0) | (tl.load(next_place + TESTED) != 0)
    all_valid = all_valid & ((kept < drafted) | (tl.load(place + VALID) != 0))
    target, draft, _path_prob = load_divided(place)
    table = tables + 4 * kept * ENTRIES
    drawn = draw_last(rows, drafts, kept, target, draft, None, kept < looked_at, key, table, ENTRIES, TILES)
    return kept, drawn, all_valid


@triton.jit
def judge_node(
    rows, tree, node, depth, sampling, key, table, states, COUPLED: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Rules walk and coupled: what is drawn from a node's row, and its child that is that token."""
    tag = race_tag(TARGET, node)
    target, valid = distribution_of(rows, node, sampling, key, tag, table, not COUPLED, ENTRIES, TILES)
    drawn = target.argmax
    if drawn < 0:
        if COUPLED:
            # The race is held at the absolute position, which row `node` of a chain would be at.
            drawn = flat_race(rows, node, target, Key(key.seed, key.position + depth - node), TILES)
        else:
            drawn = draw_from_row(rows, node, target, key, tag)
    child = tree.nodes
    if valid:
        child = next_child(tree, node, node)
        while (child < tree.nodes) & (tl.load(tree.tokens + child, mask=child < tree.nodes, other=-1) != drawn):
            child = next_child(tree, node, child)
    place = states + node * STATE
    store_state(place, target, target, tl.full([], 1.0, tl.float64))
    tl.store(place + VALID, valid.to(tl.float64))
    tl.store(place + DRAWN, drawn.to(tl.float64))
    tl.store(place + NEXT, tl.where(child < tree.nodes, child, -1).to(tl.float64))


@triton.jit
def logprobs_of(rows, plain, i, token, key, table, place, valid, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """(logprob, raw logprob) of a token of a judged row; its table is overwritten."""
    nan = float("nan")
    target, _draft, _divided = load_state(place, tl.full([], 1.0, tl.float64))
    score = log_prob(load_logits(rows, i, token), target, token).to(tl.float32)
    raw, raw_valid = raw_distribution(plain, i, key, table, ENTRIES, TILES)
    raw_score = log_prob(load_logits(plain, i, token), raw, token).to(tl.float32)
    return tl.where(valid, score, nan), tl.where(raw_valid, raw_score, nan)
