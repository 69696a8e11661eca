"""A smaller causal language model as the drafter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.decode.drafters.autoregressive import AutoregressiveDrafter, Drafting


class ModelDrafter(AutoregressiveDrafter):
    """Any causal transformers model with the target's tokenizer.

    Args:
        model: its vocabulary may be smaller than the target's: the rest is then never drafted.
        vocab_size: of the target; ``None`` where it is the model's own.
        drafting: when to stop, how boldly to draw.

    Raises:
        ValueError: the model's vocabulary is larger than the target's.
    """

    def __init__(self, model: Any, vocab_size: int | None = None, drafting: Drafting = Drafting()) -> None:
        own = model.config.vocab_size
        if vocab_size is not None and own > vocab_size:
            raise ValueError(f"vocab_size must be at least the drafter's own {own}, got {vocab_size}")
        super().__init__(model.config, model.device, vocab_size or own, drafting)
        self.model = model

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        known = tokens.where(tokens < self.model.config.vocab_size, 0)  # any id will do for a token it does not have
        outputs = self._cache.run(self.model, counts, tokens.shape[1], input_ids=known)
        return outputs.logits[torch.arange(len(counts)), counts - 1], None

    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        known = tokens.where(tokens < self.model.config.vocab_size, 0)
        outputs = self._cache.run_tree(self.model, ancestors, torch.full_like(tokens, depth), input_ids=known)
        return outputs.logits, None

    def _scatter(self, rows: Tensor, logits: Tensor) -> None:
        rows[:, : logits.shape[1]] = logits
