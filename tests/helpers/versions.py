"""Compile what is promised: the kernels under every Triton, the C++ against every torch and by every compiler.

    make versions  # when a version is raised; the log goes to bench/results/versions.txt

What pip unpacks, below build/versions, is 6 GB. Of torch it takes the wheels for macOS, which have the same
headers and are a tenth of the size.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "versions"
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
COMPILERS = (*(f"g++-{n}" for n in range(11, 16)), *(f"clang++-{n}" for n in range(14, 24)))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
FOR_MACOS = ("--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64", "--python-version=3.12")
#: What sees torch's headers.
WITH_TORCH = (
    "csrc/cpu/ops.cpp", "csrc/cpu/tree_ops.cpp", "csrc/cpu/feature_ops.cpp", "csrc/cuda/ops.cpp",
    "csrc/cuda/emulated.cpp", "csrc/native/module.cpp", "csrc/native/fast_path.cpp", "csrc/bench/stream.cpp",
)  # fmt: skip


def unpacked(package: str, version: str, *options: str) -> Path:
    """The folder that has the package, and nothing that it needs."""
    folder = CACHE / f"{package}-{version}"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ("--no-compile", "--only-binary=:all:", *options, f"--target={folder}.new", f"{package}=={version}")
        shutil.rmtree(f"{folder}.new", ignore_errors=True)
        run([*pip, *options])
        Path(f"{folder}.new").rename(folder)
    return folder


def run(command: list[Any], **named: Any) -> str:
    """Its output; an error with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **named)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return done.stdout


def kernels(*arguments: str, triton: Path | None = None) -> list[dict[str, Any]]:
    """What :mod:`specdec_kernels.triton_kernels.compile` prints under the Triton in a folder; in a process of its own,
    which interprets nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if triton:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "specdec_kernels.triton_kernels.compile", *arguments]
    return [json.loads(line) for line in run(command, env=environment).splitlines()]


def flaws(found: list[dict[str, Any]]) -> list[str]:
    """Kernels that spill, or load less than 16 bytes at a time where rows are read."""
    wrong = []
    for each in found:
        name = f"{each['call']}: {each['kernel']} on {each['target']}"
        if each["spills"]:
            wrong.append(f"{name} spills")
        rows = each["kernel"].startswith(("sample", "verify", "head", "tree_attention"))
        if each["target"].startswith("sm_") and rows and each["widest_load_bits"] != 128:
            wrong.append(f"{name} loads {each['widest_load_bits']} bits")
    return wrong


def compile_cpp(compiler: str, torch: Path, source: str, *options: str) -> None:
    """Every warning is an error, and nothing is kept."""
    import pybind11

    cuda = Path(pybind11.__file__).parent.parent / "nvidia" / "cu13" / "include"
    sets = {"avx512": "avx512f avx512bw avx512dq avx512vl fma f16c", "avx2": "avx2 fma f16c", "stream": "avx2"}
    machine = next((names for unit, names in sets.items() if unit in source), "")
    python = run([sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"]).strip()
    include = [pybind11.get_include(), torch / "include", torch / "include/torch/csrc/api/include", python, cuda]
    defined = ["TORCH_TARGET_VERSION=0x020a000000000000ULL"]
    if "native" in source:  # it has nothing of torch but names of dtypes
        defined = ['SPECDEC_COMPILER=""', 'SPECDEC_TORCH=""', "SPECDEC_SANITIZED=false"]
    run(
        [compiler, "-std=c++20", *options, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
        + [f"-m{name}" for name in machine.split()]
        + [f"-D{each}" for each in defined]
        + [f"-isystem{folder}" for folder in include]
        + [source]
    )


def missing_symbols(torch: Path) -> list[str]:
    """What the libraries that are built here ask for, and this torch has not."""
    exported = b"".join(each.read_bytes() for each in (torch / "lib").glob("libtorch_cpu.*"))
    needed = set()
    for library in (ROOT / "specdec_kernels" / "lib").glob("*.so"):
        listed = run(["nm", "--dynamic", "--undefined-only", library])
        needed |= set(re.findall(r" U ((?:aoti_)?torch_\w+)$", listed, re.M))
    assert needed, "the libraries were not built"
    return sorted(name for name in needed if name.encode() not in exported)


def checks() -> Iterator[tuple[str, Any]]:
    """(what, a function that raises where it fails and else says what was seen)."""

    def under(version: str) -> str:
        found = kernels("sm_90", triton=unpacked("triton", version))
        assert not flaws(found), "; ".join(flaws(found))
        largest = max(each["instructions"] for each in found)
        return f"{len(found)} kernels for sm_90: no spills, loads of 16 bytes, {largest:,} instructions in the largest"

    def against(version: str) -> str:
        torch = unpacked("torch", version, *FOR_MACOS) / "torch"
        for compiler, source in itertools.product(oldest, WITH_TORCH):
            compile_cpp(compiler, torch, source, "-fsyntax-only")
        missing = missing_symbols(torch)
        assert not missing, f"it has not {missing}"
        names = " and ".join(oldest)
        return (
            f"{len(WITH_TORCH)} files with its headers pass {names}; it has all that the libraries built here ask for"
        )

    def by(compiler: str) -> str:
        torch = unpacked("torch", TORCHES[0], *FOR_MACOS) / "torch"
        sources = [str(each.relative_to(ROOT)) for each in sorted(ROOT.glob("csrc/*/*.cpp"))]
        for source in sources:
            compile_cpp(compiler, torch, source, "-O1", "-c", "-o", os.devnull)
        return f"{len(sources)} files compile, with torch {TORCHES[0]}"

    def with_python(version: str) -> str:
        program = "import ast, pathlib, sys\nfor name in sys.argv[1:]: ast.parse(pathlib.Path(name).read_text())"
        files = [
            each for folder in ("specdec_kernels", "triton_kernels", "bench") for each in ROOT.glob(f"{folder}/**/*.py")
        ]
        run([f"python{version}", "-W", "error", "-c", program, *files])
        return f"{len(files)} files parse"

    for version in TRITONS:
        yield f"triton {version}", lambda version=version: under(version)
    here = [compiler for compiler in COMPILERS if shutil.which(compiler)]
    oldest = [next(each for each in here if each.startswith(kind)) for kind in ("g++", "clang++")]
    for version in TORCHES:
        yield f"torch {version}", lambda version=version: against(version)
    for compiler in COMPILERS:
        yield compiler, (lambda compiler=compiler: by(compiler)) if compiler in here else None
    for version in PYTHONS:
        found = shutil.which(f"python{version}")
        yield f"python {version}", (lambda version=version: with_python(version)) if found else None


def main() -> int:
    """Print a line a check; whether one failed."""
    failed = False
    for name, check in checks():
        try:
            said = check() if check else "not here, not checked"
        except (RuntimeError, AssertionError) as error:
            failed, said = True, f"FAILS: {error}"
        print(f"{name}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
