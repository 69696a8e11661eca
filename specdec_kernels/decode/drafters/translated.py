"""Drafters whose model has another tokenizer than the target (Timor et al., arXiv:2502.05202).

Point masses by text (universal assisted decoding), or the drafter's distribution over the tokens that both vocabularies
have (token-level intersection). Neither changes the distribution of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.checks import whole
from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.decode import model_facts
from specdec_kernels.decode.drafters.autoregressive import DraftConfig
from specdec_kernels.decode.drafters.model import ModelDrafter, ModelSession
from specdec_kernels.decode.drafters.translation import Translation
from specdec_kernels.decode.drafts import Draft, Step, require_chain
from specdec_kernels.decode.protocols import Drafter, DrafterSession, joinable, traits_of
from specdec_kernels.ops import DraftVocabulary
from specdec_kernels.tensors import to_device


def _check_translation(translation: object) -> None:
    if not isinstance(translation, Translation):
        raise TypeError(
            f"translation must be a Translation(target_tokenizer, draft_tokenizer), got {type(translation).__name__}"
        )


class IntersectionDrafter(ModelDrafter):
    """A :class:`ModelDrafter` whose model has another tokenizer: it draws from its distribution over the tokens that
    both have, renormalised.

    It reads the text in its own tokens, exactly where the same bytes are a token there. What it draws is a token of
    both vocabularies by its bytes, so its logits are those of some of the target's ids: its ``vocabulary``.

    Args:
        model: as of :class:`ModelDrafter`.
        translation: from the target's tokenizer to the model's.
        vocab_size: of the target.
        config: as of :class:`ModelDrafter`.

    Raises:
        TypeError, ValueError: as of :class:`ModelDrafter`; the vocabularies have nothing in common.
    """

    def __init__(
        self, model: Any, translation: Translation, vocab_size: int, config: DraftConfig = DraftConfig()
    ) -> None:
        super().__init__(model, None, config)
        model_facts.check_decoder_alone(model, "to draft with another tokenizer", "draft with a decoder")
        _check_translation(translation)
        self.translation, self.vocab_size = translation, vocab_size
        self.shared = translation.shared(vocab_size, self.own_vocab)
        """By the target's ids the model's own, of all tokens that both have."""
        if not self.shared:
            raise ValueError("translation must be between vocabularies that share a token, got none in common")
        self.vocabulary = DraftVocabulary(to_device(list(self.shared), torch.int64, model.device), vocab_size)

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> IntersectionSession:
        return IntersectionSession(self, prompts, self.cache(prompts))


class IntersectionSession(ModelSession):
    """One stream of an :class:`IntersectionDrafter`.

    Behind the target's ids come the model's own: those of the drafts are the target's, and those of the text are the
    model's, which has more of them.
    """

    def __init__(self, drafter: IntersectionDrafter, prompts: Sequence[Sequence[int]], cache: Any) -> None:
        self._translation, self._behind, device = drafter.translation, drafter.vocab_size, drafter.model.device
        self._own_ids = to_device(list(drafter.shared.values()), torch.int64, device)
        own = torch.arange(-self._behind, drafter.own_vocab, device=device).clamp(min=0)
        assert drafter.vocabulary is not None, "it has one always"
        self._own = own.index_copy(0, drafter.vocabulary.draft_to_target, self._own_ids)
        super().__init__(drafter, prompts, cache)

    def _read_prompt(
        self, prompts: Sequence[Sequence[int]], features: Tensor | None
    ) -> tuple[Sequence[Sequence[int]], list[Tensor] | None]:
        return [self._placed(self._translation.prompt(prompt)) for prompt in prompts], None

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        super().commit([self._placed(self._translation.tokens(new)) for new in tokens], None)

    def _placed(self, own: Sequence[int]) -> list[int]:
        """What the model has ids for, which may be fewer than its tokenizer's."""
        return [self._behind + token for token in own if token < self._own_vocab]

    def _known(self, tokens: Tensor) -> Tensor:
        return self._own[tokens]

    def _columns(self, logits: Tensor) -> Tensor:
        return logits[..., self._own_ids]


class TranslatedDrafter:
    """Any drafter of chains with another tokenizer's ids: its likeliest drafts are translated by their text, and are
    point masses.

    What is drafted ends with the first token whose text the target has no tokens for. A token that is none of the
    target's becomes several.

    Args:
        drafter: of chains, in its own tokenizer's ids, which reads no features of the target.
        translation: from the target's tokenizer to the drafter's.
        vocab_size: of the target, whose tokenizer may have more tokens: these are never drafted.

    Raises:
        TypeError, ValueError: one of them is not what it should be.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, drafter: Drafter, translation: Translation, vocab_size: int) -> None:
        _check_translation(translation)
        whole("vocab_size", vocab_size, 1)
        if drafter.feature_layers or traits_of(drafter).siblings:
            raise ValueError(f"drafter must draft chains and read no features, got {type(drafter).__name__}")
        self.drafter, self.translation, self.vocab_size = drafter, translation, vocab_size
        self.back = translation.reversed()

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> TranslatedSession:
        translated = [self.translation.prompt(prompt) for prompt in prompts]
        return TranslatedSession(self, self.drafter.begin(translated, None), [bool(prompt) for prompt in translated])


class TranslatedSession:
    """One stream of a :class:`TranslatedDrafter`."""

    def __init__(self, drafter: TranslatedDrafter, session: DrafterSession, begun: list[bool]) -> None:
        self._drafter, self._session = drafter, session
        self._begun = begun  # whether anything of a history could be translated

    def propose(self, step: Step) -> Draft:
        off: dict[str, Any] = {"top_k": TOP_K_OFF, "top_p": TOP_P_OFF, "min_p": MIN_P_OFF}
        wanted = [count if begun else 0 for count, begun in zip(step.num_draft, self._begun, strict=True)]
        likeliest = replace(step, num_draft=wanted, temperature=0.0, greedy=True, coupled=False, length=None, **off)
        draft = require_chain(self._session.propose(likeliest))
        return Draft.point_masses(
            [self._translated(own)[:count] for own, count in zip(draft.tokens.tolist(), step.num_draft, strict=True)]
        )

    def _translated(self, drafts: Sequence[int]) -> list[int]:
        translated = list[int]()
        for token in drafts:
            tokens, complete = self._drafter.back.of(token)
            if not complete or max(tokens) >= self._drafter.vocab_size:
                break
            translated += tokens
        return translated

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        translated = [self._drafter.translation.tokens(new) for new in tokens]
        self._begun = [begun or bool(new) for begun, new in zip(self._begun, translated, strict=True)]
        self._session.commit(translated, None)

    def select(self, slots: Sequence[int]) -> None:
        self._session.select(slots)
        self._begun = [self._begun[slot] for slot in slots]

    def join(self, other: TranslatedSession) -> None:
        joinable(self._session).join(other._session)
        self._begun = self._begun + other._begun
