"""Targets: any causal transformers model whose cache can be cropped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.protocols import Scores
from specdec_kernels.decode.ragged_cache import RaggedCache
from specdec_kernels.ops.trees import tree_mask, tree_positions


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
        fixed_rows: score in windows of exactly this many rows, at fixed places of the text. Passes over different
            numbers of rows, or of keys, round differently, so that a greedy text depends, after some tens of tokens,
            on how it was drafted. In a window every token is always scored in the same row of the same shape,
            whatever was drafted, so it does not. The price: rows of the window that are known already are scored
            again, and drafts end with the window. For a batch of one.

    Raises:
        ValueError: ``fixed_rows`` below 1, or with several prompts.
    """

    def __init__(self, model: Any, fixed_rows: int | None = None) -> None:
        if fixed_rows is not None and fixed_rows < 1:
            raise ValueError(f"fixed_rows must be None or at least 1, got {fixed_rows}")
        self.model = model
        self.fixed_rows = fixed_rows
        self._feature_layers: Sequence[int] = ()

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], feature_layers: Sequence[int]) -> Tensor | None:
        if self.fixed_rows is not None and len(prompts) != 1:
            raise ValueError(f"fixed_rows needs a batch of one prompt, got {len(prompts)}")
        self._feature_layers = feature_layers
        self._cache = RaggedCache(self.model.config, len(prompts), self.model.device)
        self._window = torch.empty((1, 0), dtype=torch.int64, device=self.model.device)
        tokens, counts = padded([prompt[:-1] for prompt in prompts], self.model.device)
        if tokens.shape[1] == 0:
            return None
        return self._run(tokens, counts, logits_to_keep=1).features

    def room(self) -> int:
        return sys.maxsize if self.fixed_rows is None else self.fixed_rows - self._window.shape[1]

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Tensor) -> Scores:
        if self.fixed_rows is None:
            return self._run(tokens, counts)
        known, rows = self._window.shape[1], tokens.shape[1]
        self._window = torch.cat([self._window, tokens], 1)
        padding = (0, self.fixed_rows - known - rows)
        scores = self._run(functional.pad(self._window, padding), counts * 0 + self.fixed_rows)
        new = slice(known, known + rows)
        self._known = known
        return Scores(scores.logits[:, new], None if scores.features is None else scores.features[:, new])

    def keep(self, rows: Tensor) -> None:
        if self.fixed_rows is None:
            self._cache.keep(rows)
            return
        self._window = self._window[:, : self._known + int(rows)]
        if self._window.shape[1] == self.fixed_rows:
            self._window = self._window[:, :0]
        else:
            self._cache.crop(self.fixed_rows)

    @torch.inference_mode()
    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        if self.fixed_rows is not None:
            raise ValueError(f"fixed_rows takes chains of drafts, not trees; got fixed_rows={self.fixed_rows}")
        depth = tree_positions(parents).clamp(min=0)
        outputs = self._cache.run_tree(
            self.model, tree_mask(parents), depth, input_ids=tokens, output_hidden_states=bool(self._feature_layers)
        )
        return self._scores(outputs)

    def keep_path(self, nodes: Tensor) -> None:
        self._cache.keep_path(nodes)

    def select(self, requests: Tensor) -> None:
        self._cache.select(requests)

    def _run(self, tokens: Tensor, counts: Tensor, **options: Any) -> Scores:
        outputs = self._cache.run(
            self.model,
            counts,
            tokens.shape[1],
            input_ids=tokens,
            output_hidden_states=bool(self._feature_layers),
            **options,
        )
        return self._scores(outputs)

    def _scores(self, outputs: Any) -> Scores:
        layers = [outputs.hidden_states[layer] for layer in self._feature_layers]
        return Scores(outputs.logits, torch.cat(layers, -1) if layers else None)
