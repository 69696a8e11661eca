"""Native code made for Python (csrc/native)."""

from collections.abc import Callable, Sequence
from typing import Any

def build_facts() -> dict[str, str | bool]:
    """What the native libraries were built with: compiler, torch, whether with sanitizers."""

def connect(
    entries: int, on_cuda: bool, results_by_torch: bool, results: Sequence[type]
) -> tuple[Callable[..., Any], ...]:
    """The functions ``verify_chain``, ``verify_tree``, ``sample`` and ``sample_children`` of a library, by its entries
    (0: what would be run is left to whoever calls), whether its tensors are on a GPU, whether PyTorch makes the results
    (else they are made in C++, on a CPU), and their classes."""

def launch_key(*arguments: object) -> bytes | None:
    """What Triton compiles a kernel apart for, of these arguments; None where one is neither None nor a number nor a
    plain tensor."""
