"""Build an sdist, a wheel from it as a user would, and install that beside nothing but torch; look at all three.

    make package  # minutes, since it compiles; CUDA is left out unless SPECDEC_CUDA says otherwise
    SPECDEC_OLD_SYSTEM=/srv/bionic make package  # for all systems that PyTorch is for: old_system.cmake

What is made stays below build/package.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "build" / "package"
TOOLS = Path(sys.executable).parent
MOST_BYTES = 8_000_000
#: The oldest systems that PyTorch's own wheels are for.
PLATFORM = f"manylinux_2_28_{platform.machine()}"
#: What PyTorch brings.
NOT_OURS = [f"--exclude={name}" for name in ("libtorch*.so", "libc10*.so")]
#: What is of no use without a checkout.
NOT_IN_A_WHEEL = re.compile(r"emulated|libspecdec_(bench|(cuda_)?ptx)|safetensors|results/|csrc/|tests/|\.cpp$|\.cu$")


def run(*command: Any, **named: Any) -> str:
    """Its output; an error with what it said."""
    environment = {**os.environ, "PYTHONPATH": "", **named.pop("environment", {})}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, cwd=named.pop("cwd", HERE), **named
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def build_sdist(into: Path) -> Path:
    """By the build backend, which is run in the tree."""
    shutil.rmtree(ROOT / "specdec_kernels.egg-info", ignore_errors=True)  # whose list of files would be taken over
    run(sys.executable, "-c", "import build_backend, sys; build_backend.build_sdist(sys.argv[1])", into, cwd=ROOT)
    (made,) = into.glob("*.tar.gz")
    return made


def missing_from_sdist(sdist: Path) -> list[str]:
    """What a wheel is made of that the sdist lacks."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "build_backend.py", "pyproject.toml", "setup.py"}
    for folder, pattern in (
        ("csrc", "*.*"), ("specdec_kernels", "*.py"), ("specdec_kernels", "*.pyi"), ("triton_kernels", "*.py"),
        ("bench", "*.py"),
    ):  # fmt: skip
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}
    return sorted(needed - names) + sorted(name for name in names if name.endswith(".safetensors"))


def only_torch() -> Path:
    """The Python of an environment that has the torch of requirements-dev.txt and nothing else."""
    python = HERE / "only-torch" / "bin" / "python"
    torch, numpy = (
        re.search(rf"^{name}==.*$", (ROOT / "requirements-dev.txt").read_text(), re.M)[0]  # type: ignore[index]
        for name in ("torch", "numpy")
    )
    run(sys.executable, "-m", "venv", python.parent.parent)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch, numpy)
    return python


def readme_example() -> str:
    """The first one."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    return example[1]


def build_wheel(python: Path, sdist: Path) -> Path:
    """By the pip of an environment, for it; for all systems where an older one is at hand to link with."""
    options = {"SPECDEC_CUDA": os.environ.get("SPECDEC_CUDA", "0"), "SPECDEC_WERROR": "1"}
    for_all = "SPECDEC_OLD_SYSTEM" in os.environ
    if for_all:
        options["CMAKE_TOOLCHAIN_FILE"] = str(Path(__file__).with_name("old_system.cmake"))
    pip = (python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir", "-w", HERE)
    said = run(*pip, sdist, environment=options)
    assert "Collecting torch" not in said, "a second torch was fetched to build against"
    (wheel,) = HERE.glob("*.whl")
    if for_all:
        patchelf = {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
        repair = (TOOLS / "auditwheel", "repair", "--plat", PLATFORM, *NOT_OURS, "-w", HERE / "repaired")
        run(*repair, wheel, environment=patchelf)
        (wheel,) = HERE.glob("repaired/*.whl")
    return wheel


def look_at(wheel: Path, installed: Path) -> None:
    """Its size and files, the PyTorch it needs, and the systems that it is for."""
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < MOST_BYTES, f"{wheel.stat().st_size} bytes"
    assert not (wrong := [name for name in names if NOT_IN_A_WHEEL.search(name)]), wrong
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(names)} files, built with the torch that was there")
    print(run(TOOLS / "torch-abi-audit", "--check", "torch", installed).strip())
    shown = " ".join(run(TOOLS / "auditwheel", "show", wheel).split())
    print("auditwheel:", *re.findall(r'"((?:many)?linux_\w+)"', shown)[-1:], flush=True)


def use(python: Path) -> None:
    """What a user sees who has nothing but torch."""
    listed = run(python, "-m", "pip", "list", "--format=freeze")
    assert "transformers" not in listed
    assert listed.count("torch==") == 1
    print("README's first example:", run(python, "-c", readme_example()).strip())
    backends = "from specdec_kernels.ops import BACKENDS as b; print({n: b[n].reason or b[n].detail for n in b})"
    print("backends:", run(python, "-c", backends).strip())
    extras = {"decode": "import specdec_kernels.decode", "cli": "from specdec_kernels.cli import run; run()"}
    for extra, code in extras.items():
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=HERE, check=False).stderr
        assert f"is not installed: pip install 'specdec-kernels[{extra}]' brings it" in said, said
        print(f"without its extra: {said.splitlines()[-1]}")


def main() -> None:
    """Every step, and what it showed."""
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    sdist = build_sdist(HERE)
    assert not (wrong := missing_from_sdist(sdist)), f"the sdist lacks, or has too much of: {wrong}"
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    python = only_torch()
    wheel = build_wheel(python, sdist)
    run(python, "-m", "pip", "install", "--quiet", wheel)
    (installed,) = python.parent.parent.glob("lib/python*/site-packages/specdec_kernels")
    look_at(wheel, installed)
    use(python)


if __name__ == "__main__":
    main()
