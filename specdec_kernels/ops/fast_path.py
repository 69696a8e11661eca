"""Calls of operators that check their arguments once, in C++, and not in Python.

The C++ (csrc/native/fast_path.cpp) refuses what it could not read as it is, so the functions that draw and verify may
pass it their arguments at once. Where it returns None, Python checks: it says what is wrong, or brings it into shape
and goes through PyTorch's dispatcher, which takes as long to start as a row to read.

Triton's launchers are in Python; there the C++ checks, and makes the results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler

from specdec_kernels.ops.backends import BACKENDS, Backend
from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree


class FastPath(NamedTuple):
    """The operators, with the arguments of their schemas (`schema.py`). None where an argument is not one that they
    accept as it is."""

    verify_chain: Callable[..., Verified | None]
    verify_tree: Callable[..., VerifiedTree | None]
    sample: Callable[..., Sample | None]
    sample_children: Callable[..., DrawnChildren | None]


def connect(entries: int, device: str, results_by_torch: bool) -> FastPath:
    """The functions of a library by the address of its entries; 0: they check, and return results yet to be written."""
    from specdec_kernels import _native

    functions = _native.connect(
        tensor=Tensor,
        exchange=Tensor.__dlpack_c_exchange_api__,
        entries=entries,
        on_cuda=device == "cuda",
        results=(Verified, VerifiedTree, Sample, DrawnChildren),
        empty_strided=torch.empty_strided if results_by_torch else None,
        dtypes=(torch.int64, torch.int32, torch.bool, torch.float32),
    )
    return FastPath(*functions)


def connected(backend: Backend) -> FastPath | None:
    """What a backend offers, where its library, this Python and this PyTorch have what it takes."""
    try:
        if backend.library is None:
            return _launching(connect(0, backend.device, True), backend.functions)
        entries = ctypes.CDLL(str(backend.library)).specdec_entries
        entries.restype = ctypes.c_void_p
        return connect(entries(), backend.device, backend.name == "cuda")
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError):
        return None  # another Python, an older PyTorch, or a library for tests


def _launching(checked: FastPath, launchers: dict[str, Callable[..., Any]]) -> FastPath:
    """Of launchers in Python, which have the arguments of the operators."""

    def launched(check: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            out = check(*arguments)
            if out is not None:
                launch(*arguments, out=out)
            return out

        return call

    return FastPath(*(launched(getattr(checked, op), launchers[op]) for op in FastPath._fields))


_PATHS: dict[str, dict[str | None, FastPath | None]] = {"cpu": {}, "cuda": {}}
for _name in ("cuda", "triton", "cpu"):
    if not (_backend := BACKENDS[_name]).reason:
        _PATHS[_backend.device][_name] = connected(_backend)
# Whom the dispatcher would choose.
_PATHS["cpu"][None] = _PATHS["cpu"].get("cpu")
_PATHS["cuda"][None] = next(iter(_PATHS["cuda"].values()), None)

# Names of this module: each dot is another dictionary. It is not `is_compiling`, which asks the scripts of TorchScript
# first; tracers other than Dynamo pass tensors of their own, or watch what is dispatched.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_on_cpu, _on_cuda = _PATHS["cpu"], _PATHS["cuda"]


def find_fast_path(backend: str | None, logits: object) -> FastPath | None:
    """What may be called at once for such logits, if anything: not where somebody watches what is dispatched."""
    if type(logits) is not Tensor or _is_compiling() or _dispatch_modes() or profiler._is_profiler_enabled:
        return None
    if logits.is_cpu:
        return _on_cpu.get(backend)
    return _on_cuda.get(backend) if logits.is_cuda else None
