"""Builds and runs the C++ tests in tests/cpp: the torch-free headers, the CPU kernels of every instruction set, and the
CUDA kernels, which tests/cpp/cuda_emulation runs on the host (neither a GPU nor the CUDA toolkit is needed).

CMake builds them, as tests/cpp/CMakeLists.txt says, where the package was built: the CPU kernels are those of the
library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from instruction_sets import CAPABILITIES

import fused_losses as fl

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.any_cpu,  # every instruction set is run here
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH"),
]

ISAS: list[str] = fl.build_info()["isa"]  # oldest first
ENDS = list(dict.fromkeys([ISAS[0], ISAS[-1]]))
CUDA_PROGRAMS = (
    "cuda_rows",
    "cuda_z_error",
    "cuda_statistics",
    "cuda_elr",
    "cuda_rescale",
    "cuda_gjs",
    "cuda_emulation",
    "cuda_compiled",
)
HEADERS = ("math", "numeric", "vec")
FORMULAS = ("losses", "multi_reduction")
# How many points, rows or cases a program tries; see the head of each source.
ARGUMENTS = {
    "optimised": dict.fromkeys(HEADERS, "1031") | {"losses": "12", "multi_reduction": "6", "kernels": "5"},
    "sanitized": dict.fromkeys(HEADERS, "65537") | {"losses": "2", "multi_reduction": "1", "kernels": "12"},
    "pattern": {"losses": "2", "multi_reduction": "1", "kernels": "4"},
}
ARGUMENTS["optimised"] |= {
    "cuda_rows": "32 1",
    "cuda_z_error": "30 1 2",
    "cuda_statistics": "1 2",
    "cuda_elr": "1 2",
    "cuda_rescale": "1 2",
    "cuda_gjs": "1 2",
    "cuda_emulation": "",
    "cuda_compiled": "",
}
ARGUMENTS["sanitized"] |= {
    "cuda_rows": "40 4",
    "cuda_z_error": "30 4",
    "cuda_statistics": "3",
    "cuda_elr": "3",
    "cuda_rescale": "3",
    "cuda_gjs": "3",
    "cuda_emulation": "",
    "cuda_compiled": "",
}
# Longest runs first. What is made of scalars is the same for every instruction set but for fused multiply-adds, so the
# slower builds try it once.
RUNS = [
    *[("optimised", "kernels", isa) for isa in reversed(ISAS)],
    ("sanitized", "kernels", "baseline"),
    ("pattern", "kernels", "baseline"),
    *[(build, program, "baseline") for build in ("optimised", "sanitized") for program in CUDA_PROGRAMS],
    *[("optimised", program, isa) for program in ("losses", "multi_reduction") for isa in ENDS],
    *[("optimised", program, isa) for program in HEADERS for isa in ISAS],
    *[("sanitized", program, "baseline") for program in (*FORMULAS, *HEADERS)],
    *[("pattern", program, "baseline") for program in FORMULAS],
]

Result = subprocess.CompletedProcess[str]


def runs_here(isa: str) -> bool:
    own = torch.backends.cpu.get_cpu_capability().lower()
    return isa == "baseline" or (own in CAPABILITIES and isa in CAPABILITIES[: CAPABILITIES.index(own) + 1])


def target_of(build: str, program: str, isa: str) -> str:
    """The CMake target that is this program; one kernel program has all instruction sets."""
    return f"test_{program}_{build}" + ("" if program in ("kernels", *CUDA_PROGRAMS) else f"_{isa}")


def find_build_folder() -> Path | None:
    """Where the package under test was built, if that was here."""
    package = f"FUSED_LOSSES_OUTPUT_DIR:PATH={Path(fl.__file__).parent}\n"
    source = f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n"
    caches = sorted((ROOT / "build").glob("*/CMakeCache.txt"), key=os.path.getmtime)
    texts = {cache: cache.read_text() for cache in caches}
    return next((cache.parent for cache, text in reversed(texts.items()) if package in text and source in text), None)


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package under test was built; a new one if it was not built here."""
    found = find_build_folder()
    if found is not None:
        return found
    folder = tmp_path_factory.mktemp("build")
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*command, f"-DFUSED_LOSSES_OUTPUT_DIR={folder}"], check=True, env=environment())
    return folder


