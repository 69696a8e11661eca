"""What verifying one request takes, be it a chain or a tree: its nodes, how their drafts were drawn, and what is known
of each once it was judged."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.triton_kernels.arguments import DRAFT_LOGITS, DRAFT_STATS, DRAFT_TEMPERATURES, REDUCED
from specdec_kernels.triton_kernels.distribution import raw_distribution, scale_of, summary
from specdec_kernels.triton_kernels.rows import (
    Distribution,
    load_logits,
    log_prob,
    measure,
    parent_of,
    scalars_of,
)

# Nodes that are loaded at a time.
WINDOW = tl.constexpr(32)

# The state of a row once it was judged, in doubles. `store_state` fills the first ten: the distributions of target and
# draft, and the acceptance probability of the path to it. Then, whether it is valid and its mass up to date.
PATH_PROB, FLAGS = tl.constexpr(9), tl.constexpr(10)
IS_VALID, IS_UPDATED = tl.constexpr(1), tl.constexpr(2)
# But for rules recursive and traversal: whether its draft can be tested; the row that follows it on the path, or -1;
# the token drawn from it; the draft's probability under target and draft.
TESTED, NEXT, DRAWN = tl.constexpr(11), tl.constexpr(12), tl.constexpr(13)
PROB, DRAFT_PROB = tl.constexpr(14), tl.constexpr(15)
# Of those: the mass of its residual; what its rejected children left of the draft, their factor (see `Rejected`), the
# last child that was visited; and as a rejected sibling its own factor.
MASS, LEFT, FACTOR = tl.constexpr(11), tl.constexpr(12), tl.constexpr(13)
LAST, OWN_FACTOR = tl.constexpr(14), tl.constexpr(15)
STATE = tl.constexpr(16)


class Drafts(NamedTuple):
    """What is known of how a request's drafts were drawn."""

    rows: Any
    reduced: Any
    """The same rows, where they have some of the vocabulary only: what is read of them where ``flags`` has REDUCED."""
    stats: Any
    """Pointer to the scalars of the first draft."""
    scale: Any
    """Of drafts that came without them."""
    flags: Any
    """Of :mod:`.arguments`: without DRAFT_LOGITS the drafts are point masses."""


@triton.jit
def next_child(tree, node, after, token):
    """The first child of ``node`` behind ``after``, with that ``token`` unless it is None; the number of nodes if there
    is none. A node whose token is none is no child."""
    child = tree.nodes
    start = after + 1
    while (start < tree.nodes) & (child == tree.nodes):
        index = start + tl.arange(0, WINDOW)
        inside = index < tree.nodes
        own = tl.load(tree.tokens + index * tree.stride, mask=inside, other=-1).to(tl.int64)
        parent = index - 1 if tree.parents is None else tl.load(tree.parents + index, mask=inside, other=-1)
        found = inside & (parent == node) & (own >= 0) & (own < tree.vocab)
        if token is not None:
            found = found & (own == token)
        child = tl.min(tl.where(found, index, tree.nodes))
        start += WINDOW
    return child


@triton.jit
def depth_of(tree, node):
    depth = tl.full([], 0, tl.int64)
    while node > 0:
        node = parent_of(tree, node)
        depth += 1
    return depth


@triton.jit
def draft_scale_of(temperatures_ptr, flags, temperature, request):
    """Of the drafts of a request that came without stats."""
    some = flags & DRAFT_TEMPERATURES != 0
    return scale_of(tl.load(temperatures_ptr + request, mask=some, other=temperature))


@triton.jit
def load_draft_logits(drafts, i, ids):
    """float32 logits of draft i for the target's ``ids``."""
    return load_logits(drafts.reduced, i, ids) if drafts.flags & REDUCED != 0 else load_logits(drafts.rows, i, ids)


