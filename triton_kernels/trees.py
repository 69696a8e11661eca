"""Rules of trees: what is asked of a node once its row is measured, and how a path through nodes ends. Semantics:
:mod:`specdec_kernels.ops.tree_rules`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.contract import LEAST_DIFFERENCE as _LEAST_DIFFERENCE
from specdec_kernels.triton_kernels.arguments import REPLACEMENT
from specdec_kernels.triton_kernels.arrivals import ENDED
from specdec_kernels.triton_kernels.distribution import (
    NOTHING_LEFT,
    distribution_of,
    draw_from_row,
    flat_race,
    race_tag,
)
from specdec_kernels.triton_kernels.noise import uniform
from specdec_kernels.triton_kernels.request import (
    DRAWN,
    FACTOR,
    FLAGS,
    IS_UPDATED,
    IS_VALID,
    LAST,
    LEFT,
    MASS,
    NEXT,
    OWN_FACTOR,
    PATH_PROB,
    STATE,
    draft_distribution,
    drafted_prob,
    load_draft_logits,
    load_state,
    next_child,
    store_state,
)
from specdec_kernels.triton_kernels.residual import TARGET, Rejected, draw_last, without_children
from specdec_kernels.triton_kernels.rows import (
    DRAFTS,
    NUMBERS,
    block_ids,
    in_tiles,
    load_logits,
    log_prob,
    parent_of,
    probs,
    slice_of,
    token_of,
)

LEAST_DIFFERENCE = tl.constexpr(_LEAST_DIFFERENCE)


@triton.jit
def judge_node(
    rows, tree, node, sampling, key, race, table, states, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Rules walk and coupled: store what is drawn from a node's row, and its child that is that token."""
    tag = race_tag(TARGET, node)
    target, valid = distribution_of(rows, node, sampling, key, tag, race, table, ENTRIES, TILES)
    state = states + node * STATE
    store_state(state, target, target, tl.full([], 1.0, tl.float64), valid)
    drawn = target.argmax
    if drawn < 0:
        drawn = draw_from_row(rows, node, target, key, tag) if race is None else flat_race(rows, target, table, ENTRIES)
    child = tree.nodes
    if valid:
        child = next_child(tree, node, node, drawn)
    tl.store(state + DRAWN, drawn.to(tl.float64))
    tl.store(state + NEXT, tl.where(child < tree.nodes, child, -1).to(tl.float64))


