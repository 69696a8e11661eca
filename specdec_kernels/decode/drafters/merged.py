"""Chains of two drafters in one tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from specdec_kernels.decode.drafters.group import SessionGroup, common_layers
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft, counted, require_chain
from specdec_kernels.decode.protocols import Drafter, DrafterSession
from specdec_kernels.tensors import padded


class MergedDrafter:
    """Drafts of ``first`` (n-grams, say) and of ``second`` (a model) in one tree: where they begin alike they share
    their nodes, where they part the target says which was right.

    The tree is filled level by level, so that each drafter has its likeliest drafts in it; ``second`` is asked for what
    ``first`` leaves of ``num_draft``, and for half of it at least. Drafts are point masses, and the tree is walked:
    ``second`` drafts its likeliest tokens at any temperature, or under the rule "coupled" what it draws in the target's
    own race.

    Args:
        first, second: what drafts chains.

    Raises:
        ValueError: both read the target's features, of different layers.
    """

    #: See :class:`FallbackDrafter`.
    walked = True

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.first, self.second = first, second
        self.feature_layers = common_layers([first, second])

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> MergedSession:
        return MergedSession(self.first.begin(prompts, features), self.second.begin(prompts, features))


class MergedSession(SessionGroup):
    """One stream of a :class:`MergedDrafter`."""

    def __init__(self, first: DrafterSession, second: DrafterSession) -> None:
        super().__init__([first, second])
        self._first, self._second = first, second

    def propose(self, step: Step) -> Draft | TreeDraft:
        most, likeliest = step.num_draft, replace(step, length=None)
        if not step.coupled:
            likeliest = replace(likeliest, temperature=0.0, greedy=True)
        first = _chains("first", self._first.propose(likeliest))
        left = [count - min(len(chain), count // 2) for chain, count in zip(first, most, strict=True)]
        second = _chains("second", self._second.propose(replace(likeliest, num_draft=left)))
        trees = [merged(pair, count) for *pair, count in zip(first, second, most, strict=True)]
        if all(len(tokens) == 1 for tokens, _ in trees):
            return Draft.nothing(len(trees))
        return TreeDraft(padded([tokens for tokens, _ in trees], 0), padded([parents for _, parents in trees], -1))


def _chains(name: str, draft: Draft | TreeDraft) -> list[list[int]]:
    chain = require_chain(draft, name)
    return [tokens[:count] for tokens, count in zip(chain.tokens.tolist(), counted(chain), strict=True)]


def merged(chains: Sequence[Sequence[int]], most: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of a tree of chains, the root first: level by level, up to so many nodes beside it."""
    tokens, parents = [0], [-1]
    nodes: dict[tuple[int, int], int] = {}  # by parent and token
    ends = [0] * len(chains)
    for depth in range(max(map(len, chains), default=0)):
        for index, chain in enumerate(chains):
            if depth >= len(chain):
                continue
            key = ends[index], chain[depth]
            if key not in nodes:
                if len(tokens) > most:
                    return tokens, parents
                nodes[key] = len(tokens)
                tokens.append(chain[depth])
                parents.append(ends[index])
            ends[index] = nodes[key]
    return tokens, parents
