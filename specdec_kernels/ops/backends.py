"""Which implementations can run here, and why the others cannot."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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


def _native(name: str, device: str, detail: str, library: Path, needs: str, namespace: str = "specdec") -> Backend:
    """One in C++, if its library can be loaded."""
    if not library.is_file():
        return Backend(name, device, f"{library.name} was not built ({needs})")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return Backend(name, device, f"{library.name} does not load: {error}")
    functions = {op: getattr(getattr(torch.ops, namespace), op).default for op in _NATIVE_OPS}
    return Backend(name, device, "", detail, functions, library)


def _reference() -> Backend:
    return Backend("reference", "any", "", "PyTorch, float64", {op: getattr(reference, op) for op in OPS})


def _cpu() -> Backend:
    made = _native("cpu", "cpu", "", NATIVE_LIBRARY, "pip install -e .")
    if made.reason:
        return made
    isa = ctypes.CDLL(str(NATIVE_LIBRARY)).specdec_cpu_isa
    isa.restype = ctypes.c_char_p
    return replace(made, detail=f"C++, {isa().decode()}")


def _has_gpu() -> bool:
    """Whether there is one, asked without CUDA: what has started CUDA can no longer fork, as servers do."""
    return torch.cuda.device_count() > 0


def _cuda() -> Backend:
    """For tests SPECDEC_EMULATE_CUDA runs the same programs on the CPU: 1 by one thread a block, "threads" by many."""
    emulated = os.environ.get("SPECDEC_EMULATE_CUDA", "")
    suffixes = {"": "", "1": "_emulated", "threads": "_emulated_threads"}
    if emulated not in suffixes:
        return Backend("cuda", "cuda", f"SPECDEC_EMULATE_CUDA must be 1 or threads, got {emulated!r}")
    library = NATIVE_LIBRARY.with_name(f"libspecdec_cuda{suffixes[emulated]}.so")
    if emulated:
        _LIBRARIES.append(define("specdec_emulated", _NATIVE_OPS))
        needs = "it is for tests, which need a checkout: pip install -e ."
        return _native("cuda", "cpu", "CUDA C++, emulated", library, needs, "specdec_emulated")
    if torch.version.hip is not None:  # the library would answer for the device all the same
        return Backend("cuda", "cuda", "this PyTorch is for AMD's GPUs")
    made = _native("cuda", "cuda", "CUDA C++", library, "it takes nvcc")
    return made if made.reason or _has_gpu() else replace(made, reason="there is no GPU")


def _triton() -> Backend:
    try:
        import triton

        detail, interpreted = f"triton {triton.__version__}", bool(triton.knobs.runtime.interpret)
        if not interpreted and not _has_gpu():
            reason = "there is no GPU, and TRITON_INTERPRET=1 was not set before the import of specdec_kernels"
            return Backend("triton", "cuda", reason, detail)
        kernels = importlib.import_module("specdec_kernels.triton_kernels")
    except Exception as error:  # whatever a package raises that fits neither this Python nor this torch nor the kernels
        why = f"triton or its kernels do not load: {error} (pip install 'specdec-kernels[gpu]' brings one that does)"
        return Backend("triton", "cuda", why)
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
