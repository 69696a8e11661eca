"""Compile what is promised: the kernels under every Triton, the C++ against every torch, by every compiler and for
every Python.

    make versions                                        # when a version is raised; the log: bench/results/versions.txt
    python tests/helpers/versions.py --only "torch 2.15" # the parts whose version or name has it

It is done in parts, one file or call under one version each, side by side. What each found is kept in
build/versions/found.jsonl as long as its sources stay the same, so that a second start goes on where the first one
ended. What pip unpacks there is 6 GB. Of torch it takes the wheels for macOS, which have the same headers and are a
tenth of the size.

A compiler or a Python that is not here is not checked, and the log says so. `tests/helpers/compilers.sh` brings those
that Debian 12 has not; pyenv's Pythons are found where they lie.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "versions"
FOUND = CACHE / "found.jsonl"
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
COMPILERS = (*(f"g++-{n}" for n in range(11, 17)), *(f"clang++-{n}" for n in range(14, 24)))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
FOR_MACOS = ("--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64", "--python-version=3.12")
#: Seconds that a part may take.
LIMIT = 1800
_UNPACKING = threading.Lock()


def unpacked(package: str, version: str, *options: str) -> Path:
    """The folder that has the package, and nothing that it needs."""
    folder = CACHE / f"{package}-{version}"
    with _UNPACKING:
        if not folder.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            options = (
                "--no-compile", "--only-binary=:all:", *options, f"--target={folder}.new", f"{package}=={version}"
            )  # fmt: skip
            shutil.rmtree(f"{folder}.new", ignore_errors=True)
            # A machine may keep torch below some version for what is installed on it, which this is not.
            run([*pip, *options], env={**os.environ, "PIP_CONSTRAINT": os.devnull})
            Path(f"{folder}.new").rename(folder)
    return folder


def run(command: list[Any], **named: Any) -> str:
    """Its output; an error with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT, **named)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return done.stdout


def compiling(*arguments: Any, triton: Path | None = None, **environment: str) -> str:
    """What Python prints under the Triton in a folder. Not forked: a process that interprets does so to its end."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    if triton:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), *filter(None, [environment.get("PYTHONPATH")])])
    return run([sys.executable, *map(str, arguments)], env=environment)


def kernels(*arguments: str, triton: Path | None = None) -> list[Any]:
    """What `triton_code.py` prints under the Triton in a folder."""
    said = compiling(Path(__file__).with_name("triton_code.py"), *arguments, triton=triton)
    return [json.loads(line) for line in said.splitlines()]


def flaws(found: list[dict[str, Any]]) -> list[str]:
    """Kernels that spill registers in loops, or load less than 16 bytes at a time where rows are read."""
    wrong = []
    for each in found:
        name = f"{each['call']}: {each['kernel']} on {each['target']}"
        if each["spills"]:
            wrong.append(f"{name} spills by {each['spills']} instructions in loops")
        rows = each["kernel"].startswith(("sample", "verify", "head", "tree_attention"))
        if each["target"].startswith("sm_") and rows and each["widest_load_bits"] != 128:
            wrong.append(f"{name} loads {each['widest_load_bits']} bits")
    return wrong


@cache
def read_by(source: Path) -> frozenset[Path]:
    """A file, and the headers of this tree that it includes, which may include each other."""
    found, ahead = set(), [source]
    while ahead:
        if (file := ahead.pop()) not in found and file.is_file():
            found.add(file)
            ahead += [(file.parent / name).resolve() for name in re.findall(r'#include "(.*)"', file.read_text())]
    return frozenset(found)


def sees_torch(source: Path) -> bool:
    """Whether a file, or a header of this tree that it includes, includes one of torch."""
    return any("#include <torch/" in each.read_text() for each in read_by(source))


def sources() -> list[Path]:
    """The C++."""
    return sorted(ROOT.glob("csrc/*/*.cpp"))


def includes(python: str) -> list[str]:
    """Folders of the headers of a Python, and of pybind11."""
    import pybind11

    code = "import sysconfig; print(sysconfig.get_path('include'))"
    return [pybind11.get_include(), run([python, "-c", code]).strip()]


def compile_cpp(compiler: str, torch: Path, source: Path, *options: str, python: str = sys.executable) -> None:
    """Every warning is an error."""
    import pybind11

    name = str(source.relative_to(ROOT))
    stand_in = source.with_suffix("")  # a folder of headers in place of CUDA's
    cuda = stand_in if stand_in.is_dir() else Path(pybind11.__file__).parent.parent / "nvidia" / "cu13" / "include"
    sets = {"avx512": "avx512f avx512bw avx512dq avx512vl fma f16c", "avx2": "avx2 fma f16c", "stream": "avx2"}
    machine = next((names for unit, names in sets.items() if unit in name), "")
    include = [*includes(python), torch / "include", torch / "include/torch/csrc/api/include", cuda]
    # As in CMakeLists.txt: headers of older gcc leave registers unset, where it does not matter what is in them.
    without = ("uninitialized", "maybe-uninitialized") if "avx512" in name and compiler.startswith("g++") else ()
    defined = ["TORCH_TARGET_VERSION=0x020a000000000000ULL"]
    if "native" in name:  # it has nothing of torch but names of dtypes
        defined = ['SPECDEC_COMPILER=""', 'SPECDEC_TORCH=""', "SPECDEC_SANITIZED=false"]
    run(
        [compiler, "-std=c++20", *options, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
        + [f"-Wno-{each}" for each in without]
        + [f"-m{name}" for name in machine.split()]
        + [f"-D{each}" for each in defined]
        + [f"-isystem{folder}" for folder in include]
        + [name]
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


def python_of(version: str) -> str | None:
    """A Python of a version, on the path or among those of pyenv."""
    own = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python{version}"))
    for found in (shutil.which(f"python{version}"), *map(str, own)):
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    return None


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One thing to check under one version."""

    version: str
    name: str
    reads: Iterable[Path]
    """The files it depends on."""
    check: Callable[[], Any]
    """Gives what it found, which JSON can hold; raises where that is wrong."""

    @property
    def key(self) -> str:
        return f"{self.version}: {self.name} of {fingerprint(self.reads)}"


