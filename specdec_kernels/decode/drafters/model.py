"""A smaller causal language model as the drafter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.decode.drafters.autoregressive import AutoregressiveDrafter
from specdec_kernels.ops import BackendName


class ModelDrafter(AutoregressiveDrafter):
    """Any causal transformers model with the target's tokenizer.

    Args:
        model: its vocabulary may be smaller than the target's: the rest is then never drafted.
        vocab_size: of the target; ``None`` where it is the model's own.
        min_confidence: stop drafting below it, see :class:`AutoregressiveDrafter`; 0 never stops.
        backend: of :func:`specdec_kernels.sample`.

    Raises:
        ValueError: the model's vocabulary is larger than the target's.
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int | None = None,
        min_confidence: float = 0.0,
        backend: BackendName | None = None,
    ) -> None:
        own = model.config.vocab_size
        if vocab_size is not None and own > vocab_size:
            raise ValueError(f"vocab_size must be at least the drafter's own {own}, got {vocab_size}")
        super().__init__(model.config, model.device, vocab_size or own, min_confidence, backend)
        self.model = model

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        known = tokens.where(tokens < self.model.config.vocab_size, 0)  # any id will do for a token it does not have
        outputs = self._cache.run(self.model, counts, tokens.shape[1], input_ids=known)
        return outputs.logits[torch.arange(len(counts)), counts - 1], None

    def _scatter(self, rows: Tensor, logits: Tensor) -> None:
        rows[:, : logits.shape[1]] = logits
