"""``verify_tree``: one launch. Semantics: :mod:`specdec_kernels.ops.tree_rules`.

Several programs measure the row of a node, each its slice of the tiles, and the last of them to finish judges it. Rules
walk and coupled then go as a chain goes: whoever completes the path decides, and nodes that the path is known to pass
by are not read. The others need the masses of residuals, one after the other: whoever judges the last node goes on
until a mass is wanted, programs that begin later sum it together, and the last of them goes on.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import LEAST_DIFFERENCE as _LEAST_DIFFERENCE
from specdec_kernels.contract import NOTHING_LEFT as _NOTHING_LEFT
from specdec_kernels.contract import TreeRule
from specdec_kernels.triton_kernels.arguments import (
    BITMASK,
    DRAFT_LOGITS,
    LOGPROBS,
    REPLACEMENT,
    SAMPLING,
    given,
    instead,
    processing_arguments,
)
from specdec_kernels.triton_kernels.arrivals import ENDED, arrive, follow, passed_by, rest, seen, ticket, wait
from specdec_kernels.triton_kernels.distributions import distribution_of, sampling_of, table_scale
from specdec_kernels.triton_kernels.draws import (
    PATH_PROB,
    STATE,
    TARGET,
    Drafts,
    Rejected,
    Tree,
    draft_distribution,
    draft_scale_of,
    drafted_prob,
    draw_last,
    load_draft_logits,
    load_state,
    measure_draft,
    measure_residual,
    measured_mass,
    next_child,
    race_tag,
    store_state,
)
from specdec_kernels.triton_kernels.launch import (
    PROGRAMS_A_PROCESSOR,
    LaunchConfig,
    config_for,
    empty,
    launch,
    power_of_two,
    scratch,
    slices_of,
)
from specdec_kernels.triton_kernels.noise import uniform
from specdec_kernels.triton_kernels.rows import (
    STAGES,
    TILE,
    Key,
    Reduced,
    Rows,
    block_ids,
    load_logits,
    log_prob,
    measure,
    probs,
    processing_of,
)
from specdec_kernels.triton_kernels.rules import DRAWN, VALID, judge_node, logprobs_of
from specdec_kernels.triton_kernels.trees import live_count

LEAST_DIFFERENCE = tl.constexpr(_LEAST_DIFFERENCE)
NOTHING_LEFT = tl.constexpr(_NOTHING_LEFT)
RECURSIVE = tl.constexpr(int(TreeRule.RECURSIVE))
TRAVERSAL = tl.constexpr(int(TreeRule.TRAVERSAL))
COUPLED_RULE = tl.constexpr(int(TreeRule.COUPLED))

# What rules recursive and traversal keep of a node, in doubles, beside its distributions and path probability: whether
# its row is valid and its mass up to date (1, 2, or both); the mass of its residual; the draft's probability of its
# rejected children, their factor (see `Rejected`), the last child that was visited; and as a rejected sibling its own
# factor.
FLAGS, MASS, DRAFTED = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
FACTOR, LAST, OWN_FACTOR = tl.constexpr(13), tl.constexpr(14), tl.constexpr(15)
IS_VALID, UPDATED = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def depth_of(tree, node):
    depth = tl.full([], 0, tl.int64)
    while node > 0:
        node = tl.load(tree.parents + node)
        depth += 1
    return depth


@triton.jit
def init_node(rows, drafts, tree, node, sampling, key, table, states, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Rules recursive and traversal: the state of a node that nobody visited."""
    target, valid = distribution_of(rows, node, sampling, key, race_tag(TARGET, node), table, True, ENTRIES, TILES)
    child = next_child(tree, node, node)
    token = tl.load(tree.tokens + child, mask=child < tree.nodes, other=0)
    needed = valid & (child < tree.nodes) & (target.argmax < 0)
    draft, _prob, usable = draft_distribution(drafts, node, token, needed, key, table + 2 * ENTRIES, ENTRIES)
    if needed:
        while (child < tree.nodes) & usable:
            token = tl.load(tree.tokens + child)
            usable = usable & (drafted_prob(drafts, node, draft, token) < float("inf"))
            child = next_child(tree, node, child)
    place = states + node * STATE
    store_state(place, target, draft, tl.full([], 1.0, tl.float64))
    tl.store(place + FLAGS, (valid.to(tl.int32) * IS_VALID + UPDATED).to(tl.float64))
    tl.store(place + MASS, tl.full([], 1.0, tl.float64))
    tl.store(place + DRAFTED, tl.full([], 0.0, tl.float64))
    tl.store(place + FACTOR, tl.full([], float("inf"), tl.float64))
    # No child is left to visit where a distribution is not usable.
    tl.store(place + LAST, tl.where(valid & usable, node, ENDED).to(tl.float64))


