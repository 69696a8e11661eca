"""Two drafters: one that is sure of itself when it speaks, and one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec_kernels.decode.drafters.group import SessionGroup, common_layers
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft, counted, require_chain
from specdec_kernels.decode.protocols import Drafter, DrafterSession, traits_of
from specdec_kernels.ops import sample
from specdec_kernels.tensors import longer, to_device


class FallbackDrafter:
    """Drafts of ``first`` (point masses, such as n-grams) where it has any, else those of ``second``.

    Which of the two drafted depends on the history alone, so the distribution stays exact. A chain of ``first`` in a
    batch with trees of ``second`` is tested as they are, which gives what the chain alone gives, bit for bit. Where
    ``second`` drafts trees of point masses whatever the temperature (:class:`Traits`), chains of
    ``first`` are passed on as trees, whoever else is in the batch: a point mass that is walked meets other noise than
    one tested.

    Raises:
        ValueError: both read the target's features, of different layers.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.first, self.second = first, second
        self.vocab_size, self.siblings, self.walked = traits_of(second)
        self.feature_layers = common_layers([first, second])

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> FallbackSession:
        return FallbackSession(self.first.begin(prompts, features), self.second.begin(prompts, features), self.walked)


class FallbackSession(SessionGroup):
    """One stream of a :class:`FallbackDrafter`."""

    def __init__(self, first: DrafterSession, second: DrafterSession, walked: bool) -> None:
        super().__init__([first, second])
        self._first, self._second, self._walked = first, second, walked

    def propose(self, step: Step) -> Draft | TreeDraft:
        sure = require_chain(self._first.propose(step), "first", "chains of point masses")
        sure_counts = counted(sure)
        if all(sure_counts):
            return TreeDraft.of(sure) if self._walked else sure
        left = [0 if sure_of else count for sure_of, count in zip(sure_counts, step.num_draft, strict=True)]
        rest = self._second.propose(replace(step, num_draft=left))
        if not any(sure_counts):
            return rest
        sure = sure.to(rest.tokens.device)
        has_draft = to_device([count > 0 for count in sure_counts], torch.bool, rest.tokens.device)
        if isinstance(rest, TreeDraft):
            return _merged_trees(TreeDraft.of(sure), rest, has_draft)
        counts = None if rest.counts is None else [a or b for a, b in zip(sure_counts, rest.counts, strict=True)]
        chain = replace(_merged(sure, rest, has_draft), counts=counts)
        return TreeDraft.of(chain) if self._walked else chain  # also where the others want no drafts


def _merged_trees(sure: TreeDraft, rest: TreeDraft, has_draft: Tensor) -> TreeDraft:
    """One tree a request; among drafts that were drawn, a point mass has scale inf."""
    nodes = max(sure.tokens.shape[1], rest.tokens.shape[1])
    pairs = ((sure.tokens, rest.tokens), (sure.parents, rest.parents))
    tokens, parents = (torch.where(has_draft[:, None], longer(a, nodes, -1), longer(b, nodes, -1)) for a, b in pairs)
    tokens = tokens.clamp(min=0)
    if rest.logits is None:
        return TreeDraft(tokens, parents)
    stats = _marked(longer(_stats(rest), nodes, 0.0), has_draft)
    rows = longer(rest.logits, nodes, 0.0)
    return TreeDraft(tokens, parents, rows, stats, siblings=rest.siblings, vocabulary=rest.vocabulary)


def _merged(sure: Draft, rest: Draft, has_draft: Tensor) -> Draft:
    """One draft of both: among drafts that were drawn, a point mass has scale inf."""
    length = max(sure.tokens.shape[1], rest.tokens.shape[1])
    tokens = torch.where(has_draft[:, None], longer(sure.tokens, length, -1), longer(rest.tokens, length, -1))
    if rest.logits is None:
        return Draft(tokens)
    stats = _marked(longer(_stats(rest), length, 0.0), has_draft)
    return Draft(tokens, longer(rest.logits, length, 0.0), stats, vocabulary=rest.vocabulary)


def _stats(draft: Draft | TreeDraft) -> Tensor:
    """The scalars of what drafts with logits were drawn from: [B, K or N, 3]."""
    if draft.stats is not None:
        return draft.stats
    if draft.logits is None or draft.temperature is None:
        raise ValueError("second must propose stats or a temperature with its logits, got neither")
    batch, drafts = draft.logits.shape[:2]
    temperature = draft.temperature
    each = temperature.repeat_interleave(drafts) if isinstance(temperature, Tensor) else temperature
    nothing = torch.zeros(batch * drafts, dtype=torch.int64, device=draft.logits.device)
    # What a sample says of the distribution that it drew from; its token is of no interest.
    drawn = sample(draft.logits.flatten(0, 1), seed=nothing, position=nothing, temperature=each)
    stats: Tensor = drawn.stats.unflatten(0, (batch, drafts))
    return stats


def _marked(stats: Tensor, certain: Tensor) -> Tensor:
    """Scalars of distributions, those of these requests point masses."""
    point_mass = to_device([torch.inf, -torch.inf, 0.0], torch.float32, stats.device)
    return torch.where(certain[:, None, None], point_mass, stats)
