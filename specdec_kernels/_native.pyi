"""Native code that is no tensor operator (csrc/native)."""

from collections.abc import Sequence

def build_facts() -> dict[str, str | bool]:
    """What the native libraries were built with: compiler, torch, whether with sanitizers."""

class SuffixIndex:
    """The longest suffix of a text that occurred in it before, as it grows."""

    def append(self, token: int) -> None:
        """Add one token to the text."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""

    def match(self) -> tuple[int, int]:
        """(length of the longest suffix that occurred before, index just after its first occurrence)."""

    def continuation(self, count: int) -> list[int]:
        """What followed that occurrence: ``count`` tokens, a repetition going on past the end of the text."""

    def followers(self, ahead: Sequence[int]) -> tuple[list[int], list[int]]:
        """(tokens, lengths): what followed a suffix of the text and of tokens ``ahead`` of it, wherever it occurred in
        the text; each token once, with the length of the longest such suffix."""

    def __len__(self) -> int: ...
