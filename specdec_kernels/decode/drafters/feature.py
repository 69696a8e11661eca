"""A drafter that reads the target's hidden states (EAGLE, arXiv:2401.15077)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.drafters.autoregressive import AutoregressiveDrafter, Drafting
from specdec_kernels.decode.drafters.eight_bits import EightBitLinear, EightBitModel
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.drafters.texts import Texts, placed_followers
from specdec_kernels.decode.protocols import Step


class FeatureDrafter(AutoregressiveDrafter):
    """A trained :class:`FeatureModel` with the embeddings and the head of its target.

    Args:
        model: trained for exactly this target.
        target: the target's transformers model.
        drafting: when to stop, how boldly to draw.
        eight_bits: draft with weights of eight bits, by C++ for CPUs, which takes a third of the time.

    Raises:
        ValueError: ``eight_bits`` where that cannot run.
        RuntimeError: the model favours repetitions, and the native module was not built for this Python.
    """

    def __init__(
        self, model: FeatureModel, target: Any, drafting: Drafting = Drafting(), eight_bits: bool = False
    ) -> None:
        super().__init__(model.config, target.device, target.config.vocab_size, drafting)
        self.shortlist, self.feature_layers = model.shortlist, model.layers
        self._embed = target.get_input_embeddings()
        head = target.get_output_embeddings().weight.detach()[model.shortlist]
        self.model: Callable[..., Tensor] = EightBitModel(model) if eight_bits else model
        self._head: Callable[[Tensor], Tensor] = (
            EightBitLinear(head) if eight_bits else partial(functional.linear, weight=head)
        )
        self._recall = model.recall
        self._places = model.places()
        self._texts = Texts("FeatureDrafter") if bool(model.repeats.any()) else None

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        super().begin(prompts, features)
        if self._texts is not None:
            self._texts.begin(prompts)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        super().commit(tokens, features)
        if self._texts is not None:
            self._texts.extend(tokens)

    def select(self, requests: Tensor) -> None:
        super().select(requests)
        if self._texts is not None:
            self._texts.select(requests)

    def recalled(self, logits: Tensor, paths: Sequence[Tensor]) -> Tensor:
        if self._texts is None:
            return logits
        ahead: list[list[int]] = torch.stack(list(paths), 1).tolist() if paths else [[]] * len(logits)
        rows = len(ahead) // len(self._texts.indices)
        found = [
            (row, place, length)
            for row, path in enumerate(ahead)
            for place, length in placed_followers(self._texts.indices[row // rows], path, self._places)
        ]
        return self._recall(logits, *torch.tensor(found, device=logits.device).unbind(1)) if found else logits

    def _read_prompt(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        # The feature at each token is read together with the token after it.
        self._pending = [list(prompt[1:]) for prompt in prompts]
        if features is not None:
            self._pending_features = [features[slot, : len(prompt) - 1] for slot, prompt in enumerate(prompts)]

    def wanted(self, step: Step) -> Tensor:
        # A prompt of one token has no feature before it: its first step goes without drafts.
        return step.num_draft * torch.tensor([bool(pending) for pending in self._pending])

    def ids(self, index: Tensor) -> Tensor:
        return self.shortlist[index]

    def _scatter(self, rows: Tensor, logits: Tensor) -> None:
        rows.index_copy_(1, self.shortlist, logits)

    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        assert features is not None, "every node has a parent that was read"
        depths = torch.full_like(tokens, depth)
        outputs = self._cache.run_tree(self.model, ancestors, depths, embeddings=self._embed(tokens), features=features)
        return self._head(outputs), outputs

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        if features is None:
            raise ValueError("features must come with the tokens: the target was not asked for them, got None")
        outputs = self._cache.run(
            self.model, counts, tokens.shape[1], embeddings=self._embed(tokens), features=features
        )
        last = outputs[:, -1] if len(counts) == 1 else outputs[torch.arange(len(counts)), counts - 1]
        return self._head(last), last
