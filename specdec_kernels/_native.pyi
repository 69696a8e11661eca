"""Native code made for Python (csrc/native)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    on_cuda: bool,
    off: tuple[float, int, float, float],
    results: tuple[type[Verified], type[VerifiedTree], type[Sample], type[DrawnChildren]],
    empty_strided: Callable[..., Tensor] | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The functions of a library, as specdec_kernels.ops.fast_path.FastPath: by ``torch.Tensor``, its DLPack interface,
    the library's entries (0: what would be run is left to whoever calls), whether its tensors are on a GPU, a
    temperature with filters that are off, the classes of results, what makes results (None: they are made in C++, on a
    CPU) and their dtypes."""

def launch_key(*arguments: object) -> bytes | None:
    """What Triton compiles a kernel apart for, of these arguments; None where one is neither None nor a number nor a
    plain tensor."""
