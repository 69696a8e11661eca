"""Calls of operators before anything was looked at.

The C++ refuses what it could not read as it is, so the functions that draw and verify may hand it their arguments at
once. Where it gives nothing back they look, to say what is wrong or to bring it into shape.

A CPU is reached without PyTorch's dispatcher (csrc/native/direct.cpp), which takes as long to start as a row to read;
unless somebody watches what is dispatched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BACKENDS, NATIVE_LIBRARY
from specdec_kernels.ops.processing import NO_EDITS
from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree

Result = TypeVar("Result", Verified, VerifiedTree, Sample, DrawnChildren)


@dataclass(frozen=True)
class Straight:
    """The functions with their public arguments, for what has neither penalties, bias nor a workspace. None where an
    argument is not one that the operators take."""

    verify_chain: Callable[..., Verified | None]
    """(target_logits, draft_tokens, draft_logits, draft_stats, draft_temperature, seed, position, num_draft, cu_rows,
    temperature, top_k, top_p, min_p, bitmask, number of the rule, logprobs, independent)."""
    verify_tree: Callable[..., VerifiedTree | None]
    """(target_logits, draft_tokens, parents, draft_logits, draft_stats, draft_temperature, seed, position, temperature,
    top_k, top_p, min_p, bitmask, number of the rule, replacement, logprobs)."""
    sample: Callable[..., Sample | None]
    """(logits, seed, position, row, temperature, top_k, top_p, min_p, bitmask, coupled)."""
    sample_children: Callable[..., DrawnChildren | None]
    """(logits, seed, position, row, temperature, top_k, top_p, min_p, bitmask, count, number of how)."""


def _by_dispatcher(
    op: str, result: type[Result], keys: tuple[int, ...], numbers: int, *behind: object, heat: int | None = None
) -> Callable[..., Result | None]:
    """An operator with the arguments above: which of them the noise is keyed on, where temperature and filters begin,
    what else the operator has behind all of them, and where the drafts' temperature is, if there is any."""
    operator = getattr(torch.ops.specdec, op).default

    def call(*arguments: Any) -> Result | None:
        law = validate.scalars(*arguments[numbers : numbers + 4])
        if law is None or any(type(arguments[key]) is not Tensor for key in keys):
            return None
        bitmask, *rest = arguments[numbers + 4 :]
        first: list[Any] = list(arguments[:numbers])
        if heat is not None:
            first[heat : heat + 1] = validate.one_or_each(first[heat], 1.0)
        try:
            return result._make(operator(*first, None, *law, bitmask, *NO_EDITS, *rest, *behind))
        except RuntimeError:
            return None

    return call


_DISPATCHED = Straight(
    verify_chain=_by_dispatcher("verify_chain", Verified, (5, 6), 9, None, heat=4),  # no workspace
    verify_tree=_by_dispatcher("verify_tree", VerifiedTree, (6, 7), 8, heat=5),
    sample=_by_dispatcher("sample", Sample, (1, 2, 3), 4),
    sample_children=_by_dispatcher("sample_children", DrawnChildren, (1, 2, 3), 4),
)


def _directly() -> Straight:
    """The same without the dispatcher, where this Python and this PyTorch have what it takes."""
    try:
        from specdec_kernels import _native

        entries = ctypes.CDLL(str(NATIVE_LIBRARY)).specdec_cpu_entries
        entries.restype = ctypes.c_void_p
        _native.connect(
            tensor=Tensor,
            exchange=Tensor.__dlpack_c_exchange_api__,
            entries=entries(),
            off=validate.scalars(1.0, None, None, None),
            results=(Verified, VerifiedTree, Sample, DrawnChildren),
        )
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError):
        return _DISPATCHED  # another Python, or an older PyTorch
    return Straight(_native.verify_chain, _native.verify_tree, _native.sample, _native.sample_children)


_DIRECT = _DISPATCHED if BACKENDS["cpu"].reason else _directly()

#: As what the backends in C++ may be asked for, on the devices they run on.
_TAKEN: dict[str, tuple[str | None, ...]] = {
    backend.name: (None, backend.name)
    for backend in (BACKENDS["cpu"], BACKENDS["cuda"])
    if not backend.reason and backend.device == backend.name
}

# Names of this module: each dot is another dictionary, which no cache holds when a step has just read a model. For the
# same reason it is not `is_compiling`, which asks the scripts of TorchScript first; tracers other than Dynamo hand over
# tensors of their own, or watch what is dispatched.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_on_cpu = _TAKEN.get("cpu", ())


def straight_to(backend: str | None, logits: object) -> Straight | None:
    """What may be called straight away for such logits, if anything."""
    if type(logits) is not Tensor or _is_compiling():
        return None
    if not logits.is_cpu:
        return _DISPATCHED if backend in _TAKEN.get(logits.device.type, ()) else None
    if backend not in _on_cpu:
        return None
    return _DISPATCHED if _dispatch_modes() or profiler._is_profiler_enabled else _DIRECT
