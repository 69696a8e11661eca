"""A drafter of static trees: heads that each guess one token further ahead (Medusa, arXiv:2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.drafters.medusa_model import MedusaModel
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft
from specdec_kernels.tensors import to_device


class MedusaDrafter:
    """Drafts the same tree every step, filled with the guesses of a trained :class:`MedusaModel`.

    The guesses depend on the history alone, so they are point masses, and the tree can be walked.

    Args:
        model: trained for exactly this target.
        target: the target's transformers model.
    """

    feature_layers: Sequence[int] = (-1,)
    #: See :class:`FallbackDrafter`.
    walked = True

    def __init__(self, model: MedusaModel, target: Any) -> None:
        self.model = model
        self.embed = target.get_input_embeddings()
        self.head = target.get_output_embeddings().weight.detach()[model.shortlist]
        paths = [[rank for rank in path if rank >= 0] for path in model.paths.tolist()]
        node = {(): 0} | {tuple(path): index for index, path in enumerate(paths, 1)}
        self.parents = [-1, *(node[tuple(path[:-1])] for path in paths)]
        #: Of every node but the root, the head that guesses it, and the rank of the guess.
        self.guesses = [(len(path) - 1, path[-1]) for path in paths]

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> MedusaSession:
        return MedusaSession(self, prompts, features)


class MedusaSession:
    """One stream of a :class:`MedusaDrafter`."""

    def __init__(self, drafter: MedusaDrafter, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._drafter, self._device = drafter, drafter.head.device
        # The last token of each history and the target's feature before it; a prompt of one token has none.
        self._last: list[tuple[int, Tensor] | None] = [
            None if features is None or len(prompt) < 2 else (prompt[-1], features[slot, len(prompt) - 2])
            for slot, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft | TreeDraft:
        drafter = self._drafter
        wanted = [0 if last is None else count for last, count in zip(self._last, step.num_draft, strict=True)]
        nodes = min(max(wanted), len(drafter.guesses))
        if nodes == 0:
            return Draft.nothing(len(wanted))
        some = next(last for last in self._last if last is not None)
        read = [last or some for last in self._last]
        tokens = to_device([token for token, _ in read], torch.int64, self._device)
        features = torch.stack([feature for _, feature in read]).to(self._device)
        guesses = functional.linear(drafter.model(features, drafter.embed(tokens)), drafter.head)
        head, rank = to_device(drafter.guesses[:nodes], torch.int64, self._device).unbind(1)
        deepest = max(rank for _, rank in drafter.guesses[:nodes])
        best = drafter.model.shortlist[guesses.topk(deepest + 1).indices]
        drafted = functional.pad(best[:, head, rank], (1, 0))
        # The list falls in worth, so a request that wants fewer drafts takes the first of them.
        parents = [
            [parent if node <= count else -1 for node, parent in enumerate(drafter.parents[: nodes + 1])]
            for count in wanted
        ]
        return TreeDraft(drafted, to_device(parents, torch.int64, self._device))

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        if features is None:
            raise ValueError("features must come with the tokens: the target was not asked for them, got None")
        self._last = [(new[-1], features[slot, len(new) - 1]) for slot, new in enumerate(tokens)]

    def select(self, slots: Sequence[int]) -> None:
        self._last = [self._last[slot] for slot in slots]

    def join(self, other: MedusaSession) -> None:
        self._last = self._last + other._last
