"""``verify_chain`` and ``verify_tree``: one launch; a chain is a tree with one branch. Semantics:
:mod:`specdec_kernels.ops` and :mod:`specdec_kernels.ops.tree_rules`.

Several programs measure a row, each its slice of the tiles. The last of them to finish judges the row, and whoever
completes the path decides: rows come after those they follow, so where programs begin in that order, those of rows that
the path is known to pass by find that out and read nothing.

Rules block, recursive and traversal read every row, and ask for the masses of residuals: block for all of them at a
time, the others for one after the other. Whoever judges the last row goes on until a mass is wanted, programs that
begin later sum it together, and the last of them goes on.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Rule, TreeRule, numbers_of
from specdec_kernels.triton_kernels.arguments import (
    BITMASK,
    COUNT_INDEPENDENT,
    CU_ROWS,
    LOGPROBS,
    NUM_DRAFT,
    SAMPLING,
    flags_of,
    instead,
    processing_arguments,
)
from specdec_kernels.triton_kernels.arrivals import ENDED, arrive, follow, load_relaxed, passed_by, ticket, wait, zero
from specdec_kernels.triton_kernels.chain import (
    chain_is_valid,
    end_chain,
    find_path_probs,
    judge_draft,
    kept_by_block_rule,
    load_divided,
    wants_mass,
)
from specdec_kernels.triton_kernels.distribution import sampling_of, table_scale
from specdec_kernels.triton_kernels.launch import (
    PROGRAMS_A_PROCESSOR,
    config_for,
    empty,
    launch,
    scratch,
    scratch_in,
    slices_of,
)
from specdec_kernels.triton_kernels.masks import live_count
from specdec_kernels.triton_kernels.request import (
    DRAWN,
    LAST,
    NEXT,
    STATE,
    WINDOW,
    Drafts,
    depth_of,
    draft_scale_of,
    is_valid,
    logprobs_of,
    measure_draft,
    next_child,
)
from specdec_kernels.triton_kernels.residual import measure_residual, measured_mass
from specdec_kernels.triton_kernels.rows import (
    DRAFTS,
    NUMBERS,
    Key,
    Reduced,
    Rows,
    Tree,
    measure,
    parent_of,
    processing_of,
    token_of,
)
from specdec_kernels.triton_kernels.trees import (
    end_tree,
    has_to_sum,
    init_node,
    judge_node,
    load_residual,
    measure_left,
    store_left,
    update_residual,
    visit,
)
from specdec_kernels.workspace import power_of_two

#: What the kernel is compiled for, by the numbers that the operators take.
CHAIN_RULES, TREE_RULES = tuple(numbers_of(Rule)), tuple(numbers_of(TreeRule))


@triton.jit
def count_drafts(tokens, stride, most, vocab):
    """How many of ``most`` drafts there are: -1, or an id that is none, ends them."""
    drafted = tl.full([], 0, tl.int32)
    going = most > 0
    while going:
        token = tl.load(tokens + drafted * stride).to(tl.int64)
        going = (token >= 0) & (token < vocab)
        drafted += going.to(tl.int32)
        going = going & (drafted < most)
    return drafted


@triton.jit
def is_needed(frontier, tree, row, every):
    """Whether ``every`` row is, or the path may come through this one."""
    needed = every
    if every == 0:
        needed = passed_by(frontier, tree, row) == 0
    return needed


@triton.jit(
    do_not_specialize=[
        "top_k", "adjustments", "draft_width", "token_request_stride", "nodes", "batch", "slices", "passes", "parts",
        "flags",
    ]
)  # fmt: skip # 1 would become a constant, of another type
def verify_kernel(
    target_ptr, tokens_ptr, parents_ptr, draft_ptr, draft_stats_ptr, target_to_draft_ptr, draft_temperatures_ptr,
    draft_temperature, seed_ptr, position_ptr, num_draft_ptr, cu_rows_ptr, sampling_ptr, temperature, top_k, top_p,
    min_p, bitmask_ptr, adjusted_ids_ptr, id_counts_ptr, id_bias_ptr, penalties_ptr, adjustments, tables_ptr,
    states_ptr, counters_ptr, out_tokens_ptr, out_nodes_ptr, out_accepted_ptr, out_valid_ptr, out_counters_ptr,
    out_logprobs_ptr, out_raw_logprobs_ptr, target_request_stride, target_row_stride, draft_request_stride,
    draft_row_stride, draft_width, token_request_stride, token_row_stride, nodes, vocab, batch, slices, passes, parts,
    flags, RULE: tl.constexpr, IS_TREE: tl.constexpr, PROCESSED: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    BY_DRAW: tl.constexpr = (RULE == "walk") | (RULE == "coupled")
    BY_MASS: tl.constexpr = (RULE == "block") | (RULE == "recursive") | (RULE == "traversal")
    b = (tl.program_id(0) % batch).to(tl.int64)
    # The counters of a request, all 0 between launches: of each row the programs that have finished it (see `follow`);
    # how many rows are done, then how many of the later programs; how far the path is known, or how many masses were
    # wanted; how many programs have begun.
    arrived = counters_ptr + b * (nodes + 3)
    done = arrived + nodes
    frontier = done + 1
    own = tl.program_id(0) // batch
    if BY_MASS:
        own = ticket(frontier + 1, nodes * slices + passes * parts)

    key = Key(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    sampling = sampling_of(sampling_ptr, flags & SAMPLING != 0, temperature, top_k, top_p, min_p, b)
    first = b * nodes
    first_row = first
    logits = target_ptr + b * target_request_stride
    parents = None
    tokens = tokens_ptr + b * token_request_stride
    if IS_TREE:
        parents = parents_ptr + first
        live = tl.minimum(live_count(parents, nodes, BLOCK), nodes).to(tl.int64)
        drafted_rows = nodes
    else:
        drafted_rows = nodes - 1
        most = drafted_rows
        if flags & CU_ROWS != 0:
            first_row = tl.load(cu_rows_ptr + b)
            logits = target_ptr + first_row * target_row_stride
            most = tl.minimum(most, (tl.load(cu_rows_ptr + b + 1) - first_row).to(tl.int32) - 1)
        if flags & NUM_DRAFT != 0:
            most = tl.minimum(tl.load(num_draft_ptr + b).to(tl.int32), most)
        live = count_drafts(tokens, token_row_stride, most, vocab).to(tl.int64) + 1
        tokens -= token_row_stride
    # The root's row is always evaluated, even where the parents describe no valid tree, so that every request gets a
    # token.
    there = tl.maximum(live, 1)
    tree = Tree(parents, tokens, token_row_stride, live, vocab)
    processing = None
    if PROCESSED:
        processing = processing_of(
            bitmask_ptr, flags & BITMASK != 0, adjusted_ids_ptr, id_counts_ptr, id_bias_ptr, penalties_ptr, adjustments,
            first_row, b, vocab,
        )  # fmt: skip
    rows = Rows(logits, target_row_stride, vocab, tree, processing, None)
    plain = Rows(logits, target_row_stride, vocab, None, None, None)
    draft_logits = draft_ptr + b * draft_request_stride
    draft_rows = Rows(draft_logits, draft_row_stride, vocab, None, None, None)
    reduced_rows = Rows(draft_logits, draft_row_stride, vocab, None, None, Reduced(target_to_draft_ptr, draft_width))
    draft_scale = draft_scale_of(draft_temperatures_ptr, flags, draft_temperature, b)
    drafts = Drafts(draft_rows, reduced_rows, draft_stats_ptr + 3 * b * drafted_rows, draft_scale, flags)
    # Behind the states of the nodes of a tree, the one that is visited, and whether all rows that were are valid.
    states = states_ptr + (first + b if IS_TREE else first) * STATE
    visited = states + nodes * STATE
    tables = tables_ptr + first * NUMBERS * ENTRIES

    end = tl.full([], -1, tl.int64)
    drawn = tl.full([], -1, tl.int64)
    resumed = tl.full([], 0, tl.int1)
    every = BY_MASS | (flags & COUNT_INDEPENDENT != 0)
    i = (own // slices).to(tl.int64)
    if i < there:
        part = own % slices
        race = None
        if RULE == "coupled":
            race = Key(key.seed, key.position + (depth_of(tree, i) if IS_TREE else i))
        table = tables + i * NUMBERS * ENTRIES
        if is_needed(frontier, tree, i, every):
            measure(rows, i, table_scale(sampling[0]), race, part, slices, table, ENTRIES, TILES)
            if not BY_DRAW:
                some = next_child(tree, i, i, None) < live if IS_TREE else i + 1 < live
                if some & (sampling[0] < float("inf")):
                    measure_draft(drafts, i, part, slices, table + DRAFTS * ENTRIES, ENTRIES, TILES)
        if arrive(arrived + i, slices - 1):
            # Where a program of this row read nothing, what it saw of the path can be seen here.
            if is_needed(frontier, tree, i, every):
                if BY_DRAW:
                    judge_node(rows, tree, i, sampling, key, race, table, states, ENTRIES, TILES)
                elif IS_TREE:
                    init_node(rows, drafts, tree, i, sampling, key, table, states, ENTRIES, TILES)
                else:
                    judge_draft(rows, drafts, tree, i, sampling, key, table, states, ENTRIES, TILES)
                if not BY_MASS:
                    end = follow(arrived, frontier, states, i)
            if arrive(done, (there - 1).to(tl.int32)):
                if not BY_MASS:
                    if not IS_TREE:
                        independent = tl.full([], 0, tl.int32)
                        for row in range(0, live - 1):
                            independent += (tl.load(states + row * STATE + NEXT) >= 0).to(tl.int32)
                        independent = tl.where(flags & COUNT_INDEPENDENT != 0, independent, -1)
                        tl.store(out_counters_ptr + 2 * b + 1, independent)
                    zero(arrived, nodes + 2)
                elif IS_TREE:
                    tl.store(visited, tl.full([], 0.0, tl.float64))
                    tl.store(visited + 1, tl.where(tl.load(states + LAST) < ENDED, 1.0, 0.0).to(tl.float64))
                    tl.debug_barrier()
                else:
                    find_path_probs(live - 1, states)
                resumed = tl.full([], BY_MASS, tl.int1)
    if BY_MASS:
        later = own - nodes * slices
        if later >= 0:
            part = later % parts
            if IS_TREE:
                wait(frontier, later // parts + 1)
                if load_relaxed(frontier) < ENDED:
                    node = tl.load(visited).to(tl.int64)
                    state = states + node * STATE
                    target, divided, rejected = load_residual(tree, node, states)
                    sums = tables + (NUMBERS * node + DRAFTS) * ENTRIES
                    measure_residual(rows, drafts, node, target, divided, rejected, part, parts, sums, ENTRIES, TILES)
                    left = has_to_sum(drafts, divided, state)
                    if left:
                        measure_left(drafts, node, rejected, part, parts, sums + ENTRIES, TILES)
                    resumed = arrive(arrived, parts - 1)
                    if resumed:
                        if left:
                            store_left(state, measured_mass(rows, sums + ENTRIES, ENTRIES))
                        update_residual(state, measured_mass(rows, sums, ENTRIES))
            else:
                wait(frontier, 1)
                row = (later // parts).to(tl.int64)
                if wants_mass(row, states):
                    target, divided = load_divided(states + row * STATE)
                    sums = tables + (NUMBERS * row + DRAFTS) * ENTRIES
                    measure_residual(rows, drafts, row, target, divided, None, part, parts, sums, ENTRIES, TILES)
        if resumed:
            wanted = tl.full([], 1, tl.int32)
            if IS_TREE:
                if visit(rows, drafts, tree, key, states, visited, RULE == "recursive"):
                    wanted = tl.full([], ENDED, tl.int32)
                    end = tl.load(visited).to(tl.int64)
            tl.atomic_add(frontier, wanted, sem="release")
        if later >= 0:
            if arrive(done, passes * parts - 1):
                tl.store(frontier, 0)
                if not IS_TREE:
                    end = kept_by_block_rule(rows, key, tables, states, ENTRIES)
                    tl.store(out_counters_ptr + 2 * b + 1, -1)

    if end >= 0:
        depth = depth_of(tree, end) if IS_TREE else end
        tl.store(out_accepted_ptr + b, depth.to(tl.int32))
        if BY_DRAW:
            valid = is_valid(states + end * STATE)
        elif IS_TREE:
            valid = tl.load(visited + 1) != 0
        else:
            valid = chain_is_valid(tree, end, states, RULE == "block")
        tl.store(out_valid_ptr + b, valid)
        if not IS_TREE:
            tl.store(out_counters_ptr + 2 * b, (live - 1).to(tl.int32))
        for start in range(depth + 1, nodes, WINDOW):
            index = start + tl.arange(0, WINDOW)
            behind = index < nodes
            tl.store(out_tokens_ptr + first + index, tl.full([WINDOW], -1, tl.int64), mask=behind)
            if IS_TREE:
                tl.store(out_nodes_ptr + first + index, tl.full([WINDOW], -1, tl.int32), mask=behind)
            if flags & LOGPROBS != 0:
                nan = tl.full([WINDOW], float("nan"), tl.float32)
                tl.store(out_logprobs_ptr + first + index, nan, mask=behind)
                tl.store(out_raw_logprobs_ptr + first + index, nan, mask=behind)
        if BY_DRAW:
            drawn = tl.load(states + end * STATE + DRAWN).to(tl.int64)
        elif IS_TREE:
            drawn = end_tree(rows, drafts, tree, end, key, tables, states, ENTRIES)
        else:
            drawn = end_chain(rows, drafts, end, key, tables, states, RULE == "block", ENTRIES)
        node, token = end, drawn
        slot = first + depth
        while slot >= first:
            tl.store(out_tokens_ptr + slot, token)
            if IS_TREE:
                tl.store(out_nodes_ptr + slot, node.to(tl.int32))
            if flags & LOGPROBS != 0:
                table = tables + node * NUMBERS * ENTRIES
                score, raw_score = logprobs_of(
                    rows, plain, node, token, key, table, states + node * STATE, ENTRIES, TILES
                )
                tl.store(out_logprobs_ptr + slot, score)
                tl.store(out_raw_logprobs_ptr + slot, raw_score)
            if slot > first:
                token = token_of(tree, node)
                node = parent_of(tree, node)
            slot -= 1


def launch_verify(
    rule: str, target_logits: Tensor, draft_tokens: Tensor, parents: Tensor | None, draft_logits: Tensor | None,
    draft_stats: Tensor | None, target_to_draft: Tensor | None, draft_temperatures: Tensor | None,
    draft_temperature: float, seed: Tensor, position: Tensor, num_draft: Tensor | None, cu_rows: Tensor | None,
    sampling: Tensor | None, temperature: float, top_k: int, top_p: float, min_p: float, bitmask: Tensor | None,
    adjusted_ids: Tensor | None, id_counts: Tensor | None, id_bias: Tensor | None, penalties: Tensor | None,
    logprobs: bool, independent: bool, replacement: bool, workspace: Tensor | None, nodes: int, tokens: Tensor,
    path: Tensor, accepted: Tensor, valid: Tensor, counters: Tensor, scores: Tensor, raw_scores: Tensor,
) -> None:  # fmt: skip
    """Of trees with ``parents``, else of chains, of so many ``nodes``; what follows is written."""
    batch, vocab, device = draft_tokens.shape[0], target_logits.shape[-1], target_logits.device
    if not batch:
        return
    is_tree = parents is not None
    config = config_for(vocab, device, bitmask, adjusted_ids, large=is_tree, race=rule == "coupled")
    sizes = batch * (nodes + 3), batch * (nodes + is_tree) * STATE.value, batch * nodes * NUMBERS.value * config.entries
    zeroed_counters, states, tables = scratch(device, *sizes) if workspace is None else scratch_in(workspace, *sizes)
    slices = slices_of(batch * nodes, config, device)
    passes, parts = 0, 1
    if rule == "block":
        passes, parts = nodes, slices
    elif rule in ("recursive", "traversal"):
        # A pass a rejected child, by as many programs as there are multiprocessors for each request, and no more, since
        # most will find nothing left to do.
        passes, parts = max(1, nodes - 1), min(64, slices_of(PROGRAMS_A_PROCESSOR * batch, config, device))
    if rule in ("walk", "coupled"):
        draft_logits = draft_stats = target_to_draft = draft_temperatures = None
    flags = flags_of(
        sampling=sampling, bitmask=bitmask, draft_logits=draft_logits, draft_stats=draft_stats,
        draft_temperatures=draft_temperatures, num_draft=num_draft, cu_rows=cu_rows, logprobs=logprobs,
        count_independent=independent, replacement=replacement, reduced=target_to_draft,
    )  # fmt: skip
    drafted = (0, 0, vocab) if draft_logits is None else (*draft_logits.stride()[:2], draft_logits.shape[2])
    target_strides = target_logits.stride()[:2] if cu_rows is None else (0, target_logits.stride(0))
    launch(
        verify_kernel, batch * (nodes * slices + passes * parts), target_logits, draft_tokens, instead(parents, seed),
        instead(draft_logits, target_logits), instead(draft_stats, tables), instead(target_to_draft, zeroed_counters),
        instead(draft_temperatures, tables), draft_temperature, seed, position, instead(num_draft, seed),
        instead(cu_rows, seed), instead(sampling, tables), temperature, top_k, top_p, min_p,
        *processing_arguments(bitmask, adjusted_ids, id_counts, id_bias, penalties, zeroed_counters, tables), tables,
        states, zeroed_counters, tokens, path, accepted, valid, counters, scores if logprobs else tables,
        raw_scores if logprobs else tables, *target_strides, *drafted, *draft_tokens.stride(), nodes, vocab, batch,
        slices, passes, parts, flags, RULE=rule, IS_TREE=is_tree,
        PROCESSED=bitmask is not None or adjusted_ids is not None, BLOCK=power_of_two(nodes) if is_tree else 1,
        **config.named,
    )  # fmt: skip


def verify_chain(
    target_logits: Tensor, draft_tokens: Tensor, *arguments: Any, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """The last arguments: rule, whether log-probabilities and independent acceptance are requested, and a workspace;
    those before are of ``launch_verify``, from ``draft_logits`` on."""
    *of_requests, rule, logprobs, independent, workspace = arguments
    batch, rows = draft_tokens.shape[0], draft_tokens.shape[1] + 1
    if out is None:
        score = torch.float32, (batch, rows) if logprobs else (0,)
        counts = (torch.int32, (batch,)), (torch.bool, (batch,)), (torch.int32, (batch, 2))
        out = empty(target_logits, (torch.int64, (batch, rows)), *counts, score, score)
    tokens, accepted, *others = out
    launch_verify(
        CHAIN_RULES[rule], target_logits, draft_tokens, None, *of_requests, logprobs, independent, False, workspace,
        rows, tokens, accepted, accepted, *others,
    )  # fmt: skip
    return out


def verify_tree(
    target_logits: Tensor, draft_tokens: Tensor, parents: Tensor, *arguments: Any,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The last arguments: rule, whether siblings were drawn with replacement, and whether log-probabilities are asked
    for; those before are of ``launch_verify``, from ``draft_logits`` on."""
    rule, replacement, logprobs = arguments[-3:]
    batch, nodes = parents.shape
    if out is None:
        score = torch.float32, (batch, nodes) if logprobs else (0,)
        paths = (torch.int64, (batch, nodes)), (torch.int32, (batch, nodes))
        out = empty(target_logits, *paths, (torch.int32, (batch,)), (torch.bool, (batch,)), score, score)
    tokens, path, accepted, valid, *scores = out
    launch_verify(
        TREE_RULES[rule], target_logits, draft_tokens, parents, *arguments[:7], None, None, *arguments[7:-3],
        logprobs, False, replacement, None, nodes, tokens, path, accepted, valid, accepted, *scores,
    )  # fmt: skip
    return out
