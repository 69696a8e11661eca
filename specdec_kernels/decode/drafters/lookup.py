"""Prompt lookup: continue as the text did the last time it looked like this."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec_kernels.decode.drafters.texts import Texts
from specdec_kernels.decode.protocols import Draft, Step


class LookupDrafter:
    """Drafts what followed the longest suffix of prompt and text that occurred before; point masses.

    Args:
        min_match: tokens of that suffix at least; below it nothing is drafted.

    Raises:
        ValueError: ``min_match`` below 1.
        RuntimeError: the native module was not built for this Python.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, min_match: int = 2) -> None:
        if min_match < 1:
            raise ValueError(f"min_match must be at least 1, got {min_match}")
        self.min_match = min_match
        self._texts = Texts("LookupDrafter")

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._texts.begin(prompts)

    def propose(self, step: Step) -> Draft:
        wanted = step.num_draft.tolist()
        drafts = [
            index.continuation(count) if index.match()[0] >= self.min_match else []
            for index, count in zip(self._texts.indices, wanted, strict=True)
        ]
        return Draft.point_masses(drafts)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._texts.extend(tokens)

    def select(self, requests: Tensor) -> None:
        self._texts.select(requests)
