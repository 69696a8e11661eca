"""Calls of operators before anything was looked at.

The C++ refuses what it could not read as it is, so `verify_chain` and `sample` may hand it their arguments at once.
Where it refuses, or gives nothing back, they look, to say what is wrong or to bring it into shape.

A CPU is reached without PyTorch's dispatcher (csrc/native/direct.cpp), which takes as long to start as a row to read;
unless somebody watches what is dispatched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BACKENDS, NATIVE_LIBRARY
from specdec_kernels.ops.processing import NO_EDITS

#: Tensors, or None where an argument is not one that the operators take.
Made = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Straight:
    """The functions with their public arguments, for what has neither penalties, bias nor a workspace."""

    verify_chain: Callable[..., Made]
    """(target_logits, draft_tokens, draft_logits, draft_stats, seed, position, num_draft, cu_rows, temperature, top_k,
    top_p, min_p, bitmask, number of the rule, logprobs, independent)."""
    sample: Callable[..., Made]
    """(logits, seed, position, row, temperature, top_k, top_p, min_p, bitmask, coupled)."""


def _verify_chain(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, draft_stats: Tensor | None, seed: object,
    position: object, num_draft: Tensor | None, cu_rows: Tensor | None, temperature: object, top_k: object,
    top_p: object, min_p: object, bitmask: Tensor | None, rule: int, logprobs: bool, independent: bool,
) -> Made:  # fmt: skip
    numbers = validate.scalars(temperature, top_k, top_p, min_p)
    if numbers is None or not type(seed) is type(position) is Tensor:
        return None
    made: Made = torch.ops.specdec.verify_chain.default(
        target_logits, draft_tokens, draft_logits, draft_stats, seed, position, num_draft, cu_rows, None, *numbers,
        bitmask, *NO_EDITS, rule, logprobs, independent, None,
    )  # fmt: skip
    return made


def _sample(
    logits: Tensor, seed: object, position: object, row: object, temperature: object, top_k: object, top_p: object,
    min_p: object, bitmask: Tensor | None, coupled: bool,
) -> Made:  # fmt: skip
    numbers = validate.scalars(temperature, top_k, top_p, min_p)
    if numbers is None or not type(seed) is type(position) is type(row) is Tensor:
        return None
    made: Made = torch.ops.specdec.sample.default(
        logits, seed, position, row, None, *numbers, bitmask, *NO_EDITS, coupled
    )
    return made


_DISPATCHED = Straight(_verify_chain, _sample)


def _directly() -> Straight:
    """The same without the dispatcher, where this Python and this PyTorch have what it takes."""
    try:
        from specdec_kernels import _native

        entries = ctypes.CDLL(str(NATIVE_LIBRARY)).specdec_cpu_entries
        entries.restype = ctypes.c_void_p
        off = validate.scalars(1.0, None, None, None)
        _native.connect(Tensor, Tensor.__dlpack_c_exchange_api__, entries(), off)
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError):
        return _DISPATCHED  # another Python, or an older PyTorch
    return Straight(_native.verify_chain, _native.sample)


_DIRECT = _DISPATCHED if BACKENDS["cpu"].reason else _directly()

#: Backends in C++, as they may be asked for, and the devices they run on.
_TAKEN = {
    (name, backend.name)
    for backend in (BACKENDS["cpu"], BACKENDS["cuda"])
    if not backend.reason and backend.device == backend.name
    for name in (None, backend.name)
}

_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def straight_to(backend: str | None, logits: object) -> Straight | None:
    """What may be called straight away for such logits, if anything."""
    if type(logits) is not Tensor or torch.compiler.is_compiling():
        return None
    if not logits.is_cpu:
        return _DISPATCHED if (backend, logits.device.type) in _TAKEN else None
    if (backend, "cpu") not in _TAKEN:
        return None
    watched = _dispatch_modes() or torch.autograd.profiler._is_profiler_enabled
    return _DISPATCHED if watched else _DIRECT
