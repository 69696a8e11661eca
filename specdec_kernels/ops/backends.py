"""Which implementations can run here, why the others cannot, and how an operator is called.

The functions that draw and verify first take the fast path: C++ (csrc/native/fast_path.cpp) returns None of arguments
that it could not read as they are. Then Python says what is wrong, or brings it into shape and calls again; what is not
taken even so goes through PyTorch's dispatcher, which takes as long to start as a row to read.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from specdec_kernels import reference
from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree
from specdec_kernels.reference.schema import LIBRARY, define

#: SPECDEC_LIBRARY names another build, such as one with sanitizers.
NATIVE_LIBRARY = Path(
    os.environ.get("SPECDEC_LIBRARY", Path(__file__).resolve().parent.parent / "lib" / "libspecdec_cpu.so")
)
BackendName = Literal["reference", "cpu", "cuda", "triton"]
#: What the C++ has, on CPUs and on GPUs; matrix products it leaves to PyTorch's own kernels and to Triton.
_NATIVE_OPS = ("verify_chain", "verify_tree", "sample", "sample_children", "noise_words", "tree_mask", "compact_kv")
#: Asked without CUDA: what has started CUDA can no longer fork, as servers do.
_HAS_GPU = torch.cuda.device_count() > 0
OPS = (*_NATIVE_OPS, "tree_attention")
#: Which operator returns what, of those that have a fast path, in the order of `_native.connect`.
_OPERATORS: dict[type[Any], str] = {
    Verified: "verify_chain", VerifiedTree: "verify_tree", Sample: "sample", DrawnChildren: "sample_children"
}  # fmt: skip
Result = TypeVar("Result", Verified, VerifiedTree, Sample, DrawnChildren)
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
    """By operator, with the arguments of its schema (`reference/schema.py`)."""
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


def _cpu() -> Backend:
    made = _native("cpu", "cpu", "", NATIVE_LIBRARY, "pip install -e .")
    if made.reason:
        return made
    isa = ctypes.CDLL(str(NATIVE_LIBRARY)).specdec_cpu_isa
    isa.restype = ctypes.c_char_p
    return replace(made, detail=f"C++, {isa().decode()}")


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
    if made.reason or not _HAS_GPU:
        return replace(made, reason=made.reason or "there is no GPU")
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version := ctypes.c_int()))  # which starts nothing
    driver, own = version.value // 1000, ctypes.CDLL(str(library)).specdec_cuda_version() // 1000
    older = f"the driver is for CUDA {driver}, the library for {own}: it takes a newer driver, or an older nvcc"
    return replace(made, reason=older if driver < own else "")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher of Triton on the GPU of its first tensor: it would be the current one, which waits for no other."""

    def call(first: Any, *arguments: Any, **named: Any) -> Any:
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return launch(first, *arguments, **named)

    return call


def _triton() -> Backend:
    try:
        import triton

        detail, interpreted = f"triton {triton.__version__}", bool(triton.knobs.runtime.interpret)
        if not interpreted and not _HAS_GPU:
            reason = "there is no GPU, and TRITON_INTERPRET=1 was not set before the import of specdec_kernels"
            return Backend("triton", "cuda", reason, detail)
        kernels = importlib.import_module("specdec_kernels.triton_kernels")
    except Exception as error:  # whatever a package raises that fits neither this Python nor this torch nor the kernels
        why = f"triton or its kernels do not load: {error} (pip install 'specdec-kernels[gpu]' brings one that does)"
        return Backend("triton", "cuda", why)
    functions = {op: _on_its_device(getattr(kernels, op)) for op in OPS}
    if interpreted:
        return Backend("triton", "cpu", "", f"{detail}, interpreted", functions)
    taken = _NATIVE_OPS if not BACKENDS["cuda"].reason and BACKENDS["cuda"].device == "cuda" else ()
    for op in set(OPS).difference(taken):
        LIBRARY.impl(op, functions[op], "CUDA")
    return Backend("triton", "cuda", "", detail, functions)


_REFERENCE = {op: getattr(reference, op) for op in OPS}
BACKENDS = {"reference": Backend("reference", "any", "", "PyTorch, float64", _REFERENCE)}
for _made in (_cpu, _cuda, _triton):  # Triton leaves CUDA tensors to the CUDA C++ where that has the op
    _backend = _made()
    BACKENDS[_backend.name] = _backend


def function(op: str, backend: str | None, device: torch.device) -> Any:
    """The implementation of an op: the dispatcher's choice for ``None``, else exactly the requested one."""
    if backend is None:
        return getattr(torch.ops.specdec, op).default
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {sorted(BACKENDS)}, got {backend!r}")
    BACKENDS[backend].require(device)
    if op not in BACKENDS[backend].functions:
        raise RuntimeError(f"backend={backend!r} has no {op}: backend=None takes the one that has")
    return BACKENDS[backend].functions[op]


def connected(backend: Backend) -> dict[type[Any], Callable[..., Any]]:
    """What C++ offers of a backend, by results, where its library, this Python and this PyTorch have what it takes."""
    entries = 0  # of a backend in Python, which is called when its arguments were checked and its results made
    try:
        from specdec_kernels import _native

        if backend.library is not None:
            entries_of = ctypes.CDLL(str(backend.library)).specdec_entries
            entries_of.restype = ctypes.c_void_p
            entries = entries_of()
        by_torch = not entries or backend.name == "cuda"
        made = _native.connect(entries, backend.device == "cuda", by_torch, tuple(_OPERATORS))
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError):
        return {}  # another Python, an older PyTorch, or a library for tests
    functions = dict(zip(_OPERATORS, made, strict=True))
    if entries:
        return functions
    return {result: _launching(check, backend.functions[_OPERATORS[result]]) for result, check in functions.items()}


def _launching(check: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    """Of Triton's launchers, which have the arguments of the operators: C++ checks these, and makes the results."""

    def call(*arguments: Any) -> Any:
        out = check(*arguments)
        if out is not None:
            launch(*arguments, out=out)
        return out

    return call


#: Of each backend, and of the one that the dispatcher would choose, on a CPU (False) and on a GPU (True).
_FAST: dict[tuple[str | None, bool], dict[type[Any], Callable[..., Any]]] = {}
for _name in ("cuda", "triton", "cpu"):
    if not (_backend := BACKENDS[_name]).reason:
        _FAST[_name, _backend.device == "cuda"] = connected(_backend)
_FAST[None, False] = _FAST.get(("cpu", False), {})
_FAST[None, True] = _FAST.get(("cuda", True), _FAST.get(("triton", True), {}))

# Names of this module, since each dot costs the look-up of an attribute. Not `is_compiling`, which asks TorchScript
# first: tracers other than Dynamo are known by their class of tensors, or by their dispatch mode.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def try_fast_path(result: type[Result], backend: str | None, arguments: tuple[Any, ...]) -> Result | None:
    """Call the operator past the dispatcher. None where that cannot be done, or somebody watches what is dispatched: a
    tracer, a dispatch mode, the profiler."""
    logits = arguments[0]
    if type(logits) is not Tensor or _is_compiling() or _dispatch_modes() or profiler._is_profiler_enabled:
        return None
    functions = _FAST.get((backend, logits.is_cuda))
    made: Result | None = functions[result](*arguments) if functions else None
    return made


def call(result: type[Result], backend: str | None, arguments: tuple[Any, ...]) -> Result:
    """What an operator returns of arguments that were checked."""
    made = try_fast_path(result, backend, arguments)
    return result(*function(_OPERATORS[result], backend, arguments[0].device)(*arguments)) if made is None else made
