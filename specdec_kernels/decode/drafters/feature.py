"""A drafter that reads the target's hidden states (EAGLE, arXiv:2401.15077)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import flags
from specdec_kernels.decode import model_facts
from specdec_kernels.decode.cache import RaggedCache
from specdec_kernels.decode.drafters.autoregressive import AutoregressiveSession, DraftConfig, last_rows
from specdec_kernels.decode.drafters.eight_bits import EightBitLinear, with_eight_bits
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.drafters.histories import Histories, placed_followers
from specdec_kernels.decode.layer_kinds import WHOLE, Kind
from specdec_kernels.ops import DraftVocabulary
from specdec_kernels.tensors import to_device


class FeatureReader(Protocol):
    """What a :class:`FeatureSession` asks of its drafter."""

    config: DraftConfig
    device: torch.device
    vocabulary: DraftVocabulary | None
    """The S ids that can be drafted; ``None``: all of the target's."""
    context: int | None
    kind: Kind
    """What its layer attends to."""
    embed: Callable[[Tensor], Tensor]
    forward: Callable[..., Tensor]
    """Arguments and features as of :meth:`FeatureModel.forward`."""
    head: Callable[[Tensor], Tensor]
    """The S logits after each feature."""

    @property
    def repetitions(self) -> tuple[FeatureModel, dict[int, int]] | None:
        """What raises the logits of repetitions, and the offset in the short list of each id; None if nothing does."""


class FeatureDrafter:
    """A trained :class:`FeatureModel` with the embeddings and the head of its target.

    Args:
        model: trained for exactly this target.
        target: the target's transformers model.
        config: when to stop, how boldly to draw.
        eight_bits: draft with weights of eight bits, by C++ for CPUs, which takes half of the time.

    Raises:
        TypeError, ValueError: ``eight_bits`` is no bool, or cannot run.
    """

    def __init__(
        self, model: FeatureModel, target: Any, config: DraftConfig = DraftConfig(), eight_bits: bool = False
    ) -> None:
        flags(eight_bits=eight_bits)
        self.config, self.network, self.kind = config, model, WHOLE
        self.feature_layers: Sequence[int] = model.layers
        self.device, self.context = model.shortlist.device, model_facts.context_length(target)
        self.vocabulary: DraftVocabulary | None = DraftVocabulary(model.shortlist, model_facts.vocab_size(target))
        self.embed: Callable[[Tensor], Tensor] = target.get_input_embeddings()
        head = target.get_output_embeddings().weight.detach()[model.shortlist]
        self.forward: Callable[..., Tensor] = with_eight_bits(model) if eight_bits else model
        self.head: Callable[[Tensor], Tensor] = (
            EightBitLinear(head) if eight_bits else partial(functional.linear, weight=head)
        )
        self._offsets = model.offsets()

    @property
    def repetitions(self) -> tuple[FeatureModel, dict[int, int]] | None:
        return (self.network, self._offsets) if bool(self.network.repeats.any()) else None

    @property
    def siblings(self) -> int:
        return self.config.siblings

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> FeatureSession:
        return FeatureSession(self, prompts, features)


class FeatureSession(AutoregressiveSession):
    """One stream of a drafter that reads hidden states."""

    def __init__(self, drafter: FeatureReader, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._drafter = drafter
        self._repetitions = drafter.repetitions
        self._histories = None if self._repetitions is None else Histories(prompts)
        device = drafter.device
        cache = RaggedCache([drafter.kind], len(prompts), device, drafter.forward)
        super().__init__(drafter.config, cache, device, drafter.vocabulary, drafter.context, prompts, features)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        super().commit(tokens, features)
        if self._histories is not None:
            self._histories.extend(tokens)

    def select(self, slots: Sequence[int]) -> None:
        super().select(slots)
        if self._histories is not None:
            self._histories.select(slots)

    def join(self, other: FeatureSession) -> None:
        super().join(other)
        if self._histories is not None and other._histories is not None:
            self._histories.join(other._histories)

    def with_repetitions(self, logits: Tensor, paths: Sequence[Tensor]) -> Tensor:
        if self._histories is None or self._repetitions is None:
            return logits
        network, offsets = self._repetitions
        indices = self._histories.indices
        ahead: list[list[int]] = torch.stack(list(paths), 1).tolist() if paths else [[]] * len(logits)
        rows = len(ahead) // len(indices)
        found = [
            (row, offset, length)
            for row, path in enumerate(ahead)
            for offset, length in placed_followers(indices[row // rows], path, offsets)
        ]
        if not found:
            return logits
        return network.favour(logits, *to_device(found, torch.int64, logits.device).unbind(1))

    def _read_prompt(
        self, prompts: Sequence[Sequence[int]], features: Tensor | None
    ) -> tuple[Sequence[Sequence[int]], list[Tensor] | None]:
        # The feature at each token is read together with the token after it.
        if features is None:
            return [prompt[1:] for prompt in prompts], None
        features = features.to(self.device)
        return [prompt[1:] for prompt in prompts], [features[slot, : len(p) - 1] for slot, p in enumerate(prompts)]

    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        assert features is not None, "every node has a parent that was read"
        drafter = self._drafter
        outputs = self._cache.run_tree(
            ancestors, self._depths(tokens, depth), embeddings=drafter.embed(tokens), features=features
        )
        return drafter.head(outputs), outputs

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        if features is None:
            raise ValueError("features must come with the tokens: the target was not asked for them, got None")
        drafter = self._drafter
        outputs = self._cache.run(counts, tokens.shape[1], embeddings=drafter.embed(tokens), features=features)
        last = last_rows(outputs, counts)
        return drafter.head(last), last
