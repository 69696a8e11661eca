"""Native code made for Python (csrc/native)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree

def build_facts() -> dict[str, str | bool]:
    """What the native libraries were built with: compiler, torch, whether with sanitizers."""

def connect(
    tensor: type,
    exchange: object,
    entries: int,
    on_cuda: bool,
    results: tuple[type[Verified], type[VerifiedTree], type[Sample], type[DrawnChildren]],
    empty_strided: Callable[..., Tensor] | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The functions of a library, as specdec_kernels.ops.fast_path.FastPath: by ``torch.Tensor``, its DLPack interface,
    the library's entries (0: what would be run is left to whoever calls), whether its tensors are on a GPU, the
    classes of results, what makes results (None: they are made in C++, on a CPU) and their dtypes."""

def launch_key(*arguments: object) -> bytes | None:
    """What Triton compiles a kernel apart for, of these arguments; None where one is neither None nor a number nor a
    plain tensor."""
