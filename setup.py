"""Builds the native libraries with CMake and ninja; CMakeLists.txt is the one description of that build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

from build_backend import check_platform, nvcc_options, torch_folder

ROOT = Path(__file__).parent.resolve()
#: What the environment may say of the build, and the options of CMake that it sets.
SETTINGS = {
    "SPECDEC_CUDA": "SPECDEC_CUDA",
    "SPECDEC_CUDA_ARCHITECTURES": "CMAKE_CUDA_ARCHITECTURES",
    "SPECDEC_WERROR": "SPECDEC_WERROR",
}


class CMakeBuild(build_ext):
    """Configures, builds and installs the native code into ``specdec_kernels``: of the tree if that is what is
    imported, else of the wheel. CMake puts everything where it belongs, so setuptools has nothing to copy."""

    def run(self) -> None:
        """Run CMake."""
        check_platform()
        in_place = self.inplace or self.editable_mode
        into = (ROOT if in_place else Path(self.build_lib).resolve()) / "specdec_kernels"
        build = ROOT / "build" / "native"
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DSPECDEC_TORCH_DIR={torch_folder() or ''}"]
        options += [f"-DSPECDEC_TEST_LIBRARIES={int(in_place)}"]  # a wheel has no tests
        for name, option in SETTINGS.items():
            value = os.environ.get(name)
            options += [f"-D{option}={value}"] if value else [f"-U{option}"]  # not what an earlier build was told
        options += nvcc_options()
        cmake = [sys.executable, "-m", "cmake"]  # that of the build's requirements, whatever the system's
        subprocess.run([*cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run([*cmake, "--build", build], check=True)
        shutil.rmtree(into / "lib", ignore_errors=True)  # what an earlier build had may not be in this one
        subprocess.run([*cmake, "--install", build, "--prefix", into], check=True)

    def get_outputs(self) -> list[str]:
        """Nothing for setuptools to look for."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """As above."""
        return {}


# The upstream Triton project owns the top-level name `triton_kernels`, so folders at the top are imported under ours.
AT_THE_TOP = {"specdec_kernels.triton_kernels": "triton_kernels", "specdec_kernels.bench": "bench"}
setup(
    packages=[*find_packages(include=["specdec_kernels", "specdec_kernels.*"], exclude=AT_THE_TOP), *AT_THE_TOP],
    package_dir=AT_THE_TOP,
    package_data={"specdec_kernels": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("specdec_kernels.native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