def environment() -> dict[str, str]:
    """For CMake, in case it configures again: with CUDA if the package has it."""
    return {**os.environ, "FUSED_LOSSES_CUDA": "0" if fl.build_info()["cuda"] is None else "1"}


def compile_targets(folder: Path, *targets: str) -> None:
    command = ["cmake", "--build", str(folder), "--parallel", "2", "--target", *targets]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-20_000:]}{done.stderr}"


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, build_folder: Path) -> Iterator[dict[tuple[str, str, str], Future[Result]]]:
    """The runs that were asked for: all programs are built, then two run at a time."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    parameters = [item.callspec.params for item in items if item.originalname == "test_program"]
    chosen = [(p["build"], p["program"], p["isa"]) for p in parameters if runs_here(p["isa"])]
    compile_targets(build_folder, *dict.fromkeys(target_of(*run) for run in chosen))

    def result(build: str, program: str, isa: str) -> Result:
        executable = build_folder / "tests" / "cpp" / target_of(build, program, isa)
        arguments = [isa] if program == "kernels" else []
        # glibc fills what malloc returns with the complement of this, what is freed with itself
        variables = {**os.environ, "MALLOC_PERTURB_": "255"} if build == "pattern" else None
        command = [str(executable), *arguments, *ARGUMENTS[build][program].split()]
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        yield {run: pool.submit(result, *run) for run in chosen}
        pool.shutdown(cancel_futures=True)


# Minutes of compiling: `make test-long`. The newest instruction set's fused multiply-adds are in "kernels", too.
SANITIZED_LONG = ("kernels", *FORMULAS, *CUDA_PROGRAMS)
LONG = {
    *(("pattern", program, "baseline") for program in ("kernels", *FORMULAS)),
    *(("sanitized", program, "baseline") for program in SANITIZED_LONG),
    *(("optimised", program, ENDS[-1]) for program in FORMULAS if len(ENDS) > 1),
}


@pytest.mark.parametrize(
    ("build", "program", "isa"),
    [pytest.param(*run, marks=pytest.mark.long if run in LONG else ()) for run in RUNS],
)
def test_program(results: dict[tuple[str, str, str], Future[Result]], build: str, program: str, isa: str) -> None:
    if not runs_here(isa):
        pytest.skip(f"this processor has no {isa}")
    result = results[build, program, isa].result()
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}{result.stdout}"
    assert re.search(r"\d+ checks, 0 failures", result.stdout)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(11, 19))
def test_more_rows_by_cuda_kernels(build_folder: Path, seed: int) -> None:
    compile_targets(build_folder, "test_cuda_rows_optimised")
    program = build_folder / "tests" / "cpp" / "test_cuda_rows_optimised"
    result = subprocess.run([str(program), "16", str(seed)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout


def test_no_two_headers_define_the_same_name(build_folder: Path) -> None:
    source = build_folder / "tests" / "cpp" / "all_headers.cpp"
    assert len(source.read_text().splitlines()) > 20
    compile_targets(build_folder, *(f"test_all_headers_{isa}" for isa in ISAS))


# Of an inline function defined in several objects the linker keeps one copy for all. So none that is compiled for a
# newer processor may carry a name that other objects define, too.
@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_no_shared_function_is_compiled_for_a_newer_processor(build_folder: Path, isa: str) -> None:
    compile_targets(build_folder, f"fused_losses_cpu_{isa}")
    compiled = list((build_folder / "CMakeFiles" / f"fused_losses_cpu_{isa}.dir" / "csrc" / "cpu").glob("*.o"))
    assert len(compiled) > 1
    command = ["nm", "--demangle", "--defined-only", "--extern-only", *map(str, compiled)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if re.match("[0-9a-f]{8}", line)]
    functions = [name for kind, name in symbols if kind in "TW"]  # V: data, such as a pointer for the unwinder
    assert len(functions) > 1
    entry = re.compile(r"(void \(\*|fused_losses::\w+ )fused_losses::\w+_kernels?<\(fused_losses::Isa\)\d>")
    shared = [name for name in functions if f"fused_losses::{isa}::" not in name and not entry.match(name)]
    assert shared == []
    assert [kind for kind, _ in symbols if kind not in "TWV"] == []
