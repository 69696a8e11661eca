"""Prompt lookup: continue as the text did the last time it looked like this."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
        try:
            from specdec_kernels._native import SuffixIndex
        except ImportError as error:
            raise RuntimeError(f"LookupDrafter needs the native module: {error} (pip install -e .)") from None
        self.min_match = min_match
        self._new_index = SuffixIndex

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._indices = [self._new_index() for _ in prompts]
        self.commit(prompts, None)

    def propose(self, step: Step) -> Draft:
        wanted = step.num_draft.tolist()
        drafts = [
            index.continuation(count) if index.match()[0] >= self.min_match else []
            for index, count in zip(self._indices, wanted, strict=True)
        ]
        return Draft.point_masses(drafts)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        for index, new in zip(self._indices, tokens, strict=True):
            index.extend(new)

    def select(self, requests: Tensor) -> None:
        self._indices = [self._indices[slot] for slot in requests.tolist()]
