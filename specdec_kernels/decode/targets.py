"""Targets: any causal transformers model whose cache can be cropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.protocols import Scores
from specdec_kernels.decode.ragged_cache import RaggedCache


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens [B, R], 0 where there is none, and counts [B])."""
    rows = max((len(sequence) for sequence in sequences), default=0)
    tokens = torch.tensor([[*sequence, *[0] * (rows - len(sequence))] for sequence in sequences], device=device)
    counts = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return tokens.reshape(len(sequences), rows).long(), counts


class TransformersTarget:
    """A ``transformers`` causal language model as a :class:`~specdec_kernels.decode.protocols.Target`.

    Args:
        model: any causal model with a croppable cache (full attention in every layer).
        fixed_rows: score exactly this many rows in every step, padded. Passes over different numbers of rows round
            differently, so a greedy text depends, after some tens of tokens, on how it was drafted; with one number
            of rows it does not, at the price of scoring rows that nobody wants.

    Raises:
        ValueError: ``fixed_rows`` below 1, or a step with more rows than that.
    """

    def __init__(self, model: Any, fixed_rows: int | None = None) -> None:
        if fixed_rows is not None and fixed_rows < 1:
            raise ValueError(f"fixed_rows must be None or at least 1, got {fixed_rows}")
        self.model = model
        self.fixed_rows = fixed_rows
        self._features = False

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], features: bool) -> Tensor | None:
        self._features = features
        self._cache = RaggedCache(self.model.config, len(prompts), self.model.device)
        tokens, counts = padded([prompt[:-1] for prompt in prompts], self.model.device)
        if tokens.shape[1] == 0:
            return None
        return self._run(tokens, counts, logits_to_keep=1).features

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Tensor) -> Scores:
        rows = tokens.shape[1]
        if self.fixed_rows is None:
            return self._run(tokens, counts)
        if rows > self.fixed_rows:
            raise ValueError(f"fixed_rows must be at least the {rows} rows of a step, got {self.fixed_rows}")
        scores = self._run(functional.pad(tokens, (0, self.fixed_rows - rows)), counts)
        return Scores(scores.logits[:, :rows], None if scores.features is None else scores.features[:, :rows])

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)

    def select(self, requests: Tensor) -> None:
        self._cache.select(requests)

    def _run(self, tokens: Tensor, counts: Tensor, **options: Any) -> Scores:
        outputs = self._cache.run(
            self.model, counts, tokens.shape[1], input_ids=tokens, output_hidden_states=self._features, **options
        )
        return Scores(outputs.logits, outputs.hidden_states[-1] if self._features else None)