@triton.jit
def draft_left(drafts, tree, node, draft, last, drafted, TILES: tl.constexpr):
    """What the siblings up to ``last`` left of the draft's distribution: one minus what they took, summed anew where
    that would have no digits left."""
    left = 1.0 - drafted
    if (drafts.given & DRAFT_LOGITS != 0) & (left < LEAST_DIFFERENCE):
        sums = tl.zeros([TILES], tl.float32)
        for start in tl.range(0, tl.cdiv(drafts.rows.vocab, TILE), TILES, num_stages=STAGES):
            ids = block_ids(start, TILES)
            weights = probs(load_draft_logits(drafts, node, ids), draft)
            child = next_child(tree, node, node)
            while child <= last:
                weights = tl.where(ids == tl.load(tree.tokens + child), 0.0, weights)
                child = next_child(tree, node, child)
            sums += tl.sum(weights, axis=1)
        left = tl.sum(sums).to(tl.float64)
        left = tl.where(left < NOTHING_LEFT, 0.0, left)
    return left


@triton.jit
def update_residual(place, mass):
    """Mass and path probability of a node after its latest rejection."""
    path_prob, before = tl.load(place + PATH_PROB), tl.load(place + MASS)
    flags = tl.load(place + FLAGS).to(tl.int32)
    left = path_prob * mass / before
    after = tl.where(path_prob < 1.0, tl.where(left > 0, left / (left + 1.0 - path_prob), 0.0), path_prob)
    tl.debug_barrier()  # everybody has read what is overwritten now
    tl.store(place + MASS, mass)
    tl.store(place + PATH_PROB, after)
    tl.store(place + FLAGS, (flags | UPDATED).to(tl.float64))
    tl.debug_barrier()


@triton.jit
def load_residual(tree, node, states):
    """(distribution of the target, of the draft divided by their factor, the rejected children) of a node."""
    place = states + node * STATE
    factor = tl.load(place + FACTOR)
    target, _draft, divided = load_state(place, factor)
    return target, divided, Rejected(tree, tl.load(place + LAST).to(tl.int64), factor, states + OWN_FACTOR, STATE)


@triton.jit
def visit(rows, drafts, tree, key, states, visited, RULE: tl.constexpr, TILES: tl.constexpr):
    """Rules recursive and traversal, from where they stopped: whether they ended, or want the mass of the residual of
    the node at ``visited``. Recursive goes down to the first child that passes; traversal goes down to any child that
    may be on the path, and up again where a node fails."""
    node = tl.load(visited).to(tl.int64)
    one = tl.full([], 1.0, tl.float64)
    going = tl.full([], 1, tl.int1)
    ended = tl.full([], 0, tl.int1)
    while going:
        place = states + node * STATE
        last = tl.load(place + LAST).to(tl.int64)
        child = next_child(tree, node, last)
        bottom_up = (node > 0) & (RULE == TRAVERSAL)
        factor = tl.load(place + FACTOR)
        target, draft, _divided = load_state(place, factor)
        if ((child < tree.nodes) | bottom_up) & (tl.load(place + FLAGS) < UPDATED):
            going = target.argmax >= 0
            if going:  # a point mass is accepted where it is a child, and not touched by other children
                update_residual(place, tl.load(place + MASS))
        path_prob = tl.load(place + PATH_PROB)
        if going:
            if child < tree.nodes:
                mass, drafted = tl.load(place + MASS), tl.load(place + DRAFTED)
                token = tl.load(tree.tokens + child)
                certain = draft.argmax >= 0
                # An earlier sibling of the same token: rejected before, with a factor of its own.
                twin = next_child(tree, node, node)
                while (twin < child) & (tl.load(tree.tokens + twin) != token):
                    twin = next_child(tree, node, twin)
                new = twin == child
                left_of_draft = one
                prob = drafted_prob(drafts, node, draft, token)
                conditional = prob
                own = factor
                if tree.replacement == 0:
                    if certain == 0:
                        left_of_draft = draft_left(drafts, tree, node, draft, last, drafted, TILES)
                        known = new & (left_of_draft > 0)
                        conditional = tl.where(known, prob / tl.where(left_of_draft > 0, left_of_draft, 1.0), 0.0)
                    if new == 0:
                        own = tl.load(states + twin * STATE + OWN_FACTOR)
                weight = tl.exp(log_prob(load_logits(rows, node, token), target, token))
                weight = tl.where(certain, tl.where(new, weight, 0.0), tl.maximum(weight - prob / own, 0.0))
                # Strict: what the target excludes is never accepted, whatever the draft was declared to be.
                if RULE == RECURSIVE:
                    passed = uniform(key.seed, key.position, child - 1) * mass * conditional < weight
                    below = tl.where(passed, one, 0.0)
                    rejected = passed == 0
                else:
                    below = tl.where(weight > 0, tl.minimum(1.0, path_prob * weight / mass / conditional), 0.0)
                    rejected = tl.full([], 1, tl.int1)  # to be read only once it is
                tl.debug_barrier()  # everybody has read what is overwritten now
                if rejected:
                    if (left_of_draft > 0) & (path_prob > 0) & (mass > 0):
                        taken = path_prob * left_of_draft / mass
                        factor = tl.where(factor == float("inf"), taken, 1.0 / (1.0 / factor + 1.0 / taken))
                    tl.store(place + FACTOR, factor)
                    tl.store(place + DRAFTED, drafted + tl.where(new, prob, 0.0))
                    tl.store(place + LAST, child.to(tl.float64))
                    tl.store(place + FLAGS, tl.full([], IS_VALID, tl.float64))
                    tl.store(states + child * STATE + OWN_FACTOR, tl.where(new, factor, own))
                if below > 0:
                    node = child
                    place = states + node * STATE
                    tl.store(place + PATH_PROB, below)
                    if tl.load(place + LAST) >= ENDED:
                        tl.store(visited + 1, tl.full([], 0.0, tl.float64))
                tl.debug_barrier()
            else:
                ended = tl.full([], 1, tl.int1)
                if bottom_up:
                    ended = uniform(key.seed, key.position, node - 1) < path_prob
                going = ended == 0
                if going:
                    node = tl.load(tree.parents + node)
    tl.store(visited, node.to(tl.float64))
    tl.debug_barrier()
    return ended


