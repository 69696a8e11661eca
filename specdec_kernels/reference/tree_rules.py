"""``sample_children`` and ``verify_tree`` in PyTorch. Shapes, dtypes and semantics: :mod:`specdec_kernels.ops`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec_kernels.contract import NOTHING_LEFT, Children, Purpose, TreeRule
from specdec_kernels.reference.distributions import (
    Adjustments,
    Distributions,
    Sampling,
    distributions,
    draft_distributions,
    draft_temperatures_of,
    flat_race,
    largest_finite,
    plain,
    point_mass,
    processed,
    processed_rows,
    rows_of_target,
    scale_of,
    token_logprobs,
    two_level_race,
)
from specdec_kernels.reference.noise import uniforms
from specdec_kernels.reference.trees import attends, live_nodes


def sample_children(
    logits: Tensor,
    target_to_draft: Tensor | None,
    seed: Tensor,
    position: Tensor,
    row: Tensor,
    sampling: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    bitmask: Tensor | None,
    adjusted_ids: Tensor | None,
    id_counts: Tensor | None,
    id_bias: Tensor | None,
    penalties: Tensor | None,
    count: int,
    method: int,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_of_target(logits, target_to_draft)
    logits = processed_rows(logits, Adjustments.of(adjusted_ids, id_counts, id_bias, penalties), bitmask)
    distribution = distributions(logits, Sampling.of(sampling, (temperature, top_k, top_p, min_p), logits))
    greedy = distribution.scale.isinf()
    weights = distribution.probs.nan_to_num(0.0)
    if method == Children.RACE:
        weights = weights.masked_fill(weights < NOTHING_LEFT, 0.0)
    kept = torch.where(greedy[:, None], weights > 0, logits.isfinite() & (logits >= distribution.cutoff[:, None]))
    tokens = torch.full((logits.shape[0], count), -1, dtype=torch.int64, device=logits.device)
    for child in range(count):
        left = kept.any(-1) if method == Children.TOP else weights.sum(-1) >= NOTHING_LEFT
        if method == Children.TOP:
            drawn = logits.masked_fill(~kept, -torch.inf).argmax(-1)
        elif method == Children.RACE:
            drawn = flat_race(weights, seed, position + row)
        else:
            drawn = two_level_race(weights, seed, position, Purpose.DRAFT, row + child)
        tokens[:, child] = torch.where(left, drawn, -1)
        if method != Children.IID:
            weights = weights.scatter(1, drawn[:, None], 0.0)
            kept = kept.scatter(1, drawn[:, None], False)
    score = distribution.scale[:, None] * logits.gather(1, tokens.clamp(min=0)) - distribution.logsumexp[:, None]
    logprobs = torch.where(greedy[:, None], 0.0, score).masked_fill(
        (tokens < 0) | ~distribution.valid[:, None], torch.nan
    )
    unusable = torch.full_like(tokens, -1)
    unusable[:, :1] = largest_finite(logits)[:, None]
    tokens = torch.where(distribution.valid[:, None], tokens, unusable)
    return tokens, logprobs.float(), distribution.stats


class _Trees(NamedTuple):
    """Everything the rules decide by."""

    target: Distributions
    child_distributions: Tensor
    """float64 [B, N, V]: what each node was drawn from, given its earlier siblings."""
    usable: Tensor
    """bool [B, N]: whether the distributions of all children of a node are."""
    tokens: Tensor
    parents: Tensor
    """int64 [B, N]: -1 for what is no node, and for the root."""
    parental: Tensor
    """bool [B, N]: which nodes have children."""
    uniforms: Tensor
    seed: Tensor
    position: Tensor

    @property
    def requests(self) -> Tensor:
        return torch.arange(len(self.tokens), device=self.tokens.device)


class _Decision(NamedTuple):
    """What a rule decides."""

    at: Tensor
    """int64 [B]: the last node that is accepted."""
    emitted: Tensor
    """int64 [B]: what is emitted there, if its row is usable."""
    read_valid: Tensor
    """bool [B]: the rows that were looked at were usable."""


def _child_distributions(
    rows: Tensor | None,
    stats: Tensor | None,
    temperature: Tensor,
    tokens: Tensor,
    parents: Tensor,
    replacement: bool,
    vocab: int,
) -> Tensor:
    """What each node was drawn from, given its earlier siblings; not finite at its token where that is not usable."""
    if rows is None:
        return point_mass(tokens, vocab)
    up = parents.clamp(min=0)[..., None]
    own = None if stats is None else stats.gather(1, up.expand(-1, -1, 3))
    draft_probs = draft_distributions(rows.gather(1, up.expand(-1, -1, vocab)), own, temperature, tokens)
    if replacement:
        return draft_probs
    certain = (scale_of(temperature) if own is None else own[..., 0]).isinf()
    for node in range(2, tokens.shape[1]):
        earlier = parents[:, 1:node] == parents[:, node, None]
        taken = torch.zeros_like(draft_probs[:, node], dtype=torch.int64)
        taken = taken.scatter_add(1, tokens[:, 1:node], earlier.long()) > 0
        left = draft_probs[:, node].masked_fill(taken, 0.0)
        total = left.sum(-1, keepdim=True)
        left = torch.where(total < NOTHING_LEFT, 0.0, left / total)
        draft_probs[:, node] = torch.where((taken.any(-1) & ~certain[:, node])[:, None], left, draft_probs[:, node])
    return draft_probs


def _without(target: Tensor, path_prob: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """``(path_prob * target - draft)+`` normalised, [B, V], and the chance of the node without this child, [B]."""
    weights = (path_prob[:, None] * target - draft).nan_to_num(0.0).clamp(min=0.0)
    total = weights.sum(-1)
    after = torch.where(total == 0, torch.where(path_prob == 1, path_prob, 0.0), total / (total + 1 - path_prob))
    return torch.where(total[:, None] > 0, weights / total[:, None], weights), after


def _walk(trees: _Trees, depth: Tensor, coupled: bool) -> _Decision:
    """What the target draws, as far as it is among the children."""
    weights = trees.target.probs.nan_to_num(0.0)
    draws = []
    for node in range(weights.shape[1]):
        if coupled:
            raced = flat_race(weights[:, node], trees.seed, trees.position + depth[:, node])
            greedy = trees.target.scale[:, node].isinf()
            draws.append(torch.where(greedy, weights[:, node].argmax(-1), raced))
        else:
            row = torch.full_like(trees.seed, node)
            draws.append(two_level_race(weights[:, node], trees.seed, trees.position, Purpose.TARGET, row))
    drawn = torch.stack(draws, 1)
    at = torch.zeros_like(trees.seed)
    for child in range(1, weights.shape[1]):
        here = trees.target.valid[trees.requests, at] & (trees.parents[:, child] == at)
        at = torch.where(here & (drawn[trees.requests, at] == trees.tokens[:, child]), child, at)
    return _Decision(at, drawn[trees.requests, at], torch.ones_like(at, dtype=torch.bool))


def _recursive(trees: _Trees) -> _Decision:
    """Top-down: each child by what its rejected siblings left."""
    probs = trees.target.probs.nan_to_num(0.0)
    at, left = torch.zeros_like(trees.seed), probs[:, 0]
    usable = trees.usable & trees.target.valid
    one = torch.ones_like(trees.seed, dtype=torch.float64)
    for child in range(1, probs.shape[1]):
        here = (trees.parents[:, child] == at) & usable[trees.requests, at]
        index, draft = trees.tokens[:, child, None], trees.child_distributions[:, child]
        accepted = here & (trees.uniforms[:, child] * draft.gather(1, index)[:, 0] < left.gather(1, index)[:, 0])
        rest = torch.where(here[:, None], _without(left, one, draft)[0], left)
        at = torch.where(accepted, child, at)
        left = torch.where(accepted[:, None], probs[:, child], rest)
    return _Decision(at, _emit(trees, at, left), usable[trees.requests, at] | ~trees.parental[trees.requests, at])


def _emit(trees: _Trees, at: Tensor, left: Tensor) -> Tensor:
    """A token of what is left, [B, V], of the target where nothing is."""
    probs = trees.target.probs[trees.requests, at].nan_to_num(0.0)
    residual = (left.sum(-1) > 0) & ~trees.target.scale[:, 0].isinf()
    weights = torch.where(residual[:, None], left, probs)
    return two_level_race(weights, trees.seed, trees.position, Purpose.TARGET, at)


def _traversal(trees: _Trees) -> _Decision:
    """Bottom-up, arXiv:2505.12398. What a node's chance is once its children were rejected depends on the drafts alone,
    so all of them come first; the first node in post-order whose uniform is below it is accepted."""
    nodes = trees.tokens.shape[1]
    left = trees.target.probs.nan_to_num(0.0)
    usable = trees.usable & trees.target.valid
    path_prob = torch.ones_like(trees.uniforms)
    keep = path_prob.clone()
    for child in range(1, nodes):
        up = trees.parents[:, child].clamp(min=0)
        here = (trees.parents[:, child] >= 0) & usable[trees.requests, up] & (path_prob[trees.requests, up] > 0)
        index, draft = trees.tokens[:, child, None], trees.child_distributions[:, child]
        own, chance = left[trees.requests, up], keep[trees.requests, up]
        prob = own.gather(1, index)[:, 0]
        # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
        below = torch.where(prob > 0, (chance * prob / draft.gather(1, index)[:, 0]).clamp(max=1.0), 0.0)
        path_prob[:, child] = keep[:, child] = torch.where(here, below, 0.0)
        rest, after = _without(own, chance, draft)
        left[trees.requests, up] = torch.where(here[:, None], rest, own)
        keep[trees.requests, up] = torch.where(here, after, chance)
    found = torch.where(trees.uniforms < keep, torch.arange(nodes, device=keep.device), -1)
    found[:, 0] = 0
    for child in range(nodes - 1, 0, -1):  # the first sibling comes last, and stays
        up = trees.parents[:, child].clamp(min=0)
        success = (trees.parents[:, child] >= 0) & (found[:, child] >= 0)
        found[trees.requests, up] = torch.where(success, found[:, child], found[trees.requests, up])
    visited = path_prob > 0
    going_on = torch.ones_like(visited)  # no earlier child accepted
    for child in range(1, nodes):
        up = trees.parents[:, child].clamp(min=0)
        visited[:, child] &= visited[trees.requests, up] & going_on[trees.requests, up]
        going_on[trees.requests, up] &= (found[:, child] < 0) | (trees.parents[:, child] < 0)
    read_valid = (~visited | (trees.target.valid & (trees.usable | ~trees.parental))).all(1)
    at = found[:, 0]
    return _Decision(at, _emit(trees, at, left[trees.requests, at]), read_valid)


def verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    target_to_draft: Tensor | None,
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
    adjusted_ids: Tensor | None,
    id_counts: Tensor | None,
    id_bias: Tensor | None,
    penalties: Tensor | None,
    rule: int,
    replacement: bool,
    logprobs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, nodes = draft_tokens.shape
    vocab, device = target_logits.shape[-1], target_logits.device
    parameters = Sampling.of(sampling, (temperature, top_k, top_p, min_p), draft_tokens)
    index = torch.arange(nodes, device=device).expand(batch, nodes)
    inside = (draft_tokens >= 0) & (draft_tokens < vocab)
    live = live_nodes(parents)
    up = torch.where(live & inside & (index > 0), parents, -1)
    tokens = draft_tokens.long().masked_fill(~inside, 0)
    ancestors = attends(parents)
    before = ancestors & (index > 0)[:, None, :]
    depth = before.sum(-1)
    logits = processed(
        target_logits,
        tokens,
        before,
        Adjustments.of(adjusted_ids, id_counts, id_bias, penalties),
        bitmask,
    )
    target = distributions(logits, parameters.repeated(nodes))

    if rule in (TreeRule.WALK, TreeRule.COUPLED):
        draft_logits = draft_stats = None
    if draft_logits is not None:
        draft_logits = rows_of_target(draft_logits, target_to_draft)
    temperatures = draft_temperatures_of(draft_temperatures, draft_temperature, tokens)
    draft_probs = _child_distributions(draft_logits, draft_stats, temperatures, tokens, up, replacement, vocab)
    greedy = parameters.scale.isinf()
    draft_probs = torch.where(greedy[:, None, None], point_mass(tokens, vocab), draft_probs)
    broken = (up >= 0) & ~draft_probs.gather(-1, tokens[..., None])[..., 0].isfinite()
    usable = ~torch.zeros_like(broken).scatter_add(1, up.clamp(min=0), broken)
    parental = torch.zeros_like(broken).scatter_add(1, up.clamp(min=0), up >= 0)
    u = torch.stack([uniforms(seed, position, (index[:, i] - 1).clamp(min=0)) for i in range(nodes)], 1)
    trees = _Trees(target, draft_probs, usable, tokens, up, parental, u, seed, position)

    if rule == TreeRule.RECURSIVE:
        decision = _recursive(trees)
    elif rule == TreeRule.TRAVERSAL:
        decision = _traversal(trees)
    else:
        decision = _walk(trees, depth, rule == TreeRule.COUPLED)
    at, requests = decision.at, trees.requests
    row_valid = target.valid[requests, at]
    emitted = torch.where(row_valid, decision.emitted, largest_finite(logits[requests, at]))

    # Ancestors come before their descendants, so a path is its nodes in ascending order.
    accepted = depth[requests, at]
    path = torch.where(ancestors[requests, at], index, nodes).sort(1).values
    following = tokens.gather(1, torch.nn.functional.pad(path[:, 1:], (0, 1), value=0).clamp(max=nodes - 1))
    out = torch.where(index < accepted[:, None], following, -1)
    out = torch.where(index == accepted[:, None], emitted[:, None], out)
    path = torch.where(path < nodes, path, -1)
    scores, raw_scores = (target_logits.new_empty((0,), dtype=torch.float32) for _ in range(2))  # no aliases
    if logprobs:
        rows = path.clamp(min=0)[..., None].expand(-1, -1, vocab)
        scores, raw_scores = (token_logprobs(x.probs.gather(1, rows), out) for x in (target, plain(target_logits)))
    return out, path.int(), accepted.int(), decision.read_valid & row_valid, scores, raw_scores
