"""Prompt lookup: continue as the history did the last time that it looked like this."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec_kernels.decode.drafters.histories import Histories
from specdec_kernels.decode.protocols import Draft, SourcePrompt, Step
from specdec_kernels.ops.validate import whole


class NGramDrafter:
    """Drafts what followed the longest suffix of the history that occurred before; point masses.

    Args:
        min_match: tokens of that suffix at least; below it nothing is drafted.
        sources: look for it in the source of an encoder-decoder's prompt too, as if that had been written before,
            behind the tokens that the text begins with. Summaries and corrections copy it.

    Raises:
        TypeError, ValueError: ``min_match`` is no int, or below 1; ``sources`` is no bool.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, min_match: int = 2, sources: bool = True) -> None:
        whole("min_match", min_match, 1)
        if not isinstance(sources, bool):
            raise TypeError(f"sources must be a bool, got {sources!r}")
        self.min_match, self.sources = min_match, sources

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> NGramSession:
        return NGramSession(self.min_match, [with_source(prompt) for prompt in prompts] if self.sources else prompts)


def with_source(prompt: Sequence[int]) -> Sequence[int]:
    """A prompt behind its source, which stands behind what the text begins with once more, so that the beginning of the
    text is looked up at the beginning of the source."""
    if isinstance(prompt, SourcePrompt) and not isinstance(prompt.source, Tensor):
        return [*prompt, *prompt.source, *prompt]
    return prompt


class NGramSession:
    """One stream of a :class:`NGramDrafter`."""

    def __init__(self, min_match: int, prompts: Sequence[Sequence[int]]) -> None:
        self._min_match, self._histories = min_match, Histories(prompts)

    def available(self, num_draft: Sequence[int]) -> list[int]:
        return [
            count if index.match()[0] >= self._min_match else 0
            for index, count in zip(self._histories.indices, num_draft, strict=True)
        ]

    def propose(self, step: Step) -> Draft:
        counts = self.available(step.num_draft)
        indices = self._histories.indices
        return Draft.point_masses([index.continuation(count) for index, count in zip(indices, counts, strict=True)])

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._histories.extend(tokens)

    def select(self, slots: Sequence[int]) -> None:
        self._histories.select(slots)

    def join(self, other: NGramSession) -> None:
        self._histories.join(other._histories)
