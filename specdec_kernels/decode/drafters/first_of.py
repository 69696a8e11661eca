"""Two drafters: one that is sure of itself when it speaks, and one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.protocols import Draft, Drafter, Step, TreeDraft


class FirstOf:
    """Drafts of ``first`` (point masses, such as a lookup) where it has any, else those of ``second``.

    Which of the two drafted depends on the text alone, so the law stays exact. A chain of ``first`` in a batch with
    trees of ``second`` is tested as they are, which gives what the chain alone gives, bit for bit. Where ``second``
    drafts trees of point masses whatever the temperature (it says so by ``walked = True``), chains of ``first`` are
    handed on as trees, whoever else is in the batch: a point mass that is walked meets other noise than one tested.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.first, self.second = first, second
        self.walked: bool = getattr(second, "walked", False)
        self.siblings: int = getattr(second, "siblings", 0)
        if first.feature_layers and second.feature_layers and first.feature_layers != second.feature_layers:
            raise ValueError(
                f"second must read the layers that first reads, {first.feature_layers}, got {second.feature_layers}"
            )
        self.feature_layers = first.feature_layers or second.feature_layers

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self.first.begin(prompts, features)
        self.second.begin(prompts, features)

    def propose(self, step: Step) -> Draft | TreeDraft:
        sure = self.first.propose(step)
        if isinstance(sure, TreeDraft):
            raise TypeError("first must draft chains of point masses, got a drafter of trees")
        has_draft = (sure.tokens[:, :1] >= 0).any(1)
        if bool(has_draft.all()):
            return TreeDraft.of(sure) if self.walked else sure
        rest = self.second.propose(replace(step, num_draft=step.num_draft.masked_fill(has_draft, 0)))
        if not bool(has_draft.any()):
            return rest
        if isinstance(rest, TreeDraft):
            return _merged_trees(TreeDraft.of(sure), rest, has_draft)
        return _merged(sure, rest, has_draft)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self.first.commit(tokens, features)
        self.second.commit(tokens, features)

    def select(self, requests: Tensor) -> None:
        self.first.select(requests)
        self.second.select(requests)


def _merged_trees(sure: TreeDraft, rest: TreeDraft, has_draft: Tensor) -> TreeDraft:
    """One tree a request; among drafts with a law, a point mass has scale inf."""
    nodes = max(sure.tokens.shape[1], rest.tokens.shape[1])

    def longer(x: Tensor, value: float) -> Tensor:
        return functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, nodes - x.shape[1]), value=value)

    pairs = ((sure.tokens, rest.tokens), (sure.parents, rest.parents))
    tokens, parents = (torch.where(has_draft[:, None], longer(a, -1), longer(b, -1)) for a, b in pairs)
    tokens = tokens.clamp(min=0)
    if rest.logits is None or rest.stats is None:
        return TreeDraft(tokens, parents)
    stats = _marked(longer(rest.stats, 0.0), has_draft)
    return TreeDraft(tokens, parents, longer(rest.logits, 0.0), stats, rest.siblings)


def _marked(stats: Tensor, certain: Tensor) -> Tensor:
    """Scalars of laws, those of these requests point masses."""
    stats[certain] = torch.tensor([torch.inf, -torch.inf, 0.0])
    return stats


def _merged(sure: Draft, rest: Draft, has_draft: Tensor) -> Draft:
    """One draft of both: among drafts with a law, a point mass has scale inf."""
    length = max(sure.tokens.shape[1], rest.tokens.shape[1])

    def longer(x: Tensor, value: float) -> Tensor:
        return functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, length - x.shape[1]), value=value)

    tokens = torch.where(has_draft[:, None], longer(sure.tokens, -1), longer(rest.tokens, -1))
    if rest.logits is None:
        return Draft(tokens)
    stats = rest.stats
    if stats is None:  # drawn from softmax(logits) as they are
        logsumexp = rest.logits.float().logsumexp(-1)
        stats = torch.stack([torch.ones_like(logsumexp), torch.full_like(logsumexp, -torch.inf), logsumexp], -1)
    return Draft(tokens, longer(rest.logits, 0.0), _marked(longer(stats, 0.0), has_draft))
