"""The Python files of other stacks without their dependencies: some modules as they are, stubs for what they import.

``make peers`` fetches the files; without them, the tests that are held against them are skipped.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import triton
import triton.language as tl

from specdec_kernels.integrations import sglang, vllm

FOLDER = Path(os.environ.get("SPECDEC_PEERS") or Path.home() / ".cache" / "specdec-peers")


#: The releases that the plugins were written against.
RELEASES = {"vllm": vllm.VERSIONS[-1], "sglang": sglang.VERSIONS[-1]}


def folder(package: str) -> Path:
    """Where the files of ``package`` lie, or would."""
    return FOLDER / f"{package}-{RELEASES[package]}"


def files(package: str) -> Path:
    """The folder that holds ``package``; skips the test where its release is not there."""
    root = folder(package)
    if not root.is_dir():
        pytest.skip(f"{root} is not there: `make peers` fetches it")
    return root


def fetch(package: str) -> None:
    """Download a release without its dependencies and keep its Python files."""
    with tempfile.TemporaryDirectory() as folder:
        release = f"{package}=={RELEASES[package]}"
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, release], check=True)
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder(package), [name for name in archive.namelist() if name.endswith(".py")])


@triton.jit
def _log1p(x):
    return tl.log(1.0 + x)


#: What stands for Triton's libdevice, which does not run in the interpreter.
LIBDEVICE = types.ModuleType("libdevice")
vars(LIBDEVICE)["log1p"] = _log1p


class _Stub(types.ModuleType):
    """Any name is a class without content, good for an annotation or a base; so is any module below."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, root: Path, package: str, as_they_are: set[str], stubs: Mapping[str, Mapping[str, Any]]) -> None:
        self.root, self.package, self.as_they_are, self.stubs = root, package, as_they_are, stubs

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package and name not in self.stubs:
            return None
        if name not in self.as_they_are:
            return ModuleSpec(name, self, is_package=True)
        source = self.root.joinpath(*name.split("."))
        if source.is_dir():
            return importlib.util.spec_from_file_location(
                name, source / "__init__.py", submodule_search_locations=[str(source)]
            )
        return importlib.util.spec_from_file_location(name, source.with_suffix(".py"))

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _Stub(spec.name)
        vars(module).update(self.stubs.get(spec.name, {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


@contextlib.contextmanager
def imported(root: Path, package: str, as_they_are: set[str], stubs: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """``package`` can be imported: the modules ``as_they_are`` from ``root``, stubs with the given contents else.

    A stub outside the package stands for a dependency that is not installed.
    """
    finder = _Finder(root, package, as_they_are, stubs)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == package or name in stubs]:
            del sys.modules[name]


if __name__ == "__main__":
    for name in RELEASES:
        if not folder(name).is_dir():
            fetch(name)