@triton.jit(
    do_not_specialize=["top_k", "adjustments", "draft_width", "nodes", "batch", "slices", "passes", "parts", "flags"]
)  # 1 would become a constant, of another type
def verify_tree_kernel(
    target_ptr, tokens_ptr, parents_ptr, draft_ptr, draft_stats_ptr, target_to_draft_ptr, draft_temperatures_ptr,
    draft_temperature, seed_ptr, position_ptr, sampling_ptr, temperature, top_k, top_p, min_p, bitmask_ptr,
    edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, adjustments, tables_ptr, states_ptr, counters_ptr,
    out_tokens_ptr, out_nodes_ptr, out_accepted_ptr, out_valid_ptr, out_logprobs_ptr, out_raw_logprobs_ptr,
    target_request_stride, target_row_stride, draft_request_stride, draft_row_stride, draft_width, nodes, vocab, batch,
    slices, passes, parts, flags, RULE: tl.constexpr, PROCESSED: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) % batch).to(tl.int64)
    # At rest all counters are 0: of every row its programs that came (see `follow`), how many rows are done, and how
    # far the path is known; or how many masses were wanted, which programs began, and of the later ones how many ended.
    arrived = counters_ptr + b * (nodes + 4)
    done = arrived + nodes
    frontier = done + 1
    own = tl.program_id(0) // batch
    COUPLED: tl.constexpr = RULE == COUPLED_RULE
    BY_MASS: tl.constexpr = (RULE == RECURSIVE) | (RULE == TRAVERSAL)
    if BY_MASS:
        own = ticket(frontier + 1, nodes * slices + passes * parts)

    key = Key(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    sampling = sampling_of(sampling_ptr, flags & SAMPLING != 0, temperature, top_k, top_p, min_p, b)
    first = b * nodes
    tokens, parents = tokens_ptr + first, parents_ptr + first
    live = tl.minimum(live_count(parents, nodes, BLOCK), nodes).to(tl.int64)
    there = tl.maximum(live, 1)  # the first row is asked for even where there is no tree
    tree = Tree(parents, tokens, live, vocab, flags & REPLACEMENT)
    logits = target_ptr + b * target_request_stride
    plain = Rows(logits, target_row_stride, vocab, None, None)
    if PROCESSED:
        processing = processing_of(
            bitmask_ptr, flags & BITMASK != 0, edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr,
            adjustments, first, b, vocab, tokens, 1, parents, False,
        )  # fmt: skip
        rows = Rows(logits, target_row_stride, vocab, processing, None)
    else:
        rows = plain
    draft_logits = draft_ptr + b * draft_request_stride
    draft_rows = Rows(draft_logits, draft_row_stride, vocab, None, None)
    reduced_rows = Rows(draft_logits, draft_row_stride, vocab, None, Reduced(target_to_draft_ptr, draft_width))
    draft_scale = draft_scale_of(draft_temperatures_ptr, flags, draft_temperature, b)
    drafts = Drafts(draft_rows, reduced_rows, draft_stats_ptr + 3 * first, draft_scale, flags)
    # Behind the states of the nodes, the one that is visited, and whether all rows that were are valid.
    states = states_ptr + b * (nodes + 1) * STATE
    visited = states + nodes * STATE
    tables = tables_ptr + first * 4 * ENTRIES

    end = tl.full([], -1, tl.int64)
    resumed = tl.full([], 0, tl.int1)
    ended = tl.full([], 0, tl.int1)
    if own < nodes * slices:
        i = (own // slices).to(tl.int64)
        part = own % slices
        table = tables + i * 4 * ENTRIES
        if i < there:
            skipped = tl.full([], 0, tl.int1)
            if not BY_MASS:
                skipped = passed_by(frontier, parents, i, True)
            if skipped == 0:
                measure(rows, i, table_scale(sampling[0]), part, slices, table, ENTRIES, TILES)
                if BY_MASS:
                    if (next_child(tree, i, i) < tree.nodes) & (sampling[0] < float("inf")):
                        measure_draft(drafts, i, part, slices, table + 2 * ENTRIES, ENTRIES, TILES)
            if arrive(arrived + i, slices - 1):
                if BY_MASS:
                    init_node(rows, drafts, tree, i, sampling, key, table, states, ENTRIES, TILES)
                # Where a program of this row read nothing, what it saw of the path can be seen here.
                elif passed_by(frontier, parents, i, True) == 0:
                    depth = depth_of(tree, i)
                    judge_node(rows, tree, i, depth, sampling, key, table, states, COUPLED, ENTRIES, TILES)
                    end = follow(arrived, frontier, states, i)
                if arrive(done, (there - 1).to(tl.int32)):
                    if BY_MASS:
                        tl.store(visited, tl.full([], 0.0, tl.float64))
                        tl.store(visited + 1, tl.where(tl.load(states + LAST) < ENDED, 1.0, 0.0).to(tl.float64))
                        resumed = tl.full([], 1, tl.int1)
                        tl.debug_barrier()
                    else:
                        rest(arrived, nodes + 2)
    elif BY_MASS:
        wait(frontier, ((own - nodes * slices) // parts + 1).to(tl.int32))
        if seen(frontier) < ENDED:
            node = tl.load(visited).to(tl.int64)
            target, divided, rejected = load_residual(tree, node, states)
            sums = tables + (4 * node + 2) * ENTRIES
            part = (own - nodes * slices) % parts
            measure_residual(rows, drafts, node, target, divided, rejected, part, parts, sums, ENTRIES, TILES)
            resumed = arrive(arrived, parts - 1)
            if resumed:
                update_residual(states + node * STATE, measured_mass(rows, sums, ENTRIES))
    if BY_MASS:
        if resumed:
            ended = visit(rows, drafts, tree, key, states, visited, RULE, TILES)
            tl.atomic_add(frontier, tl.where(ended, ENDED, 1), sem="release")
            if ended:
                end = tl.load(visited).to(tl.int64)
        if own >= nodes * slices:
            if arrive(done + 3, passes * parts - 1):
                tl.store(frontier, 0)

    if end >= 0:
        place = states + end * STATE
        if BY_MASS:
            target, divided, rejected = load_residual(tree, end, states)
            some = (rejected.last > end) & (rejected.last < ENDED)
            table = tables + end * 4 * ENTRIES
            drawn = draw_last(rows, drafts, end, target, divided, rejected, some, key, table, ENTRIES, TILES)
            valid = tl.load(visited + 1) != 0
        else:
            drawn = tl.load(place + DRAWN).to(tl.int64)
            valid = tl.load(place + VALID) != 0
        depth = depth_of(tree, end)
        index = tl.arange(0, BLOCK)
        tl.store(out_tokens_ptr + first + index, tl.full([BLOCK], -1, tl.int64), mask=index < nodes)
        tl.store(out_nodes_ptr + first + index, tl.full([BLOCK], -1, tl.int32), mask=index < nodes)
        if flags & LOGPROBS != 0:
            nan = tl.full([BLOCK], float("nan"), tl.float32)
            tl.store(out_logprobs_ptr + first + index, nan, mask=index < nodes)
            tl.store(out_raw_logprobs_ptr + first + index, nan, mask=index < nodes)
        tl.debug_barrier()  # the path overwrites some of it
        tl.store(out_accepted_ptr + b, depth.to(tl.int32))
        tl.store(out_valid_ptr + b, valid)
        token = drawn
        node = end
        slot = first + depth
        while slot >= first:
            tl.store(out_tokens_ptr + slot, token)
            tl.store(out_nodes_ptr + slot, node.to(tl.int32))
            if flags & LOGPROBS != 0:
                place = states + node * STATE
                usable = tl.load(place + VALID).to(tl.int32) & IS_VALID != 0  # FLAGS lie there too
                score, raw_score = logprobs_of(
                    rows, plain, node, token, key, tables + node * 4 * ENTRIES, place, usable, ENTRIES, TILES
                )
                tl.store(out_logprobs_ptr + slot, score)
                tl.store(out_raw_logprobs_ptr + slot, raw_score)
            token = tl.load(tokens + node)
            node = tl.maximum(tl.load(parents + node), 0)
            slot -= 1


def passes_and_parts(nodes: int, batch: int, config: LaunchConfig, device: torch.device) -> tuple[int, int]:
    """How many masses rules recursive and traversal may want, one a rejected child; and how many programs sum one: as
    many as there are multiprocessors for each request, and no more, since most will find nothing left to do."""
    return max(1, nodes - 1), min(64, slices_of(PROGRAMS_A_PROCESSOR * batch, config, device))


def verify_tree(
    target_logits: Tensor, draft_tokens: Tensor, parents: Tensor, draft_logits: Tensor | None,
    draft_stats: Tensor | None, target_to_draft: Tensor | None, draft_temperatures: Tensor | None,
    draft_temperature: float, seed: Tensor, position: Tensor, sampling: Tensor | None, temperature: float, top_k: int,
    top_p: float, min_p: float, bitmask: Tensor | None, edit_ids: Tensor | None, edit_counts: Tensor | None,
    edit_bias: Tensor | None, penalties: Tensor | None, rule: int, replacement: bool,
    logprobs: bool, *, out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, nodes = parents.shape
    vocab = target_logits.shape[-1]
    if out is None:
        score = torch.float32, (batch, nodes) if logprobs else (0,)
        paths = (torch.int64, (batch, nodes)), (torch.int32, (batch, nodes))
        out = empty(target_logits, *paths, (torch.int32, (batch,)), (torch.bool, (batch,)), score, score)
    tokens, path, accepted, valid, scores, raw_scores = out
    if batch:
        walks = rule in (TreeRule.WALK, TreeRule.COUPLED)
        config = config_for(vocab, target_logits.device, large=True)  # a walk spills with 128 registers
        sizes = batch * (nodes + 4), batch * (nodes + 1) * STATE.value, batch * nodes * 4 * config.entries
        counters, states, tables = scratch(target_logits.device, *sizes)
        slices = slices_of(batch * nodes, config, target_logits.device)
        passes, parts = (0, 1) if walks else passes_and_parts(nodes, batch, config, target_logits.device)
        if walks:
            draft_logits = draft_stats = target_to_draft = draft_temperatures = None
        flags = given(
            sampling=sampling, bitmask=bitmask, draft_logits=draft_logits, draft_stats=draft_stats,
            draft_temperatures=draft_temperatures, logprobs=logprobs, replacement=replacement,
            reduced=target_to_draft,
        )  # fmt: skip
        drafted = (0, 0, vocab) if draft_logits is None else (*draft_logits.stride()[:2], draft_logits.shape[2])
        launch(
            verify_tree_kernel, batch * (nodes * slices + passes * parts), target_logits, draft_tokens, parents,
            instead(draft_logits, target_logits), instead(draft_stats, tables), instead(target_to_draft, counters),
            instead(draft_temperatures, tables), draft_temperature, seed, position, instead(sampling, tables),
            temperature, top_k, top_p, min_p,
            *processing_arguments(bitmask, edit_ids, edit_counts, edit_bias, penalties, counters, tables), tables,
            states, counters, tokens, path, accepted, valid, scores if logprobs else tables,
            raw_scores if logprobs else tables, *target_logits.stride()[:2], *drafted, nodes, vocab, batch,
            slices, passes, parts, flags, RULE=rule, PROCESSED=bitmask is not None or edit_ids is not None,
            BLOCK=power_of_two(nodes), **config.named,
        )  # fmt: skip
    return out
