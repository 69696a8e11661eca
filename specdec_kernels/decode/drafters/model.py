"""A smaller language model as the drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.decode import model_facts
from specdec_kernels.decode.drafters.autoregressive import AutoregressiveSession, DraftConfig, last_rows
from specdec_kernels.decode.model_cache import ModelCache
from specdec_kernels.decode.targets import TransformersTarget, try_out
from specdec_kernels.ops import DraftVocabulary


class ModelDrafter:
    """Any transformers model with the target's tokenizer; an encoder-decoder reads the sources that the target reads.

    Args:
        model: its vocabulary may be smaller than the target's: the rest is then never drafted.
        vocab_size: of the target; ``None`` where it is the model's own.
        config: when to stop, how boldly to draw.

    Raises:
        TypeError, ValueError: the model cannot draft, or its vocabulary is larger than the target's.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, model: Any, vocab_size: int | None = None, config: DraftConfig = DraftConfig()) -> None:
        self.layers = model_facts.check_model(model)
        own = model_facts.vocab_size(model)
        if vocab_size is not None and own > vocab_size:
            raise ValueError(f"vocab_size must be at least the drafter's own {own}, got {vocab_size}")
        self.model, self.config, self.own_vocab, self.vocab_size = model, config, own, vocab_size or own
        known = torch.arange(own, device=model.device)
        self.vocabulary = None if own == self.vocab_size else DraftVocabulary(known, self.vocab_size)

    @property
    def siblings(self) -> int:
        return self.config.siblings

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> ModelSession:
        return ModelSession(self, prompts, self.cache(prompts))

    def cache(self, prompts: Sequence[Sequence[int]]) -> ModelCache:
        """A cache of the model for so many prompts, which were checked.

        Raises:
            TypeError, ValueError: they have not the sources that an encoder-decoder needs.
        """
        if model_facts.is_encoder_decoder(self.model):
            model_facts.check_sources(self.model, prompts)
        return ModelCache(self.model, self.layers, prompts)


class ModelSession(AutoregressiveSession):
    """One stream of a :class:`ModelDrafter`."""

    def __init__(self, drafter: ModelDrafter, prompts: Sequence[Sequence[int]], cache: ModelCache) -> None:
        self._model, self._own_vocab = drafter.model, drafter.own_vocab
        self._tried, self._prompt = False, prompts[0]
        super().__init__(
            drafter.config,
            cache,
            drafter.model.device,
            drafter.vocabulary,
            model_facts.context_length(drafter.model),
            prompts,
            None,
        )

    @contextmanager
    def trial(self) -> Iterator[None]:
        """See :class:`~specdec_kernels.decode.protocols.RevertibleSession`."""
        self._read_ahead()  # or it would be read again in every trial
        pending, exhausted = [list(tokens) for tokens in self._pending], list(self._exhausted)
        try:
            with self._cache.trial():
                yield
        finally:
            self._pending, self._exhausted = pending, exhausted

    def _known(self, tokens: Tensor) -> Tensor:
        """Ids that the model has: any will do for a token that it does not."""
        return tokens.where(tokens < self._own_vocab, 0)

    def _columns(self, logits: Tensor) -> Tensor:
        """The logits [..., S] that it drafts from."""
        return logits

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        known, rows = self._known(tokens), tokens.shape[1]
        # Drafts are taken back to a mark, not by a commit.
        outputs = self._cache.run(counts, rows, decided=True, input_ids=known)
        return self._columns(last_rows(outputs.logits, counts)), None

    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        if not self._tried:
            try_out(TransformersTarget(self._model), "trees", self._prompt)
            self._tried = True
        depths, known = self._depths(tokens, depth), self._known(tokens)
        outputs = self._cache.run_tree(ancestors, depths, input_ids=known)
        return self._columns(outputs.logits), None
