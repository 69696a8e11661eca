"""The texts of a batch, as drafters that look back at them keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from specdec_kernels._native import SuffixIndex


class Texts:
    """A suffix index of every request's prompt and text.

    Args:
        user: who needs them, for the message of the error.

    Raises:
        RuntimeError: the native module was not built for this Python.
    """

    def __init__(self, user: str) -> None:
        try:
            from specdec_kernels._native import SuffixIndex
        except ImportError as error:
            raise RuntimeError(f"{user} needs the native module: {error} (pip install -e .)") from None
        self._new_index = SuffixIndex
        self.indices: list[SuffixIndex] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Forget all requests; begin with these prompts."""
        self.indices = [self._new_index() for _ in prompts]
        self.extend(prompts)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add tokens to each request's text."""
        for index, new in zip(self.indices, tokens, strict=True):
            index.extend(new)

    def select(self, requests: Tensor) -> None:
        """Go on with these requests only."""
        self.indices = [self.indices[slot] for slot in requests.tolist()]


def placed_followers(index: SuffixIndex, ahead: Sequence[int], places: Mapping[int, int]) -> list[tuple[int, int]]:
    """(place, length) of what followed a suffix of a text and of tokens ``ahead`` of it, where it has a place."""
    followers = zip(*index.followers(ahead), strict=True)
    return [(places[token], length) for token, length in followers if token in places]
