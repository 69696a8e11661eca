"""Prompt lookup: continue as the history did the first time that it looked like this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from specdec_kernels.checks import flags, whole
from specdec_kernels.decode.drafters.histories import Histories
from specdec_kernels.decode.drafters.shared_history import SharedHistory, SharedText
from specdec_kernels.decode.drafts import Draft, Step
from specdec_kernels.decode.prompts import SourcePrompt


class NGramDrafter:
    """Drafts what followed the longest suffix of the history that occurred before, the first time; point masses.

    Args:
        min_match: tokens of that suffix at least; below it nothing is drafted.
        sources: look for it in the source of an encoder-decoder's prompt too, as if that had been written before,
            behind the tokens that the text begins with. Summaries and corrections copy it. Not where the model's
            encoder has another vocabulary than its decoder.
        shared: texts of other requests, in which the last tokens are looked for too; what is longer counts. What is
            drafted then depends on what else was written, so that at a temperature, under the rules ``"token"`` and
            ``"block"``, the same seed may give another text.

    Raises:
        TypeError, ValueError: ``min_match`` is no int, or below 1; ``sources`` is no bool; ``shared`` is no history.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, min_match: int = 2, sources: bool = True, shared: SharedHistory | None = None) -> None:
        whole("min_match", min_match, 1)
        flags(sources=sources)
        if shared is not None and not isinstance(shared, SharedHistory):
            raise TypeError(f"shared must be a SharedHistory, got {type(shared).__name__}")
        self.min_match, self.sources, self.shared = min_match, sources, shared

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> NGramSession:
        known = [with_source(prompt) for prompt in prompts] if self.sources else prompts
        texts = [] if self.shared is None else [self.shared.begin(prompt) for prompt in prompts]
        return NGramSession(self.min_match, known, texts)


def with_source(prompt: Sequence[int]) -> Sequence[int]:
    """A prompt behind its source, which stands behind what the text begins with once more, so that the beginning of the
    text is looked up at the beginning of the source; without it, where its ids are none of the text's."""
    if isinstance(prompt, SourcePrompt) and prompt.shares_ids and not isinstance(prompt.source, Tensor):
        return [*prompt, *prompt.source, *prompt]
    return prompt


class NGramSession:
    """One stream of a :class:`NGramDrafter`."""

    def __init__(self, min_match: int, prompts: Sequence[Sequence[int]], texts: list[SharedText]) -> None:
        self._min_match, self._histories, self._texts = min_match, Histories(prompts), texts

    def available(self, num_draft: Sequence[int]) -> list[int]:
        # What others wrote is looked for once the step is known.
        return list(num_draft) if self._texts else self._repeated(num_draft)

    def _repeated(self, num_draft: Sequence[int]) -> list[int]:
        """Of so many drafts of each request, how many its own history has."""
        return [
            count if index.match()[0] >= self._min_match else 0
            for index, count in zip(self._histories.indices, num_draft, strict=True)
        ]

    def propose(self, step: Step) -> Draft:
        indices, counts = self._histories.indices, self._repeated(step.num_draft)
        drafts = [index.continuation(count) for index, count in zip(indices, counts, strict=True)]
        if self._texts:
            self._look_around(drafts, step)
        return Draft.point_masses(drafts)

    def _look_around(self, drafts: list[list[int]], step: Step) -> None:
        """Replace drafts by what other texts have behind a longer match."""
        if any(text.seed is None for text in self._texts):
            for text, seed in zip(self._texts, step.seed.tolist(), strict=True):
                text.seed = text.origin.seed = seed
        for slot, (text, count) in enumerate(zip(self._texts, step.num_draft, strict=True)):
            length, tokens = text.find(count, any_seed=step.same_text)
            if tokens and length >= self._min_match and length > self._histories.indices[slot].match()[0]:
                drafts[slot] = tokens

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._histories.extend(tokens)
        for text, new in zip(self._texts, tokens, strict=False):
            text.extend(new)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """See :class:`~specdec_kernels.decode.protocols.RevertibleSession`."""
        before, self._texts = self._texts, [text.fork() for text in self._texts]
        try:
            with self._histories.trial():
                yield
        finally:
            self._texts = before

    def select(self, slots: Sequence[int]) -> None:
        self._histories.select(slots)
        self._texts = [self._texts[slot] for slot in slots if self._texts]

    def join(self, other: NGramSession) -> None:
        self._histories.join(other._histories)
        self._texts = self._texts + other._texts
