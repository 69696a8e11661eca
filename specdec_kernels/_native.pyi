"""Native code made for Python (csrc/native)."""

from collections.abc import Sequence
from typing import Any

from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree

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

def connect(
    tensor: type,
    exchange: object,
    entries: int,
    off: tuple[float, int, float, float] | None,
    results: tuple[type[Verified], type[VerifiedTree], type[Sample], type[DrawnChildren]],
) -> None:
    """Make the functions below run: by ``torch.Tensor``, its DLPack interface, the library's entries, a temperature
    with filters that are off, and the classes of their results."""

# See specdec_kernels.ops.straight.Straight.
def verify_chain(*arguments: Any) -> Verified | None: ...
def verify_tree(*arguments: Any) -> VerifiedTree | None: ...
def sample(*arguments: Any) -> Sample | None: ...
def sample_children(*arguments: Any) -> DrawnChildren | None: ...
