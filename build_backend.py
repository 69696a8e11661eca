"""The build backend: that of setuptools, which asks for a torch only where the environment has none.

Only torch's headers and libraries are needed. pip hides the packages of an environment from the build of a wheel for
it, and would unpack a second torch of some gigabytes; but it builds with the interpreter of that environment, which
knows where its packages are.
"""

from __future__ import annotations

import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

#: The first torch whose stable ABI has what is used, also in pyproject.toml and CMakeLists.txt.
OLDEST_TORCH = (2, 10)


def check_platform() -> None:
    """Refuse what nobody has built for, before anything is downloaded or compiled.

    Raises:
        RuntimeError: naming what this is and what it must be.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise RuntimeError(
            f"specdec-kernels needs Linux on x86_64 or (without vector instructions) aarch64, got {system} {machine}"
        )


def installed(path: str) -> Path | None:
    """A file or folder of the packages that the build sees, else of the environment that it is for."""
    for folder in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if (found := Path(folder, path)).exists():
            return found
    return None


def torch_folder() -> Path | None:
    """The folder of a torch that is new enough."""
    found = installed("torch/version.py")
    version = re.search(r"__version__ = '(\d+)\.(\d+)", found.read_text()) if found else None
    if found is None or version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
        return None
    return found.parent


def nvcc_options() -> list[str]:
    """Of CMake, for the nvcc of the package where that is installed; else CMake looks for one."""
    nvcc = installed("nvidia/cu13/bin/nvcc")
    # It looks for its libraries in lib64, where the package has none.
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_FLAGS=-L{nvcc.parent.parent / 'lib'}"] if nvcc else []


def _torch_where_there_is_none() -> list[str]:
    check_platform()
    return [] if torch_folder() else ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel is built with, beside what pyproject.toml lists."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_where_there_is_none()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same of an editable one."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_where_there_is_none()]
