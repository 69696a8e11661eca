"""Builds the native libraries with CMake and ninja; CMakeLists.txt is the one description of that build."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
#: What the environment may say of the build, and the options of CMake that it sets.
SETTINGS = {
    "SPECDEC_CUDA": "SPECDEC_CUDA",
    "SPECDEC_CUDA_ARCHITECTURES": "CMAKE_CUDA_ARCHITECTURES",
    "SPECDEC_WERROR": "SPECDEC_WERROR",
}


def cuda_compiler() -> Path | None:
    """The nvcc of the package ``nvidia-cuda-nvcc`` where that is installed; else CMake looks for one."""
    for folder in map(Path, sys.path):
        if (nvcc := folder / "nvidia" / "cu13" / "bin" / "nvcc").is_file():
            return nvcc
    return None


class CMakeBuild(build_ext):
    """Configures, builds and installs the native code into ``specdec_kernels``: of the tree if that is what is
    imported, else of the wheel. CMake puts everything where it belongs, so setuptools has nothing to copy."""

    def run(self) -> None:
        """Run CMake."""
        in_place = self.inplace or self.editable_mode
        into = (ROOT if in_place else Path(self.build_lib).resolve()) / "specdec_kernels"
        build = ROOT / "build" / "native"
        options = [f"-DPython_EXECUTABLE={sys.executable}"]
        for name, option in SETTINGS.items():
            value = os.environ.get(name)
            options += [f"-D{option}={value}"] if value else [f"-U{option}"]  # not what an earlier build was told
        if nvcc := cuda_compiler():
            # It looks for its libraries in lib64, where the package has none.
            options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_FLAGS=-L{nvcc.parent.parent / 'lib'}"]
        cmake = [sys.executable, "-m", "cmake"]  # that of the build's requirements, whatever the system's
        subprocess.run([*cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run([*cmake, "--build", build], check=True)
        subprocess.run([*cmake, "--install", build, "--prefix", into], check=True)

    def get_outputs(self) -> list[str]:
        """Nothing for setuptools to look for."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """As above."""
        return {}


# The upstream Triton project owns the top-level name `triton_kernels`, so folders at the top are imported under ours.
setup(
    packages=[
        *find_packages(include=["specdec_kernels", "specdec_kernels.*"]),
        "specdec_kernels.bench",
        "specdec_kernels.triton_kernels",
    ],
    package_dir={"specdec_kernels.triton_kernels": "triton_kernels", "specdec_kernels.bench": "bench"},
    package_data={"specdec_kernels": ["assets/*", "py.typed", "*.pyi"]},
    ext_modules=[Extension("specdec_kernels.native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