@triton.jit
def init_node(rows, drafts, tree, node, sampling, key, table, states, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Rules recursive and traversal: the state of a node that was not visited."""
    target, valid = distribution_of(rows, node, sampling, key, race_tag(TARGET, node), None, table, ENTRIES, TILES)
    child = next_child(tree, node, node, None)
    needed = valid & (child < tree.nodes) & (target.argmax < 0)
    token = tl.load(tree.tokens + child * tree.stride, mask=child < tree.nodes, other=0).to(tl.int64)
    draft, _prob, usable = draft_distribution(drafts, node, token, needed, key, table + DRAFTS * ENTRIES, ENTRIES)
    if needed:
        while (child < tree.nodes) & usable:
            usable = usable & (drafted_prob(drafts, node, draft, token_of(tree, child)) < float("inf"))
            child = next_child(tree, node, child, None)
    state = states + node * STATE
    store_state(state, target, draft, tl.full([], 1.0, tl.float64), valid.to(tl.int32) * IS_VALID + IS_UPDATED)
    tl.store(state + MASS, tl.full([], 1.0, tl.float64))
    tl.store(state + LEFT, tl.full([], 1.0, tl.float64))
    tl.store(state + FACTOR, tl.full([], float("inf"), tl.float64))
    # No child is left to visit where a distribution is not usable.
    tl.store(state + LAST, tl.where(valid & usable, node, ENDED).to(tl.float64))


@triton.jit
def has_to_sum(drafts, draft, state):
    """Whether what its tested children left of a node's draft is summed: one minus what they took would have no digits
    left. A target without a distribution has a draft without one."""
    return (drafts.flags & REPLACEMENT == 0) & (draft.argmax < 0) & (tl.load(state + LEFT) < LEAST_DIFFERENCE)


@triton.jit
def measure_left(drafts, node, rejected, part, slices, sums, TILES: tl.constexpr):
    """One of the ``slices`` of a node's draft: what of each of its tiles the rejected children left, to ``sums``."""
    _target, draft, _divided = load_state(rejected.states + node * STATE, tl.full([], 1.0, tl.float64))
    first, last = slice_of(drafts.rows.vocab, part, slices, TILES)
    for start in tl.range(first, last, TILES, num_stages=1):
        ids = block_ids(drafts.rows, start, TILES)
        weights = probs(load_draft_logits(drafts, node, ids), draft)
        weights = without_children(weights, ids, rejected.tree, node, rejected.last)
        own = start + tl.arange(0, TILES)
        tl.store(sums + own, tl.sum(in_tiles(weights), axis=1), mask=own < last)


@triton.jit
def store_left(state, left):
    """What its children left of a node's draft, after it was summed."""
    tl.debug_barrier()  # everybody has read what is overwritten now
    tl.store(state + LEFT, tl.where(left < NOTHING_LEFT, 0.0, left))


@triton.jit
def update_residual(state, mass):
    """Mass and path probability of a node after its latest rejection."""
    path_prob, before = tl.load(state + PATH_PROB), tl.load(state + MASS)
    flags = tl.load(state + FLAGS).to(tl.int32)
    left = path_prob * mass / before
    after = tl.where(path_prob < 1.0, tl.where(left > 0, left / (left + 1.0 - path_prob), 0.0), path_prob)
    tl.debug_barrier()  # everybody has read what is overwritten now
    tl.store(state + MASS, mass)
    tl.store(state + PATH_PROB, after)
    tl.store(state + FLAGS, (flags | IS_UPDATED).to(tl.float64))
    tl.debug_barrier()


@triton.jit
def load_residual(tree, node, states):
    """(distribution of the target, of the draft divided by their factor, the rejected children) of a node."""
    state = states + node * STATE
    factor = tl.load(state + FACTOR)
    target, _draft, divided = load_state(state, factor)
    return target, divided, Rejected(tree, tl.load(state + LAST).to(tl.int64), factor, states)


@triton.jit
def visit(rows, drafts, tree, key, states, visited, IS_RECURSIVE: tl.constexpr):
    """Rules recursive and traversal, from where they stopped: whether they ended, or want the mass of the residual of
    the node at ``visited``. Recursive goes down to the first child that passes; traversal goes down to any child that
    may be on the path, and up again where a node fails."""
    node = tl.load(visited).to(tl.int64)
    one = tl.full([], 1.0, tl.float64)
    going = tl.full([], 1, tl.int1)
    ended = tl.full([], 0, tl.int1)
    while going:
        state = states + node * STATE
        last = tl.load(state + LAST).to(tl.int64)
        child = next_child(tree, node, last, None)
        bottom_up = (node > 0) & (not IS_RECURSIVE)
        factor = tl.load(state + FACTOR)
        target, draft, _divided = load_state(state, factor)
        if ((child < tree.nodes) | bottom_up) & (tl.load(state + FLAGS) < IS_UPDATED):
            going = target.argmax >= 0
            if going:  # a point mass is accepted where it is a child, and not touched by other children
                update_residual(state, tl.load(state + MASS))
        path_prob = tl.load(state + PATH_PROB)
        if going:
            if child < tree.nodes:
                mass, left = tl.load(state + MASS), tl.load(state + LEFT)
                token = token_of(tree, child)
                certain = draft.argmax >= 0
                # An earlier sibling of the same token: rejected before, with a factor of its own.
                twin = next_child(tree, node, node, token)
                new = twin == child
                left_of_draft = one
                prob = drafted_prob(drafts, node, draft, token)
                conditional = prob
                own = factor
                if drafts.flags & REPLACEMENT == 0:
                    if certain == 0:
                        left_of_draft = left
                        known = new & (left_of_draft > 0)
                        conditional = tl.where(known, prob / tl.where(left_of_draft > 0, left_of_draft, 1.0), 0.0)
                    if new == 0:
                        own = tl.load(states + twin * STATE + OWN_FACTOR)
                weight = tl.exp(log_prob(load_logits(rows, node, token), target, token))
                weight = tl.where(certain, tl.where(new, weight, 0.0), tl.maximum(weight - prob / own, 0.0))
                # Strict: what the target excludes is never accepted, whatever the draft was declared to be.
                if IS_RECURSIVE:
                    passed = uniform(key.seed, key.position, child - 1) * mass * conditional < weight
                    below = tl.where(passed, one, 0.0)
                    rejected = passed == 0
                else:
                    below = tl.where(weight > 0, tl.minimum(1.0, path_prob * weight / mass / conditional), 0.0)
                    rejected = tl.full([], 1, tl.int1)  # to be read only once it is
                tl.debug_barrier()  # everybody has read what is overwritten now
                if rejected:
                    if (left_of_draft > 0) & (path_prob > 0) & (mass > 0):
                        removed = path_prob * left_of_draft / mass
                        factor = tl.where(factor == float("inf"), removed, 1.0 / (1.0 / factor + 1.0 / removed))
                    tl.store(state + FACTOR, factor)
                    tl.store(state + LEFT, left - tl.where(new, prob, 0.0))
                    tl.store(state + LAST, child.to(tl.float64))
                    tl.store(state + FLAGS, tl.full([], IS_VALID, tl.float64))
                    tl.store(states + child * STATE + OWN_FACTOR, tl.where(new, factor, own))
                if below > 0:
                    node = child
                    state = states + node * STATE
                    tl.store(state + PATH_PROB, below)
                    if tl.load(state + LAST) >= ENDED:
                        tl.store(visited + 1, tl.full([], 0.0, tl.float64))
                tl.debug_barrier()
            else:
                ended = tl.full([], 1, tl.int1)
                if bottom_up:
                    ended = uniform(key.seed, key.position, node - 1) < path_prob
                going = ended == 0
                if going:
                    node = parent_of(tree, node)
    tl.debug_barrier()  # all warps have read it
    tl.store(visited, node.to(tl.float64))
    tl.debug_barrier()
    return ended


@triton.jit
def end_tree(rows, drafts, tree, end, key, tables, states, ENTRIES: tl.constexpr):
    """Rules recursive and traversal: the token that ends the step where the path ends at node ``end``."""
    target, divided, rejected = load_residual(tree, end, states)
    some = (rejected.last > end) & (rejected.last < ENDED)
    table = tables + end * NUMBERS * ENTRIES
    return draw_last(rows, drafts, end, target, divided, rejected, some, key, table, ENTRIES)
