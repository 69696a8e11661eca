"""Rules token and block: what is asked of a row once it is measured, and how a chain ends. Semantics:
:mod:`specdec_kernels.ops`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.triton_kernels.distribution import distribution_of, race_tag
from specdec_kernels.triton_kernels.noise import uniform
from specdec_kernels.triton_kernels.request import (
    DRAFT_PROB,
    DRAWN,
    NEXT,
    PATH_PROB,
    PROB,
    STATE,
    TESTED,
    draft_distribution,
    is_valid,
    load_state,
    store_state,
)
from specdec_kernels.triton_kernels.residual import TARGET, draw_last, measured_mass
from specdec_kernels.triton_kernels.rows import DRAFTS, NUMBERS, load_logits, log_prob, token_of

# Where the first row would have the token drawn from it: how many drafts rule block can accept.
USABLE = DRAWN


@triton.jit
def judge_draft(
    rows, drafts, tree, i, sampling, key, table, states, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Of row i, whose tables are made, store all that a rule asks for: so whether its draft passes on its own, by its
    uniform."""
    target, valid = distribution_of(rows, i, sampling, key, race_tag(TARGET, i), None, table, ENTRIES, TILES)
    token = tl.full([], -1, tl.int64)
    if i + 1 < tree.nodes:
        token = token_of(tree, i + 1)
    # A greedy target accepts its argmax and draws its argmax: there no distribution of the draft matters.
    tested = (token >= 0) & valid
    needed = tested & (target.argmax < 0)
    draft, draft_prob, usable = draft_distribution(drafts, i, token, needed, key, table + DRAFTS * ENTRIES, ENTRIES)
    tested = tested & usable
    logit = load_logits(rows, i, tl.maximum(token, 0))
    prob = tl.where(tested, tl.exp(log_prob(logit, target, token)), 0.0)
    state = states + i * STATE
    store_state(state, target, draft, tl.full([], 1.0, tl.float64), valid)
    tl.store(state + TESTED, tested.to(tl.float64))
    # Strict: a token the target gives probability 0 is never accepted, even by uniform 0.
    passed = tested & (uniform(key.seed, key.position, i) * draft_prob < prob)
    tl.store(state + NEXT, tl.where(passed, i + 1, -1).to(tl.float64))
    tl.store(state + PROB, prob)
    tl.store(state + DRAFT_PROB, draft_prob)


@triton.jit
def find_path_probs(drafted, states):
    """Rule block, once all rows are judged: the acceptance probabilities of their paths, docs/algorithms.md, 2."""
    path_prob = tl.full([], 1.0, tl.float64)
    usable = tl.full([], 0, tl.int64)
    tested = tl.full([], 1, tl.int1)
    while tested & (path_prob > 0) & (usable < drafted):
        state = states + usable * STATE
        tested = tl.load(state + TESTED) != 0
        if tested:
            # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
            prob = tl.load(state + PROB)
            path_prob = tl.where(prob > 0, tl.minimum(1.0, path_prob * prob / tl.load(state + DRAFT_PROB)), 0.0)
            usable += 1
            tl.store(states + usable * STATE + PATH_PROB, path_prob)
    tl.store(states + USABLE, usable.to(tl.float64))
    tl.debug_barrier()


@triton.jit
def load_divided(state):
    """(distribution of the target, of the draft divided by the path's acceptance probability): (path_prob * target -
    draft)+ is in proportion to (target - draft / path_prob)+."""
    target, _draft, divided = load_state(state, tl.load(state + PATH_PROB))
    return target, divided


@triton.jit
def wants_mass(i, states):
    """Whether rule block asks for the mass of the residual of row i."""
    here = (i > 0) & (i < tl.load(states + USABLE))
    return here & (tl.load(states + i * STATE + PATH_PROB) < 1.0)


@triton.jit
def kept_by_block_rule(rows, key, tables, states, ENTRIES: tl.constexpr):
    """How many drafts are accepted, from the path probabilities and the residuals' masses."""
    usable = tl.load(states + USABLE).to(tl.int64)
    kept = usable
    deciding = kept > 0
    while deciding:
        threshold = tl.load(states + kept * STATE + PATH_PROB)
        if kept < usable:
            left = tl.full([], 1.0, tl.float64)
            if wants_mass(kept, states):
                left = threshold * measured_mass(rows, tables + (NUMBERS * kept + DRAFTS) * ENTRIES, ENTRIES)
            threshold = left / (left + 1.0 - threshold)
        if uniform(key.seed, key.position, kept - 1) < threshold:
            deciding = tl.full([], 0, tl.int1)
        else:
            kept -= 1
            deciding = kept > 0
    return kept


@triton.jit
def chain_is_valid(tree, end, states, IS_BLOCK: tl.constexpr):
    """Whether all rows are that were read before the path ended in row ``end``."""
    state = states + end * STATE
    valid = is_valid(state) & ((tl.load(state + TESTED) != 0) | (end == tree.nodes - 1))
    if IS_BLOCK:
        # Rows behind were read too, up to one that is not usable, unless there is nothing to look for.
        usable = tl.load(states + USABLE).to(tl.int64)
        behind = states + usable * STATE
        ended = (usable == tree.nodes - 1) | (tl.load(behind + PATH_PROB) == 0)
        valid = valid & (ended | (tl.load(behind + TESTED) != 0))
    return valid


@triton.jit
def end_chain(rows, drafts, end, key, tables, states, IS_BLOCK: tl.constexpr, ENTRIES: tl.constexpr):
    """The token that ends the step where the path ends in row ``end``."""
    state = states + end * STATE
    path_prob = tl.full([], 1.0, tl.float64)
    rejected = tl.load(state + TESTED) != 0
    if IS_BLOCK:
        path_prob = tl.load(state + PATH_PROB)
        rejected = end < tl.load(states + USABLE).to(tl.int64)
    target, _draft, divided = load_state(state, path_prob)
    table = tables + end * NUMBERS * ENTRIES
    return draw_last(rows, drafts, end, target, divided, None, rejected, key, table, ENTRIES)
