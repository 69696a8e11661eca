"""Run mutants: small changes of the library, each with the test that must fail of it.

    make mutants                                        # all of them
    python tests/mutants/run.py --share 0.1 --seed 7    # a random tenth
    python tests/mutants/run.py --only cache            # those whose name has it

The tables beside this file have one entry a mutant: ``name``, ``file``, what is replaced (``old``, which occurs there
once) by what (``new``), and the ``test`` that must fail. Each mutant is made in a copy of the tree, whose library is
built anew where it is C++, unless the test does that itself (``build = false``). A test that passes all the same is a
defect of the tests; one that cannot be run, and a mutant whose text is no longer there, are defects of the tables. All
three make this exit with an error.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

sys.path.append(str(Path(__file__).resolve().parent.parent / "helpers"))
from processes import FORKS

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
from build_backend import nvcc_options

ROOT = Path(__file__).resolve().parent.parent.parent
TABLES = Path(__file__).parent
#: Seconds that a test may take, on a machine that does many things at once.
LIMIT = 900
#: Files from this size on are linked.
LARGE = 1 << 19
#: At the top of the tree, what no copy needs.
UNWANTED = ("build", "dist", "demo_weights")
#: The library that a layer's C++ becomes, with what is common to all of them.
LIBRARIES = {
    "cpu": "libspecdec_cpu", "cuda": "libspecdec_cuda_emulated", "cuda_ptx": "libspecdec_cuda_ptx", "native": "_native",
}  # fmt: skip
#: What nvcc compiles, for a minute each.
NVCC = "cuda_ptx"


@dataclass(frozen=True)
class Mutant:
    """One change, and the test that must fail of it."""

    layer: str
    name: str
    file: str
    old: str
    new: str
    test: str
    build: bool = True
    """Whether a change of C++ is compiled before the test."""

    def __str__(self) -> str:
        return f"{self.layer}: {self.name}"

    @property
    def library(self) -> str:
        """The library that has to be built, if any."""
        return LIBRARIES.get(self.layer, "") if self.build else ""

    def flaw(self) -> str:
        """Why the entry says nothing; empty if it does."""
        path, (module, _, test) = ROOT / self.file, self.test.partition("::")
        if not path.is_file():
            return f"{self.file} is not there"
        if (count := path.read_text().count(self.old)) != 1:
            return f"{self.file} has its text {count} times"
        if self.old == self.new:
            return "it changes nothing"
        if not (ROOT / module).is_file() or f"def {test.partition('[')[0]}(" not in (ROOT / module).read_text():
            return f"{self.test} is not there"
        return ""


def all_mutants() -> list[Mutant]:
    """Those of all tables, in their order."""
    return [
        Mutant(table.stem, **entry)
        for table in sorted(TABLES.glob("*.toml"))
        for entry in tomllib.loads(table.read_text())["mutant"]
    ]


def chosen(share: float, seed: int | str) -> list[Mutant]:
    """A random share of all mutants, one at least; the same for the same seed."""
    mutants = all_mutants()
    picked = random.Random(seed).sample(range(len(mutants)), max(1, round(share * len(mutants))))
    return [mutants[index] for index in sorted(picked)]


def commit() -> str:
    """What is checked out; nothing where that is not known."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _copied(source: str | Path, into: str | Path) -> None:
    """A file, or a link to a large one or a library."""
    source, into = Path(source), Path(into)
    if source.suffix == ".so" or source.stat().st_size >= LARGE:
        into.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, into)


