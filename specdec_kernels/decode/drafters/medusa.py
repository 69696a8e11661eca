"""A drafter of static trees: heads that each guess one token further ahead (Medusa, arXiv:2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.drafters.medusa_model import MedusaModel
from specdec_kernels.decode.protocols import Draft, Step, TreeDraft


class MedusaDrafter:
    """Drafts the same tree every step, filled with the guesses of a trained :class:`MedusaModel`.

    The guesses depend on the text alone, so they are point masses, and the tree can be walked.

    Args:
        model: trained for exactly this target.
        target: the target's transformers model.
    """

    feature_layers: Sequence[int] = (-1,)
    #: See :class:`FirstOf`.
    walked = True

    def __init__(self, model: MedusaModel, target: Any) -> None:
        self.model = model
        self._embed = target.get_input_embeddings()
        self._head = target.get_output_embeddings().weight.detach()[model.shortlist]
        paths = [[rank for rank in path if rank >= 0] for path in model.paths.tolist()]
        node = {(): 0} | {tuple(path): index for index, path in enumerate(paths, 1)}
        self._parents = torch.tensor([-1, *(node[tuple(path[:-1])] for path in paths)])
        self._guess = torch.tensor([(len(path) - 1, path[-1]) for path in paths]).reshape(-1, 2)

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._last: list[tuple[int, Tensor] | None] = [
            None if features is None or len(prompt) < 2 else (prompt[-1], features[slot, len(prompt) - 2])
            for slot, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft | TreeDraft:
        # A prompt of one token has no feature before it: its first step goes without drafts.
        each = step.num_draft * torch.tensor([last is not None for last in self._last])
        nodes = min(int(each.max()), len(self._guess))
        if nodes == 0:
            return Draft.nothing(len(each))
        some = next(last for last in self._last if last is not None)
        read = [last or some for last in self._last]
        tokens, features = torch.tensor([token for token, _ in read]), torch.stack([feature for _, feature in read])
        guesses = functional.linear(self.model(features, self._embed(tokens)), self._head)
        head, rank = self._guess[:nodes].unbind(1)
        best = self.model.shortlist[guesses.topk(int(rank.max()) + 1).indices]
        drafted = functional.pad(best[:, head, rank], (1, 0))
        parents = self._parents[: nodes + 1].expand(len(each), -1)
        # The list falls in worth, so a request that wants fewer drafts takes the first of them.
        wanted = torch.arange(nodes + 1) <= each[:, None]
        return TreeDraft(drafted, torch.where(wanted, parents, -1))

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        if features is None:
            raise ValueError("features must come with the tokens: the target was not asked for them, got None")
        self._last = [(new[-1], features[slot, len(new) - 1]) for slot, new in enumerate(tokens)]

    def select(self, requests: Tensor) -> None:
        self._last = [self._last[slot] for slot in requests.tolist()]
