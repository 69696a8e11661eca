"""A drafter that reads the target's hidden states (EAGLE, arXiv:2401.15077)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.drafters.autoregressive import AutoregressiveDrafter, Drafting
from specdec_kernels.decode.drafters.eight_bits import EightBitLinear, in_eight_bits
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.protocols import Step


class FeatureDrafter(AutoregressiveDrafter):
    """A trained :class:`FeatureModel` with the embeddings and the head of its target.

    Args:
        model: trained for exactly this target.
        target: the target's transformers model.
        drafting: when to stop, how boldly to draw.
        eight_bits: draft with weights of eight bits, which takes half the time; bfloat16 on a CPU only.

    Raises:
        ValueError: ``eight_bits`` of a model that cannot have them.
    """

    def __init__(
        self, model: FeatureModel, target: Any, drafting: Drafting = Drafting(), eight_bits: bool = False
    ) -> None:
        super().__init__(model.config, target.device, target.config.vocab_size, drafting)
        self.model, self.feature_layers = model, model.layers
        self._embed = target.get_input_embeddings()
        head = target.get_output_embeddings().weight.detach()[model.shortlist]
        self._head: Callable[[Tensor], Tensor] = partial(functional.linear, weight=head)
        if eight_bits:
            self.model, self._head = in_eight_bits(model), EightBitLinear(head)

    def _read_prompt(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        # The feature at each token is read together with the token after it.
        self._pending = [list(prompt[1:]) for prompt in prompts]
        if features is not None:
            self._pending_features = [features[slot, : len(prompt) - 1] for slot, prompt in enumerate(prompts)]

    def wanted(self, step: Step) -> Tensor:
        # A prompt of one token has no feature before it: its first step goes without drafts.
        return step.num_draft * torch.tensor([bool(pending) for pending in self._pending])

    def ids(self, index: Tensor) -> Tensor:
        return self.model.shortlist[index]

    def _scatter(self, rows: Tensor, logits: Tensor) -> None:
        rows.index_copy_(1, self.model.shortlist, logits)

    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        assert features is not None, "every node has a parent that was read"
        inputs = self.model.inputs(self._embed(tokens), features)
        outputs = self._cache.run_tree(self.model, ancestors, torch.full_like(tokens, depth), inputs_embeds=inputs)
        return self._head(outputs), outputs

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        if features is None:
            raise ValueError("features must come with the tokens: the target was not asked for them, got None")
        inputs = self.model.inputs(self._embed(tokens), features)
        outputs = self._cache.run(self.model, counts, tokens.shape[1], inputs_embeds=inputs)
        last = outputs[torch.arange(len(counts)), counts - 1]
        return self._head(last), last