class Copy:
    """A copy of the tree, in which one mutant after the other is made and unmade."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        unwanted = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        for path in ROOT.iterdir():
            if path.name not in unwanted(ROOT, [path.name]) and path.name not in UNWANTED:
                into = folder / path.name
                if path.is_dir():
                    shutil.copytree(path, into, ignore=unwanted, symlinks=True, copy_function=_copied)
                else:
                    _copied(path, into)
        # What the editable installation would look for in the tree itself.
        for name in ("bench", "triton_kernels"):
            (folder / "specdec_kernels" / name).unlink(missing_ok=True)
            (folder / "specdec_kernels" / name).symlink_to(folder / name)

    def survives(self, mutant: Mutant) -> str:
        """What went wrong: the mutant lives, or its test did not run; nothing if it was killed."""
        if flaw := mutant.flaw():
            return flaw
        path = self.folder / mutant.file
        text = path.read_text()
        built = None
        try:
            path.write_text(text.replace(mutant.old, mutant.new))
            if mutant.library:
                try:
                    built = self._build(mutant.library)
                except subprocess.CalledProcessError as error:
                    return f"it does not compile: {(error.stdout + error.stderr)[-1000:]}"
            return self._test(mutant.test)
        finally:
            path.write_text(text)
            if built:
                built.unlink()
                built.symlink_to(ROOT / built.relative_to(self.folder))

    def _build(self, library: str) -> Path:
        """The library as the sources are now, in place of the tree's own. Without optimisation, which would take longer
        than it saves."""
        by_nvcc = library == LIBRARIES[NVCC]
        build = self.folder / ("build_by_nvcc" if by_nvcc else "build")
        cmake = [sys.executable, "-m", "cmake"]
        options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DSPECDEC_OPTIMIZE=0"]
        options += ["-DCMAKE_CUDA_ARCHITECTURES=90-virtual", *nvcc_options()] if by_nvcc else ["-DSPECDEC_CUDA=0"]
        for command in (
            [*cmake, "-S", self.folder, "-B", build, *options],
            [*cmake, "--build", build, "--parallel", "2", "--target", library.removeprefix("lib")],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        made = next(build.glob(f"{library}*.so"))
        into = next(self.folder.glob(f"specdec_kernels/**/{made.name}"))
        into.unlink()
        shutil.copy(made, into)
        return into

    def _test(self, test: str) -> str:
        """Nothing if the test fails, and only then."""
        output = self.folder / "output"
        process = FORKS.Process(target=run_test, args=(self.folder, test, output))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
            return f"{test} takes more than {LIMIT} s"
        if process.exitcode == 0:
            return f"it lives: {test} passes"
        if process.exitcode == 1 or process.exitcode < 0:  # failed, or died of a signal
            return ""
        return f"{test} does not run: {output.read_text()[-1000:]}"


def run_test(folder: Path, test: str, output: Path) -> None:
    """Exit as pytest does, in a process of its own."""
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)  # of what tests start
    sys.dont_write_bytecode = True  # two mutants of a file may have its size and its second
    import pytest
    import torch

    torch.set_num_threads(1)
    quiet = ["-q", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main(["-x", *quiet, "-p", "no:xdist", "-p", "no:cacheprovider", test]))


def main() -> int:
    """Print a line a mutant; whether one lives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of all mutants, chosen at random")
    parser.add_argument("--seed", default=commit(), help="of that choice; else the commit")
    parser.add_argument("--only", default="", help="those whose layer or name has this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="side by side")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():  # as tests/conftest.py, and before the forked process imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    mutants = [mutant for mutant in chosen(options.share, options.seed) if options.only in str(mutant)]
    alive = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for index in range(options.jobs):
            copies.put(Copy(Path(folder) / str(index)))

        def run(mutant: Mutant) -> tuple[str, float]:
            copy, start = copies.get(), time.monotonic()
            try:
                return copy.survives(mutant), time.monotonic() - start
            finally:
                copies.put(copy)

        for mutant, (wrong, seconds) in zip(mutants, pool.map(run, mutants), strict=True):
            print(f"{'SURVIVED' if wrong else 'killed':8} {seconds:5.0f} s  {mutant}", flush=True)
            if wrong:
                alive += 1
                print(f"    {wrong}", flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} mutants were killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
