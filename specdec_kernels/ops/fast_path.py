"""Calls of operators that check their arguments once, in C++, and not in Python.

The C++ (csrc/native/fast_path.cpp) refuses what it could not read as it is, so the functions that draw and verify may
pass it their arguments at once. Where it returns None, Python checks: it says what is wrong, or brings it into shape
and calls again. What C++ does not take even so goes through PyTorch's dispatcher, which takes as long to start as a row
to read.

Triton's launchers are in Python; there the C++ checks, and makes the results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from specdec_kernels.ops.backends import BACKENDS, Backend, function
from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree

#: What the operators return that can be called so, in the order of `_native.connect`.
_RESULTS = {"verify_chain": Verified, "verify_tree": VerifiedTree, "sample": Sample, "sample_children": DrawnChildren}

#: By operator, with the arguments of its schema (`schema.py`). None where one is not accepted as it is.
Functions = dict[str, Callable[..., Any]]


def connect(entries: int, device: str, results_by_torch: bool) -> Functions:
    """The functions of a library by the address of its entries; 0: they check, and return results yet to be written."""
    from specdec_kernels import _native

    functions = _native.connect(entries, device == "cuda", results_by_torch, tuple(_RESULTS.values()))
    return dict(zip(_RESULTS, functions, strict=True))


def connected(backend: Backend) -> Functions:
    """What a backend offers, where its library, this Python and this PyTorch have what it takes."""
    try:
        if backend.library is None:
            checks = connect(0, backend.device, True)
            return {op: _launching(check, backend.functions[op]) for op, check in checks.items()}
        entries = ctypes.CDLL(str(backend.library)).specdec_entries
        entries.restype = ctypes.c_void_p
        return connect(entries(), backend.device, backend.name == "cuda")
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError):
        return {}  # another Python, an older PyTorch, or a library for tests


def _launching(check: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    """Of a launcher in Python, which has the arguments of the operator."""

    def call(*arguments: Any) -> Any:
        out = check(*arguments)
        if out is not None:
            launch(*arguments, out=out)
        return out

    return call


_on_cpu: dict[str | None, Functions] = {}
_on_cuda: dict[str | None, Functions] = {}
for _name in ("cuda", "triton", "cpu"):
    if not (_backend := BACKENDS[_name]).reason:
        (_on_cpu if _backend.device == "cpu" else _on_cuda)[_name] = connected(_backend)
# Whom the dispatcher would choose.
_on_cpu[None] = _on_cpu.get("cpu", {})
_on_cuda[None] = next(iter(_on_cuda.values()), {})

# Names of this module: each dot is another dictionary. It is not `is_compiling`, which asks the scripts of TorchScript
# first; tracers other than Dynamo pass tensors of their own, or watch what is dispatched.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def try_fast_path(op: str, backend: str | None, arguments: tuple[Any, ...]) -> Any:
    """What an operator returns that is called at once, if it can be: not where somebody watches what is dispatched."""
    logits = arguments[0]
    if type(logits) is not Tensor or _is_compiling() or _dispatch_modes() or profiler._is_profiler_enabled:
        return None
    functions = (_on_cpu if logits.is_cpu else _on_cuda if logits.is_cuda else {}).get(backend)
    return functions[op](*arguments) if functions else None


def call(op: str, backend: str | None, arguments: tuple[Any, ...]) -> Any:
    """What an operator returns of arguments that were checked."""
    made = try_fast_path(op, backend, arguments)
    return _RESULTS[op](*function(op, backend, arguments[0].device)(*arguments)) if made is None else made
