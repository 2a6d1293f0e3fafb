"""The CPU kernels on a processor that is not this one: compiled for it, and run in an emulator (qemu).

Debian's packages are g++-aarch64-linux-gnu and qemu-user. Only what needs no torch: the programs of tests/cpp.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
FLAGS = "-std=c++20 -DFL_ISA=baseline -Icsrc -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
ARGUMENTS = {"math": "1031", "numeric": "1031", "vec": "1031", "losses": "4", "multi_reduction": "2"}
KERNELS = "baseline 40"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        None in (shutil.which(COMPILER), shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
    ),
]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


def compile_program(program: Path, *sources: str) -> None:
    run(COMPILER, *FLAGS.split(), "-O1", "-UNDEBUG", *sources, "-o", str(program))


def check(program: Path, arguments: str) -> None:
    assert re.search(r"[1-9]\d* checks, 0 failures", run(EMULATOR, "-L", LIBRARIES, str(program), *arguments.split()))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_headers(name: str, tmp_path: Path) -> None:
    compile_program(tmp_path / name, f"tests/cpp/test_{name}.cpp")
    check(tmp_path / name, ARGUMENTS[name])


def test_kernels(tmp_path: Path) -> None:
    sources = sorted((ROOT / "csrc" / "cpu").glob("*kernels.cpp"))
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda s, o: run(COMPILER, *FLAGS.split(), "-c", str(s), "-o", o), sources, objects):
            pass
    compile_program(tmp_path / "kernels", "tests/cpp/test_kernels.cpp", *objects)
    check(tmp_path / "kernels", KERNELS)
