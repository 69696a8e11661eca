"""Which implementations can run here, and why the others cannot."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from specdec_kernels import reference
from specdec_kernels.ops.schema import LIBRARY, define

#: SPECDEC_LIBRARY names another build, such as one with sanitizers.
NATIVE_LIBRARY = Path(
    os.environ.get("SPECDEC_LIBRARY", Path(__file__).resolve().parent.parent / "lib" / "libspecdec_cpu.so")
)
BackendName = Literal["reference", "cpu", "cuda", "triton"]
#: What the C++ has, on CPUs and on GPUs; matrix products it leaves to PyTorch's own kernels and to Triton.
_NATIVE_OPS = ("verify_chain", "verify_tree", "sample", "sample_children", "noise_words", "tree_mask", "compact_kv")
OPS = (*_NATIVE_OPS, "tree_attention")
#: What has to outlive the operators it defines.
_LIBRARIES: list[torch.library.Library] = []


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops. ``reason`` says why it cannot run, empty if it can."""

    name: str
    device: str
    reason: str
    detail: str = ""
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    library: Path | None = None
    """Of a backend in C++."""

    def require(self, device: torch.device) -> None:
        """Raise with the reason when this backend cannot run on ``device``."""
        if self.reason:
            raise RuntimeError(f"backend={self.name!r} cannot run here: {self.reason}")
        if self.device not in ("any", device.type):
            raise RuntimeError(f"backend={self.name!r} needs tensors on {self.device}, got tensors on {device}")


def _operators(namespace: Any) -> dict[str, Callable[..., Any]]:
    return {op: getattr(namespace, op).default for op in _NATIVE_OPS}


def _reason(library: Path, needs: str) -> str:
    """Load a library; why it does not, if so."""
    if not library.is_file():
        return f"{library.name} was not built ({needs})"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return ""


def _reference() -> Backend:
    return Backend("reference", "any", "", "PyTorch, float64", {op: getattr(reference, op) for op in OPS})


def _cpu() -> Backend:
    if reason := _reason(NATIVE_LIBRARY, "pip install -e ."):
        return Backend("cpu", "cpu", reason)
    isa = ctypes.CDLL(str(NATIVE_LIBRARY)).specdec_cpu_isa
    isa.restype = ctypes.c_char_p
    return Backend("cpu", "cpu", "", f"C++, {isa().decode()}", _operators(torch.ops.specdec), NATIVE_LIBRARY)


def _has_gpu() -> bool:
    """Whether there is one, asked without CUDA: what has started CUDA can no longer fork, as servers do."""
    return torch.cuda.device_count() > 0


def _cuda() -> Backend:
    """For tests SPECDEC_EMULATE_CUDA runs the same programs on the CPU: 1 by one thread a block, "threads" by many."""
    emulated = os.environ.get("SPECDEC_EMULATE_CUDA", "")
    suffixes = {"": "", "1": "_emulated", "threads": "_emulated_threads"}
    if emulated not in suffixes:
        return Backend("cuda", "cuda", f"SPECDEC_EMULATE_CUDA must be 1 or threads, got {emulated!r}")
    if not emulated and torch.version.hip is not None:  # the library would answer for the device all the same
        return Backend("cuda", "cuda", "this PyTorch is for AMD's GPUs")
    library = NATIVE_LIBRARY.with_name(f"libspecdec_cuda{suffixes[emulated]}.so")
    if emulated:
        _LIBRARIES.append(define("specdec_emulated", _NATIVE_OPS))
    if reason := _reason(
        library, "it is for tests, which need a checkout: pip install -e ." if emulated else "it takes nvcc"
    ):
        return Backend("cuda", "cuda", reason)
    if emulated:
        return Backend("cuda", "cpu", "", "CUDA C++, emulated", _operators(torch.ops.specdec_emulated), library)
    reason = "" if _has_gpu() else "there is no GPU"
    return Backend("cuda", "cuda", reason, "CUDA C++", _operators(torch.ops.specdec), library)


def _triton() -> Backend:
    try:
        import triton
    except Exception as error:  # whatever a package raises that fits neither this Python nor this torch
        why = f"triton does not load: {error} (pip install 'specdec-kernels[gpu]' brings one that does)"
        return Backend("triton", "cuda", why)
    detail = f"triton {triton.__version__}"
    interpreted = bool(triton.knobs.runtime.interpret)
    if not interpreted and not _has_gpu():
        reason = "there is no GPU, and TRITON_INTERPRET=1 was not set before the import of specdec_kernels"
        return Backend("triton", "cuda", reason, detail)
    try:
        kernels = importlib.import_module("specdec_kernels.triton_kernels")
    except Exception as error:  # whatever another version of Triton raises
        return Backend("triton", "cuda", f"its kernels do not load: {error}", detail)
    functions = {op: getattr(kernels, op) for op in OPS}
    if interpreted:
        return Backend("triton", "cpu", "", f"{detail}, interpreted", functions)
    taken = _NATIVE_OPS if not BACKENDS["cuda"].reason and BACKENDS["cuda"].device == "cuda" else ()
    for op in set(OPS).difference(taken):
        LIBRARY.impl(op, functions[op], "CUDA")
    return Backend("triton", "cuda", "", detail, functions)


BACKENDS: dict[str, Backend] = {}
for _made in (_reference, _cpu, _cuda, _triton):  # Triton leaves CUDA tensors to the CUDA C++ where that has the op
    _backend = _made()
    BACKENDS[_backend.name] = _backend

_DISPATCHED: dict[str, Callable[..., Any]] = {op: getattr(torch.ops.specdec, op).default for op in OPS}


def function(op: str, backend: str | None, device: torch.device) -> Callable[..., Any]:
    """The implementation of an op: the dispatcher's choice for ``None``, else exactly the requested one."""
    if backend is None:
        return _DISPATCHED[op]
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {sorted(BACKENDS)}, got {backend!r}")
    BACKENDS[backend].require(device)
    if op not in BACKENDS[backend].functions:
        raise RuntimeError(f"backend={backend!r} has no {op}: backend=None takes the one that has")
    return BACKENDS[backend].functions[op]
