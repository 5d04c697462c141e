# SPDX-License-Identifier: Apache-2.0
"""Builds the native modules through CMake. Never imports torch, never looks at the machine it runs on.

RLKERN_NATIVE=0   ship pure Python (the torch backend only)
RLKERN_NATIVE=1   fail if the native module cannot be built (the default builds it where a C++17 compiler works)
RLKERN_CUDA=1     the CUDA module too: needs nvcc, no GPU; CUDAARCHS="90-real" builds for some GPUs alone
RLKERN_SANITIZE=1 build it under AddressSanitizer and UndefinedBehaviorSanitizer
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("RLKERN_NATIVE", "auto")
CUDA = os.environ.get("RLKERN_CUDA") == "1"


class CMakeBuild(build_ext):
    """One CMake project for all native targets: flags stand in CMakeLists.txt alone."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._cmake(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if NATIVE == "1" or CUDA:
                raise
            print(
                f"\nrlkern: the native CPU module could not be built ({error}); installing without it.\n"
                "rlkern: ops then run on the torch backend; `rlkern info` says so. RLKERN_NATIVE=1 makes this an error.\n",
                file=sys.stderr,
            )

    def _cmake(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        sanitize = os.environ.get("RLKERN_SANITIZE") == "1"
        build = (Path(self.build_temp) / ("cmake-asan" if sanitize else "cmake-cuda" if CUDA else "cmake")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DRLKERN_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DRLKERN_CUDA={'ON' if CUDA else 'OFF'}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(
            [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 2), "--target", ext.name.removeprefix("rlkern.")], check=True
        )


MODULES = [] if NATIVE == "0" else ["rlkern._C", "rlkern._C_cuda"] if CUDA else ["rlkern._C"]
setup(
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild},
)
