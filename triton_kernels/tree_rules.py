"""``verify_tree``: one launch. Semantics: :mod:`specdec_kernels.ops.tree_rules`.

Either several programs measure the rows of all nodes, and the last of a request to finish decides; or one program a
request measures a row when it comes to it. The first is for few requests, and for the rule that comes to all nodes.
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
from specdec_kernels.triton_kernels.launch import config_for, counters_at_rest, measures_ahead, slices_of
from specdec_kernels.triton_kernels.laws import (
    draft_scale_of,
    raw_logprob,
    row_law,
    sampling_of,
    table_scale,
    tabled_law,
    token_logprob,
)
from specdec_kernels.triton_kernels.noise import coin
from specdec_kernels.triton_kernels.residuals import (
    REACH,
    TARGET,
    Rejected,
    Tree,
    draft_law,
    emit,
    next_child,
    recalled_laws,
    remember,
    residual_mass,
)
from specdec_kernels.triton_kernels.rows import (
    STAGES,
    TILE,
    Key,
    Rows,
    block_ids,
    draw_from_row,
    flat_race,
    load_block,
    log_prob,
    own_edits,
    probs,
    race_tag,
    tables_of,
)
from specdec_kernels.triton_kernels.teams import arrive, measure
from specdec_kernels.triton_kernels.trees import live_count

LEAST_DIFFERENCE = tl.constexpr(_LEAST_DIFFERENCE)
NOTHING_LEFT = tl.constexpr(_NOTHING_LEFT)
RECURSIVE = tl.constexpr(int(TreeRule.RECURSIVE))
TRAVERSAL = tl.constexpr(int(TreeRule.TRAVERSAL))
COUPLED_RULE = tl.constexpr(int(TreeRule.COUPLED))

# What is known of a node, in doubles, behind what `remember` stores of it: the mass of its residual, the draft's
# probability of its rejected children, their factor (see `Rejected`), the last child that was looked at, whether mass
# and reach are up to date; and as a rejected sibling its own factor.
MASS, DRAFTED, FACTOR = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
LAST, SETTLED, OWN_FACTOR = tl.constexpr(13), tl.constexpr(14), tl.constexpr(15)
MEMORY = tl.constexpr(16)


@triton.jit
def depth_of(tree, node):
    depth = tl.full([], 0, tl.int64)
    while node > 0:
        node = tl.load(tree.parents + node)
        depth += 1
    return depth


@triton.jit
def look(
    rows, node, sampling, key, tables, RACE: tl.constexpr, AHEAD: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """(law of a node's row, whether it is valid). ``AHEAD``: all rows were measured, each into tables of its own; else
    there is one table, which every row is measured into."""
    tag = race_tag(TARGET, node)
    if AHEAD:
        table = tables_of(tables, node, ENTRIES)
        law, valid = tabled_law(rows, node, sampling, key, tag, table, RACE, ENTRIES, TILES)
    else:
        law, valid = row_law(rows, node, sampling, key, tag, tables, RACE, ENTRIES, TILES)
    return law, valid


@triton.jit
def walk(
    rows, tree, sampling, key, tables, RULE: tl.constexpr, AHEAD: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Rules walk and coupled: (last node of the path, emitted token, all rows valid?)."""
    node = tl.full([], 0, tl.int64)
    drawn = tl.full([], -1, tl.int64)
    all_valid = tl.full([], 1, tl.int1)
    walking = tl.full([], 1, tl.int32)
    while walking != 0:
        law, valid = look(rows, node, sampling, key, tables, RULE != COUPLED_RULE, AHEAD, ENTRIES, TILES)
        all_valid = valid
        drawn = law.argmax
        if drawn < 0:
            if RULE == COUPLED_RULE:
                ahead = depth_of(tree, node)
                # The race is held at the absolute position, which row `node` of a chain would be at.
                drawn = flat_race(rows, node, law, Key(key.seed, key.position + ahead - node), TILES)
            else:
                drawn = draw_from_row(rows, node, law, key, race_tag(TARGET, node))
        walking = valid.to(tl.int32)
        child = next_child(tree, node, node)
        while (child < tree.nodes) & (tl.load(tree.tokens + child, mask=child < tree.nodes, other=-1) != drawn):
            child = next_child(tree, node, child)
        if (walking != 0) & (child < tree.nodes):
            node = child
        else:
            walking = tl.full([], 0, tl.int32)
    return node, drawn, all_valid


@triton.jit
def drafted_prob(draft_rows, node, draft, token):
    """The draft's probability of a child, whatever its siblings: float64."""
    prob = tl.full([], 1.0, tl.float64)
    if draft_rows.logits is not None:
        if draft.argmax < 0:
            prob = tl.exp(log_prob(draft_rows, node, draft, token))
    return prob


@triton.jit
def enter(
    rows, draft_rows, stats_ptr, draft_scale, tree, node, reach, sampling, key, tables, memory, AHEAD: tl.constexpr,
    ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Look at a node: remember its laws and a fresh state. Whether its row and its children's laws are usable."""
    law, valid = look(rows, node, sampling, key, tables, True, AHEAD, ENTRIES, TILES)
    child = next_child(tree, node, node)
    token = tl.load(tree.tokens + child, mask=child < tree.nodes, other=0)
    needed = valid & (child < tree.nodes) & (law.argmax < 0)
    table = tables
    if AHEAD:
        table = tables_of(tables, node, ENTRIES) + 2 * ENTRIES
    draft, _prob, usable = draft_law(
        draft_rows, stats_ptr, draft_scale, node, token, needed, key, table, AHEAD, ENTRIES, TILES
    )  # fmt: skip
    if needed:
        while (child < tree.nodes) & usable:
            token = tl.load(tree.tokens + child)
            usable = usable & (drafted_prob(draft_rows, node, draft, token) < float("inf"))
            child = next_child(tree, node, child)
    place = memory + node * MEMORY
    remember(place, law, draft, reach)
    tl.store(place + MASS, tl.full([], 1.0, tl.float64))
    tl.store(place + DRAFTED, tl.full([], 0.0, tl.float64))
    tl.store(place + FACTOR, tl.full([], float("inf"), tl.float64))
    # No child is left to look at where a law is not usable.
    tl.store(place + LAST, tl.where(valid & usable, node, tree.nodes).to(tl.float64))
    tl.store(place + SETTLED, tl.full([], 1.0, tl.float64))
    tl.debug_barrier()  # what one thread remembered, others recall
    return valid & usable


@triton.jit
def draft_left(draft_rows, tree, node, draft, last, drafted, TILES: tl.constexpr):
    """What the siblings up to ``last`` left of the draft's law: one minus what they took, summed anew where that would
    have no digits left."""
    left = 1.0 - drafted
    if draft_rows.logits is not None:
        if left < LEAST_DIFFERENCE:
            sums = tl.zeros([TILES], tl.float32)
            for start in tl.range(0, tl.cdiv(draft_rows.vocab, TILE), TILES, num_stages=STAGES):
                ids = block_ids(start, TILES)
                weights = probs(load_block(draft_rows, node, start, TILES), draft)
                child = next_child(tree, node, node)
                while child <= last:
                    weights = tl.where(ids == tl.load(tree.tokens + child), 0.0, weights)
                    child = next_child(tree, node, child)
                sums += tl.sum(weights, axis=1)
            left = tl.sum(sums).to(tl.float64)
            left = tl.where(left < NOTHING_LEFT, 0.0, left)
    return left


@triton.jit
def settle(rows, draft_rows, tree, node, last, memory, TILES: tl.constexpr):
    """Mass and reach of a node after its latest rejection."""
    place = memory + node * MEMORY
    if tl.load(place + SETTLED) == 0:
        factor, reach, before = tl.load(place + FACTOR), tl.load(place + REACH), tl.load(place + MASS)
        law, _draft, divided = recalled_laws(place, factor)
        rejected = Rejected(tree, last, factor, memory + OWN_FACTOR, MEMORY)
        mass = before  # a point mass is accepted where it is a child, and not touched by other children
        if law.argmax < 0:
            mass = residual_mass(rows, draft_rows, node, law, divided, rejected, TILES)
        left = reach * mass / before
        after = tl.where(reach < 1.0, tl.where(left > 0, left / (left + 1.0 - reach), 0.0), reach)
        tl.debug_barrier()  # everybody has read what is overwritten now
        tl.store(place + MASS, mass)
        tl.store(place + REACH, after)
        tl.store(place + SETTLED, tl.full([], 1.0, tl.float64))
        tl.debug_barrier()


@triton.jit
def top_down_or_bottom_up(
    rows, draft_rows, stats_ptr, draft_scale, tree, sampling, key, tables, memory, RULE: tl.constexpr,
    AHEAD: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Rules recursive and traversal: (last node of the path, emitted token, all rows valid?). Recursive goes down to
    the first child that passes; traversal goes down to any child that may be come to, and up again where a node
    fails."""
    node = tl.full([], 0, tl.int64)
    one = tl.full([], 1.0, tl.float64)
    below = one
    all_valid = tl.full([], 1, tl.int32)
    entering = tl.full([], 1, tl.int32)
    deciding = tl.full([], 1, tl.int32)
    while deciding != 0:
        if entering != 0:
            fits = enter(
                rows, draft_rows, stats_ptr, draft_scale, tree, node, below, sampling, key, tables, memory, AHEAD,
                ENTRIES, TILES,
            )  # fmt: skip
            all_valid = all_valid & fits.to(tl.int32)
            entering = tl.full([], 0, tl.int32)
        place = memory + node * MEMORY
        last = tl.load(place + LAST).to(tl.int64)
        child = next_child(tree, node, last)
        bottom_up = node > 0
        if RULE == RECURSIVE:
            bottom_up = node < 0
        if (child < tree.nodes) | bottom_up:
            settle(rows, draft_rows, tree, node, last, memory, TILES)
        reach = tl.load(place + REACH)
        if child < tree.nodes:
            mass, drafted, factor = tl.load(place + MASS), tl.load(place + DRAFTED), tl.load(place + FACTOR)
            law, draft, _divided = recalled_laws(place, factor)
            token = tl.load(tree.tokens + child)
            certain = draft.argmax >= 0
            # An earlier sibling of the same token: rejected before, with a factor of its own.
            twin = next_child(tree, node, node)
            while (twin < child) & (tl.load(tree.tokens + twin) != token):
                twin = next_child(tree, node, twin)
            new = twin == child
            left_of_draft = one
            prob = drafted_prob(draft_rows, node, draft, token)
            if tree.replacement == 0:
                if not certain:
                    left_of_draft = draft_left(draft_rows, tree, node, draft, last, drafted, TILES)
            own = factor
            if tree.replacement == 0:
                if not new:
                    own = tl.load(memory + twin * MEMORY + OWN_FACTOR)
            weight = tl.exp(log_prob(rows, node, law, token))
            weight = tl.where(certain, tl.where(new, weight, 0.0), tl.maximum(weight - prob / own, 0.0))
            conditional = prob
            if tree.replacement == 0:
                if not certain:
                    known = new & (left_of_draft > 0)
                    conditional = tl.where(known, prob / tl.where(left_of_draft > 0, left_of_draft, 1.0), 0.0)
            # Strict: what the target excludes is never accepted, whatever the draft was declared to be.
            if RULE == RECURSIVE:
                below = tl.where(coin(key.seed, key.position, child - 1) * mass * conditional < weight, 1.0, 0.0)
                below = below.to(tl.float64)
            else:
                below = tl.where(weight > 0, tl.minimum(1.0, reach * weight / mass / conditional), 0.0)
            rejected = below == 0
            if RULE == TRAVERSAL:
                rejected = below >= 0  # to be read only once it is
            if rejected:
                tl.debug_barrier()  # everybody has read what is overwritten now
                if (left_of_draft > 0) & (reach > 0) & (mass > 0):
                    taken = reach * left_of_draft / mass
                    factor = tl.where(factor == float("inf"), taken, 1.0 / (1.0 / factor + 1.0 / taken))
                tl.store(place + FACTOR, factor)
                tl.store(place + DRAFTED, drafted + tl.where(new, prob, 0.0))
                tl.store(place + LAST, child.to(tl.float64))
                tl.store(place + SETTLED, tl.full([], 0.0, tl.float64))
                tl.store(memory + child * MEMORY + OWN_FACTOR, tl.where(new, factor, own))
                tl.debug_barrier()
            if below > 0:
                node = child
                entering = tl.full([], 1, tl.int32)
        else:
            accepted = tl.full([], 1, tl.int1)
            if bottom_up:
                accepted = coin(key.seed, key.position, node - 1) < reach
            if accepted:
                deciding = tl.full([], 0, tl.int32)
            else:
                node = tl.load(tree.parents + node)
    place = memory + node * MEMORY
    last, factor = tl.load(place + LAST).to(tl.int64), tl.load(place + FACTOR)
    law, _draft, divided = recalled_laws(place, factor)
    some = (last > node) & (last < tree.nodes)
    rejected = Rejected(tree, last, factor, memory + OWN_FACTOR, MEMORY)
    table = None
    if AHEAD:
        table = tables_of(tables, node, ENTRIES)
    emitted = emit(rows, draft_rows, node, law, divided, rejected, some, key, table, ENTRIES, TILES)
    return node, emitted, all_valid != 0


@triton.jit(
    do_not_specialize=["top_k", "num_edits", "nodes", "replacement", "batch", "slices"]
)  # 1 would become a constant, of another type
def verify_tree_kernel(
    target_ptr,
    tokens_ptr,
    parents_ptr,
    draft_ptr,
    draft_stats_ptr,
    draft_temperatures_ptr,
    draft_temperature,
    seed_ptr,
    position_ptr,
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
    tables_ptr,
    memory_ptr,
    counters_ptr,
    out_tokens_ptr,
    out_nodes_ptr,
    out_accepted_ptr,
    out_valid_ptr,
    out_logprobs_ptr,
    out_raw_logprobs_ptr,
    target_request_stride,
    target_row_stride,
    draft_request_stride,
    draft_row_stride,
    nodes,
    vocab,
    replacement,
    batch,
    slices,
    RULE: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
):
    b = (tl.program_id(0) % batch).to(tl.int64)
    key = Key(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    sampling = sampling_of(sampling_ptr, temperature, top_k, top_p, min_p, b)
    draft_scale = draft_scale_of(draft_temperatures_ptr, draft_temperature, b)
    first = b * nodes
    tokens, parents = tokens_ptr + first, parents_ptr + first
    live = tl.minimum(live_count(parents, nodes, BLOCK), nodes).to(tl.int64)
    tree = Tree(parents, tokens, live, vocab, replacement)
    logits = target_ptr + b * target_request_stride
    mask = None
    if bitmask_ptr is not None:
        mask = bitmask_ptr + first * ((vocab + 31) // 32)
    plain = Rows(logits, target_row_stride, vocab, None, None, None, None, 0, None, tokens, 1, parents)
    if edit_ids_ptr is not None:
        edits, counts, bias, penalties = own_edits(
            edit_ids_ptr, edit_counts_ptr, edit_bias_ptr, penalties_ptr, num_edits, b
        )
        rows = Rows(
            logits, target_row_stride, vocab, mask, edits, counts, bias, num_edits, penalties, tokens, 1, parents
        )
    else:
        rows = Rows(logits, target_row_stride, vocab, mask, None, None, None, 0, None, tokens, 1, parents)
    draft_logits = None
    stats = None
    if draft_ptr is not None:
        draft_logits = draft_ptr + b * draft_request_stride
        if draft_stats_ptr is not None:
            stats = draft_stats_ptr + 3 * first
    draft_rows = Rows(draft_logits, draft_row_stride, vocab, None, None, None, None, 0, None, tokens, 1, parents)

    tables = tables_ptr + b * 2 * ENTRIES
    decides = tl.full([], 1, tl.int1)
    if AHEAD:
        tables = tables_of(tables_ptr, first, ENTRIES)
        there = tl.maximum(live, 1)  # the first row is asked for even where there is no tree
        own = (tl.program_id(0) // batch // slices).to(tl.int64)
        part = tl.program_id(0) // batch % slices
        decides = own < there
        if decides:
            table = tables_of(tables, own, ENTRIES)
            measure(rows, own, table_scale(sampling[0]), part, slices, table, ENTRIES, TILES)
            if draft_ptr is not None:
                if draft_stats_ptr is None:
                    drawn = (sampling[0] < float("inf")) & (draft_scale < float("inf"))
                    if (next_child(tree, own, own) < tree.nodes) & drawn:
                        measure(draft_rows, own, draft_scale, part, slices, table + 2 * ENTRIES, ENTRIES, TILES)
            decides = arrive(counters_ptr + b, (there * slices - 1).to(tl.int32))
            if decides:
                tl.store(counters_ptr + b, 0)
    if decides:
        if (RULE == RECURSIVE) | (RULE == TRAVERSAL):
            memory = memory_ptr + first * MEMORY
            node, emitted, valid = top_down_or_bottom_up(
                rows, draft_rows, stats, draft_scale, tree, sampling, key, tables, memory, RULE, AHEAD, ENTRIES, TILES
            )
        else:
            node, emitted, valid = walk(rows, tree, sampling, key, tables, RULE, AHEAD, ENTRIES, TILES)

        depth = depth_of(tree, node)
        index = tl.arange(0, BLOCK)
        tl.store(out_tokens_ptr + first + index, tl.full([BLOCK], -1, tl.int64), mask=index < nodes)
        tl.store(out_nodes_ptr + first + index, tl.full([BLOCK], -1, tl.int32), mask=index < nodes)
        if out_logprobs_ptr is not None:
            nan = tl.full([BLOCK], float("nan"), tl.float32)
            tl.store(out_logprobs_ptr + first + index, nan, mask=index < nodes)
            tl.store(out_raw_logprobs_ptr + first + index, nan, mask=index < nodes)
        tl.debug_barrier()  # the path overwrites some of it
        tl.store(out_accepted_ptr + b, depth.to(tl.int32))
        tl.store(out_valid_ptr + b, valid)
        token = emitted
        place = first + depth
        while place >= first:
            tl.store(out_tokens_ptr + place, token)
            tl.store(out_nodes_ptr + place, node.to(tl.int32))
            if out_logprobs_ptr is not None:
                score = token_logprob(rows, node, token, sampling, key, tables, ENTRIES, TILES)
                raw_score = raw_logprob(plain, node, token, key, tables, ENTRIES, TILES)
                tl.store(out_logprobs_ptr + place, score)
                tl.store(out_raw_logprobs_ptr + place, raw_score)
            token = tl.load(tokens + node)
            node = tl.maximum(tl.load(parents + node), 0)
            place -= 1


def verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    draft_temperatures: Tensor | None,
    draft_temperature: float,
    seed: Tensor,
    position: Tensor,
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
    replacement: bool,
    logprobs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, nodes = parents.shape
    vocab = target_logits.shape[-1]

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return target_logits.new_empty(shape, dtype=dtype)

    tokens, path = empty(torch.int64, batch, nodes), empty(torch.int32, batch, nodes)
    accepted, valid = empty(torch.int32, batch), empty(torch.bool, batch)
    scores, raw_scores = (empty(torch.float32, *((batch, nodes) if logprobs else (0,))) for _ in range(2))
    if batch:
        config = config_for(target_logits, large=True)
        walks = rule in (TreeRule.WALK, TreeRule.COUPLED)
        # A kernel wants pointers of one type, used or not.
        memory = empty(torch.float64, 0 if walks else batch * nodes * MEMORY.value)
        ahead = measures_ahead(rule == TreeRule.TRAVERSAL, batch, nodes, target_logits.device)
        slices = slices_of(batch * nodes, config, target_logits.device) if ahead else 1
        tables = empty(torch.float32, batch * nodes * 4 if ahead else batch * 2, config.entries)
        if walks:
            draft_logits = draft_stats = draft_temperatures = None
        draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
        verify_tree_kernel[(batch * nodes * slices if ahead else batch,)](
            target_logits, draft_tokens, parents, draft_logits, draft_stats, draft_temperatures,
            draft_temperature, seed, position, sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids,
            edit_counts, edit_bias, penalties, 0 if edit_ids is None else edit_ids.shape[1], tables, memory,
            counters_at_rest(batch, target_logits.device) if ahead else accepted, tokens, path, accepted, valid,
            scores if logprobs else None, raw_scores if logprobs else None, *target_logits.stride()[:2],
            *draft_strides, nodes, vocab, int(replacement), batch, slices, RULE=rule, AHEAD=ahead,
            BLOCK=triton.next_power_of_2(nodes), **config.constants, **config.options,
        )  # fmt: skip
    return tokens, path, accepted, valid, scores, raw_scores