@triton.jit
def measure_draft(drafts, i, part, slices, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """``measure`` the row that draft i was drawn from. Skipped where no table is needed: the draft came with its
    scalars, or without logits, or was drawn greedily."""
    if (drafts.flags & DRAFT_LOGITS != 0) & (drafts.flags & DRAFT_STATS == 0) & (drafts.scale < float("inf")):
        # Apart, so that whole rows are loaded 16 bytes at a time; and columns, which take registers, of few tiles.
        FEW: tl.constexpr = 16
        if drafts.flags & REDUCED != 0:
            measure(drafts.reduced, i, drafts.scale, None, part, slices, table, ENTRIES, FEW)
        else:
            measure(drafts.rows, i, drafts.scale, None, part, slices, table, ENTRIES, TILES)


@triton.jit
def drafted_prob(drafts, i, distribution, token):
    """The draft's probability of a token: float64. A point mass is on whatever was drafted."""
    prob = tl.full([], 1.0, tl.float64)
    if distribution.argmax < 0:
        prob = tl.exp(log_prob(load_draft_logits(drafts, i, token), distribution, token))
    return prob


@triton.jit
def draft_distribution(drafts, i, token, needed, key, table, ENTRIES: tl.constexpr):
    """(the distribution that draft i was drawn from, the draft's probability, whether both are usable): its own softmax
    at ``drafts.scale`` from its table, or the scalars handed over; the point mass on it where there are no logits,
    where it was drawn greedily, or where no distribution is ``needed``."""
    scale = tl.full([], 0.0, tl.float32) + drafts.scale
    cutoff = tl.full([], float("-inf"), tl.float32)
    logsumexp = tl.full([], 0.0, tl.float64)
    argmax = token
    prob = tl.full([], 1.0, tl.float64)
    usable = tl.full([], 1, tl.int1)
    if needed & (drafts.flags & DRAFT_LOGITS != 0):
        if drafts.flags & DRAFT_STATS != 0:
            stats = drafts.stats + 3 * i
            scale, cutoff = tl.load(stats), tl.load(stats + 1)
            logsumexp = tl.load(stats + 2).to(tl.float64)
        elif scale < float("inf"):
            no_tag = tl.full([], 0, tl.int64)
            total, _tile, usable, top, _first = summary(drafts.rows, scale, table, key, no_tag, False, ENTRIES)
            scale, cutoff, logsumexp = scalars_of(scale, cutoff, total, top)
        argmax = tl.where(scale == float("inf"), token, -1)
        prob = drafted_prob(drafts, i, Distribution(scale, cutoff, logsumexp, argmax, argmax), token)
    return Distribution(scale, cutoff, logsumexp, argmax, argmax), prob, usable & (prob < float("inf"))


@triton.jit
def store_state(state, target, draft, path_prob, flags):
    """What is known of a row, whatever the rule."""
    for scalar in tl.static_range(5):
        tl.store(state + scalar, target[scalar].to(tl.float64))
    for scalar in tl.static_range(4):
        tl.store(state + 5 + scalar, draft[scalar].to(tl.float64))
    tl.store(state + PATH_PROB, path_prob)
    tl.store(state + FLAGS, flags.to(tl.float64))


@triton.jit
def load_state(state, factor):
    """(distribution of the target, of the draft, of the draft divided by ``factor``)."""
    target = Distribution(
        tl.load(state).to(tl.float32), tl.load(state + 1).to(tl.float32), tl.load(state + 2),
        tl.load(state + 3).to(tl.int64), tl.load(state + 4).to(tl.int64),
    )  # fmt: skip
    draft_scale, draft_cutoff = tl.load(state + 5).to(tl.float32), tl.load(state + 6).to(tl.float32)
    logsumexp, argmax = tl.load(state + 7), tl.load(state + 8).to(tl.int64)
    draft = Distribution(draft_scale, draft_cutoff, logsumexp, argmax, argmax)
    return target, draft, Distribution(draft_scale, draft_cutoff, logsumexp + tl.log(factor), argmax, argmax)


@triton.jit
def is_valid(state):
    return tl.load(state + FLAGS).to(tl.int32) & IS_VALID != 0


@triton.jit
def logprobs_of(rows, plain, i, token, key, table, state, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """(logprob, raw logprob) of a token of a judged row; its table is overwritten."""
    nan = float("nan")
    target, _draft, _divided = load_state(state, tl.full([], 1.0, tl.float64))
    score = log_prob(load_logits(rows, i, token), target, token).to(tl.float32)
    raw, raw_valid = raw_distribution(plain, i, key, table, ENTRIES, TILES)
    raw_score = log_prob(load_logits(plain, i, token), raw, token).to(tl.float32)
    return tl.where(is_valid(state), score, nan), tl.where(raw_valid, raw_score, nan)
