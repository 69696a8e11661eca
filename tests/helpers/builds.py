"""Builds of the C++ with sanitizers."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def sanitized(sanitizers: str, *targets: str, source: Path = ROOT) -> Path:
    """The folder of a build with sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    build = source / "build" / sanitizers.replace(",", "-")
    # With -O1, gcc takes a minute more for what it makes of undefined behaviour; threads are to be fast.
    level = int(sanitizers == "thread")
    options = ["-G", "Ninja", f"-DSPECDEC_SANITIZE={sanitizers}", f"-DSPECDEC_OPTIMIZE={level}"]
    options += [f"-DPython_EXECUTABLE={sys.executable}"]
    cmake = [sys.executable, "-m", "cmake"]
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:  # other workers may want the same build
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([*cmake, "-S", source, "-B", build, *options], check=True, capture_output=True)
        subprocess.run([*cmake, "--build", build, "--target", *targets], check=True, capture_output=True)
    return build
