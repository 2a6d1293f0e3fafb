"""Runs CMake with Ninja for the two binaries; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "fused_losses"

NO_TORCH = f"""
fused_losses is compiled with the headers of an installed torch, and {sys.executable} has no torch.
Install one first, 2.11 or newer, and build without isolation:
    pip install torch numpy "setuptools>=77" wheel "pybind11>=2.13" ninja
    pip install --no-build-isolation .
(An isolated build cannot see the installed torch and would fetch another. What is built runs under every torch from
2.11 on. FUSED_LOSSES_TORCH_PYTHON names another Python that has one.)"""

NO_CMAKE = "fused_losses needs cmake >= 3.24 on PATH (apt-get install cmake, or pip install cmake)"


def build_jobs() -> str:
    """Compilers run at a time: MAX_JOBS, else CMAKE_BUILD_PARALLEL_LEVEL, else one a core (at least 2)."""
    given = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
    return given or str(max(2, len(os.sched_getaffinity(0))))


class CMakeBuild(build_ext):
    """Builds straight into the package: the source tree when editable or in place, else the wheel's tree."""

    def run(self) -> None:
        torch_python = os.environ.get("FUSED_LOSSES_TORCH_PYTHON", sys.executable)
        if torch_python == sys.executable and importlib.util.find_spec("torch") is None:
            raise SystemExit(NO_TORCH)
        if shutil.which("cmake") is None:
            raise SystemExit(NO_CMAKE)
        import ninja

        in_source = self.inplace or self.editable_mode
        output = (ROOT if in_source else Path(self.build_lib).resolve()) / PACKAGE
        # Kept between builds, one for each environment and compiler, so that only what changed is compiled again.
        compilers = [os.environ.get(name) for name in ("CC", "CXX", "CXXFLAGS", "CUDACXX", "CUDAToolkit_ROOT")]
        made_with = repr([sys.prefix, *compilers, shutil.which("nvcc")])
        tag = f"{sys.implementation.cache_tag}-{zlib.crc32(made_with.encode()):08x}"
        folder = Path(os.environ.get("FUSED_LOSSES_BUILD_DIR", ROOT / "build" / tag))
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            *("-U", "*Python_*", "-U", "PYTHON_*"),  # found by an earlier build, maybe of another Python
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFUSED_LOSSES_TORCH_PYTHON={torch_python}",
            f"-DFUSED_LOSSES_OUTPUT_DIR={output}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", build_jobs()], check=True)

    def binaries(self) -> list[str]:
        """Names of both binaries as built here."""
        return [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "libfused_losses_ops.so"]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / name) for name in self.binaries()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        return {out: str(ROOT / PACKAGE / Path(out).name) for out in self.get_outputs()}


setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
