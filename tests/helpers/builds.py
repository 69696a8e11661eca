"""Builds of the C++ with sanitizers. `make` makes them all before the tests, by ``python tests/helpers/builds.py``."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


#: What finds faults in each target.
SANITIZERS = {
    "specdec_cpu": "address,undefined",
    "specdec_cuda_emulated": "address,undefined",
    "specdec_threads_check": "thread",
    "specdec_cuda_emulated_threads": "thread",
}


def sanitized(*targets: str) -> Path:
    """The folder of a build of targets that have the same sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (sanitizers,) = {SANITIZERS[target] for target in targets}
    build = ROOT / "build" / sanitizers.replace(",", "-")
    # With -O1, gcc takes a minute more for what it makes of undefined behaviour; threads are to be fast.
    level = int(sanitizers == "thread")
    options = ["-G", "Ninja", f"-DSPECDEC_SANITIZE={sanitizers}", f"-DSPECDEC_OPTIMIZE={level}"]
    options += [f"-DPython_EXECUTABLE={sys.executable}"]
    cmake = [sys.executable, "-m", "cmake"]
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:  # other workers may want the same build
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([*cmake, "-S", ROOT, "-B", build, *options], check=True, capture_output=True)
        subprocess.run([*cmake, "--build", build, "--target", *targets], check=True, capture_output=True)
    return build


if __name__ == "__main__" and shutil.which("g++"):
    for kind in set(SANITIZERS.values()):
        sanitized(*(target for target, own in SANITIZERS.items() if own == kind))
