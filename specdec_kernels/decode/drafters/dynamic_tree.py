"""A drafter of dynamic trees: the likeliest paths of a model, found best first (EAGLE-2, arXiv:2406.16858)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_kernels.decode.drafters.autoregressive import AutoregressiveDrafter
from specdec_kernels.decode.protocols import Draft, Step, TreeDraft
from specdec_kernels.ops.tree_rules import sample_children


@dataclass(frozen=True)
class Growth:
    """How a tree grows. None of it changes the law of the text, only its speed.

    Raises:
        ValueError: a value out of its range.
    """

    depth: int = 5
    """Levels at most; each costs a pass of the model."""
    width: int = 4
    """Nodes of a level that get children."""
    children: int = 6
    """Children of a node at most."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "children"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class TreeDrafter:
    """Drafts the tree of the likeliest paths that a model's drafter sees.

    Level by level, the ``width`` likeliest nodes get children; the likeliest of all nodes are proposed. Children are the
    tokens with the largest probability, so the tree depends on the text alone and its drafts are point masses: dropping
    some of them withholds nothing that was drawn. Under the rule "coupled" they are the first arrivals of the race that
    the target will hold.

    Args:
        drafter: a drafter with a model of its own, which is read level by level.
        growth: the shape of the trees.
    """

    def __init__(self, drafter: AutoregressiveDrafter, growth: Growth = Growth()) -> None:
        self.drafter, self.growth = drafter, growth
        self.wants_features = drafter.wants_features

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self.drafter.begin(prompts, features)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self.drafter.commit(tokens, features)

    def select(self, requests: Tensor) -> None:
        self.drafter.select(requests)

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft | TreeDraft:
        wanted = int(step.num_draft.max())
        if wanted == 0 or not self.drafter.ready:
            return Draft.nothing(len(step.num_draft))
        logits, features = self.drafter.read_pending()
        batch = len(logits)
        # Level 0 is the root: one node, which is in the cache already.
        beam = _Beam(logits[:, None], None if features is None else features[:, None])
        score = torch.zeros(batch, 1)
        ancestors = torch.empty((batch, 1, 0), dtype=torch.bool)
        levels: list[_Level] = []
        index = torch.zeros((batch, 1), dtype=torch.int64)  # of the beam's nodes among all candidates, the root first
        found = 1
        for depth in range(min(self.growth.depth, wanted)):
            level = self._children(beam, score, index, step, depth, wanted)
            levels.append(level)
            if depth + 1 == min(self.growth.depth, wanted):
                break
            score, chosen = level.scores.topk(min(self.growth.width, level.scores.shape[1]))
            index = found + chosen
            found += level.scores.shape[1]
            slot = level.slot.gather(1, chosen)
            ancestors = _extended(ancestors, slot)
            tokens = level.tokens.gather(1, chosen).clamp(min=0)
            beam = _Beam(*self.drafter.advance_tree(tokens, _at(beam.features, slot), ancestors, depth))
        self.drafter.drop_tree()
        return _best(levels, step.num_draft)

    def _children(
        self, beam: _Beam, score: Tensor, index: Tensor, step: Step, depth: int, wanted: int
    ) -> _Level:
        """The children of a level's nodes, [B, width * children]."""
        batch, width, _ = beam.logits.shape
        count = min(self.growth.children, wanted)
        rows = beam.logits.flatten(0, 1)
        each = {"seed": step.seed, "position": step.position, "temperature": step.temperature}
        race = step.coupled and bool((step.temperature > 0).any())
        if race:  # noise is keyed on token ids
            rows = self.drafter.full_rows(rows)
            each |= {name: getattr(step, name) for name in ("top_k", "top_p", "min_p")}
        else:  # a greedy request ranks paths by the model's own probabilities
            each["temperature"] = torch.where(step.temperature > 0, step.temperature, 1.0)
        spread = {name: None if x is None else x.repeat_interleave(width) for name, x in each.items()}
        drawn = sample_children(
            rows, count, "race" if race else "top", row=depth, backend=self.drafter.drafting.backend, **spread
        )
        tokens = drawn.tokens if race else self.drafter.ids(drawn.tokens.clamp(min=0))
        tokens = tokens.masked_fill(drawn.tokens < 0, -1).reshape(batch, -1)
        scores = (score[..., None] + drawn.logprobs.reshape(batch, width, count)).flatten(1)
        slot = torch.arange(width).repeat_interleave(count).expand(batch, -1)
        scores = scores.masked_fill((tokens < 0) | scores.isnan(), -torch.inf)
        return _Level(tokens, scores, index.gather(1, slot), slot)


@dataclass(frozen=True)
class _Beam:
    """The nodes of a level that get children: [B, width, ...]."""

    logits: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class _Level:
    """Candidates of one level, [B, M]."""

    tokens: Tensor
    scores: Tensor
    """Logarithm of the path's probability."""
    parent: Tensor
    """Index among all candidates, the root being 0."""
    slot: Tensor
    """Index of the parent in the beam."""


def _at(features: Tensor | None, slot: Tensor) -> Tensor | None:
    return None if features is None else features.gather(1, slot[..., None].expand(-1, -1, features.shape[2]))


def _extended(ancestors: Tensor, slot: Tensor) -> Tensor:
    """Which of the tree's rows the next level attends to: what its parents did, and each node itself."""
    batch, width = slot.shape
    inherited = ancestors.gather(1, slot[..., None].expand(-1, -1, ancestors.shape[2]))
    return torch.cat([inherited, torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)], 2)


def _best(levels: Sequence[_Level], wanted: Tensor) -> TreeDraft:
    """The likeliest nodes of all levels as a tree. A node is never likelier than its parent, and comes behind it, so what
    is kept hangs together."""
    tokens, scores, parent = (torch.cat([getattr(x, name) for x in levels], 1) for name in ("tokens", "scores", "parent"))
    batch, candidates = tokens.shape
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(candidates).expand(batch, -1))
    kept = (rank < wanted[:, None]) & scores.isfinite()
    nodes = int(kept.sum(1).max())
    place = kept.long().cumsum(1).masked_fill(~kept, 0)  # node of a candidate; 0 is the root
    node_of = torch.nn.functional.pad(place, (1, 0))
    up = node_of.gather(1, parent)
    out_tokens = torch.zeros((batch, nodes + 1), dtype=torch.int64)
    out_parents = torch.full((batch, nodes + 1), -1, dtype=torch.int64)
    target = torch.where(kept, place, nodes + 1)
    padded = torch.nn.functional.pad
    out_tokens = padded(out_tokens, (0, 1)).scatter(1, target, tokens)[:, :-1]
    out_parents = padded(out_parents, (0, 1)).scatter(1, target, up)[:, :-1]
    return TreeDraft(out_tokens, out_parents)