def fingerprint(files: Iterable[Path]) -> str:
    """Of files as they are now."""
    contents = (str(path).encode() + path.read_bytes() for path in sorted(files))
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def matching(*patterns: str) -> list[Path]:
    """The files of patterns, but for what Python compiled."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return [path for path in found if path.is_file() and path.suffix != ".pyc"]


def under_triton(version: str) -> Iterator[Part]:
    """A part a call of a kernel."""

    def check(call: str) -> list[dict[str, Any]]:
        found = kernels("sm_90", "--calls", call, triton=unpacked("triton", version))
        wrong = flaws(found)
        assert not wrong, "; ".join(wrong)
        return found

    reads = matching("triton_kernels/*", "tests/helpers/triton_code.py", "tests/helpers/budget.py")
    for call in kernels("--list"):
        yield Part(f"triton {version}", call, reads, lambda call=call: check(call))


def against_torch(version: str, compilers: Iterable[str]) -> Iterator[Part]:
    """A part a file and compiler, and one for the symbols of the libraries that are built."""

    def check(compiler: str, source: Path) -> None:
        compile_cpp(compiler, unpacked("torch", version, *FOR_MACOS) / "torch", source, "-fsyntax-only")

    def has_all() -> None:
        missing = missing_symbols(unpacked("torch", version, *FOR_MACOS) / "torch")
        assert not missing, f"it has not {missing}"

    for compiler, source in product(compilers, filter(sees_torch, sources())):
        name = f"{source.relative_to(ROOT)} by {compiler}"
        yield Part(f"torch {version}", name, read_by(source), lambda c=compiler, s=source: check(c, s))
    yield Part(f"torch {version}", "symbols", matching("specdec_kernels/lib/*.so"), has_all)


def by_compiler(compiler: str) -> Iterator[Part]:
    """A part a file."""

    def check(source: Path) -> None:
        torch = unpacked("torch", TORCHES[0], *FOR_MACOS) / "torch"
        compile_cpp(compiler, torch, source, "-O1", "-c", "-o", os.devnull)

    for source in sources():
        name = str(source.relative_to(ROOT))
        yield Part(compiler, name, read_by(source), lambda source=source: check(source))


def for_python(version: str, python: str) -> Iterator[Part]:
    """Its syntax; and the module that is compiled for one Python alone, loaded."""
    files = matching(*(f"{folder}/**/*.py" for folder in ("specdec_kernels", "triton_kernels", "bench")))
    module = matching("csrc/native/*.cpp")

    def parses() -> int:
        program = "import ast, pathlib, sys\nfor name in sys.argv[1:]: ast.parse(pathlib.Path(name).read_text())"
        run([python, "-W", "error", "-c", program, *files])
        return len(files)

    def loads() -> None:
        torch = unpacked("torch", TORCHES[0], *FOR_MACOS) / "torch"
        with tempfile.TemporaryDirectory() as folder:
            objects = []
            for source in module:
                objects.append(f"{folder}/{source.stem}.o")
                compile_cpp("c++", torch, source, "-O1", "-c", "-o", objects[-1], python=python)
            run(["c++", "-shared", *objects, "-o", f"{folder}/_native.so"])
            program = "import sys; sys.path.insert(0, sys.argv[1]); import _native; _native.build_facts()"
            run([python, "-c", program, folder])

    yield Part(f"python {version}", "syntax", files, parses)
    yield Part(f"python {version}", "native module", frozenset().union(*map(read_by, module)), loads)


def everything() -> dict[str, list[Part]]:
    """The parts of every version; none where it is not here."""
    here = [compiler for compiler in COMPILERS if shutil.which(compiler)]
    oldest = [next(each for each in here if each.startswith(kind)) for kind in ("g++", "clang++")]
    parts: dict[str, Iterable[Part]] = {f"triton {version}": under_triton(version) for version in TRITONS}
    parts |= {f"torch {version}": against_torch(version, oldest) for version in TORCHES}
    parts |= {compiler: by_compiler(compiler) if compiler in here else () for compiler in COMPILERS}
    pythons = {version: python_of(version) for version in PYTHONS}
    parts |= {f"python {version}": for_python(version, found) if found else () for version, found in pythons.items()}
    return {version: list(own) for version, own in parts.items()}


def said(version: str, found: dict[str, Any]) -> str:
    """What the parts of a version found, by their names, in one line."""
    kind = version.split()[0]
    if kind == "triton":
        all_kernels = [each for of_call in found.values() for each in of_call]
        largest = max(each["instructions"] for each in all_kernels)
        return (
            f"{len(all_kernels)} kernels for sm_90: no spills in loops, loads of 16 bytes, {largest:,} instructions in "
            "the largest"
        )
    if kind == "torch":
        by = sorted({name.rpartition(" by ")[2] for name in found if " by " in name})
        files = len({name.partition(" by ")[0] for name in found if " by " in name})
        symbols = "; it has all that the libraries built here ask for" if "symbols" in found else ""
        return f"{files} files with its headers pass {' and '.join(by)}{symbols}"
    if kind == "python":
        return f"{found.get('syntax', 'no')} files parse; the native module compiles and loads"
    return f"{len(found)} files compile, with torch {TORCHES[0]}"


def main() -> int:
    """Print a line a version; whether a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", help="parts whose version or name has this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="side by side")
    options = parser.parse_args()
    wanted = everything()
    parts = [part for own in wanted.values() for part in own if options.only in f"{part.version}: {part.name}"]
    CACHE.mkdir(parents=True, exist_ok=True)
    known = dict(json.loads(line) for line in FOUND.read_text().splitlines()) if FOUND.is_file() else {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool, FOUND.open("a") as file:
        running = {pool.submit(part.check): part for part in parts if part.key not in known}
        for count, done in enumerate(as_completed(running), 1):
            part = running[done]
            try:
                known[part.key] = done.result()
                print(json.dumps([part.key, known[part.key]]), file=file, flush=True)
            except (RuntimeError, AssertionError, OSError, subprocess.TimeoutExpired) as error:
                failed[part.key] = str(error)
            how = "FAILS" if part.key in failed else "done"
            print(f"{count} of {len(running)}: {part.version}: {part.name}: {how}", file=sys.stderr, flush=True)
    print(run(["git", "log", "-1", "--format=Of revision %h, %cs:"]).strip())
    for version, own in wanted.items():
        own = [part for part in own if part in parts]
        wrong = [f"FAILS: {part.name}: {failed[part.key]}" for part in own if part.key in failed]
        if wrong or own:
            print(f"{version}: {'; '.join(wrong) or said(version, {part.name: known[part.key] for part in own})}")
        elif not wanted[version]:
            print(f"{version}: not here, not checked")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
