"""The histories of a batch, as drafters that look back at them keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

from specdec_kernels.decode.drafters.suffix_index import SuffixIndex


class Histories:
    """A suffix index of every request's prompt and new tokens.

    Args:
        prompts: what the requests begin with.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.indices: list[SuffixIndex] = [SuffixIndex() for _ in prompts]
        self.extend(prompts)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add tokens to each request's history."""
        for index, new in zip(self.indices, tokens, strict=True):
            index.extend(new)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Take back at the end what is added within; an index cannot be cropped, so copies grow."""
        before, self.indices = self.indices, [copy(index) for index in self.indices]
        try:
            yield
        finally:
            self.indices = before

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only."""
        self.indices = [self.indices[slot] for slot in slots]

    def join(self, other: Histories) -> None:
        """Go on with the requests of others too, behind one's own."""
        self.indices = self.indices + other.indices


def placed_followers(index: SuffixIndex, ahead: Sequence[int], offsets: Mapping[int, int]) -> list[tuple[int, int]]:
    """(offset, length) of what followed a suffix of a history and of tokens ``ahead`` of it, where it has an offset."""
    followers = zip(*index.followers(ahead), strict=True)
    return [(offsets[token], length) for token, length in followers if token in offsets]
