"""Compiles and runs the C++ tests in tests/cpp: the torch-free headers, the CPU kernels of every instruction set, and
the CUDA kernels, which tests/cpp/cuda_emulation runs on the host (neither a GPU nor the CUDA toolkit is needed).

Each program runs in up to three builds: ``optimised`` has the flags of CMakeLists.txt; ``sanitized`` looks for accesses
out of bounds and undefined behaviour; ``pattern`` fills automatic variables and malloc's memory with a pattern, besides
the NaNs that the kernel test itself leaves on the stack and in the kernels' scratch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "cpp"
CXX = shlex.split(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.any_cpu,  # every instruction set is run here
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no C++ compiler: {CXX[0]!r} (CXX) is not on PATH"),
]


def isa_flags() -> dict[str, list[str]]:
    """Flags of csrc/cpu/kernels.cpp for each instruction set of this machine's architecture, from CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    common = re.search(r"\$\{own_code_options\} (-O3 .*) \$\{isa_flags_\$\{isa\}\}\)", text)
    assert common is not None
    flags = {"baseline": ""}
    if platform.machine() in {"x86_64", "AMD64"}:
        flags |= dict(re.findall(r"^set\(isa_flags_(\w+) (.*)\)$", text, re.MULTILINE))
        flags["avx512"] = flags["avx512"].replace("${isa_flags_avx2}", flags["avx2"])
    return {isa: [*common[1].split(), *extra.split(), f"-DFL_ISA={isa}"] for isa, extra in flags.items()}


ISA_FLAGS = isa_flags()
ENDS = list(dict.fromkeys([*ISA_FLAGS][:1] + [*ISA_FLAGS][-1:]))  # the oldest and the newest
CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()


def runs_here(isa: str) -> bool:
    return {flag.removeprefix("-m") for flag in ISA_FLAGS[isa] if re.fullmatch(r"-m\w+", flag)} <= CPU_FLAGS


# Later flags win. Where speed is not the point, a lower -O saves most of the compile time.
BUILD_FLAGS = {
    "optimised": [],
    # Redzones on the stack double the time; local arrays are left to the bounds checks of "undefined".
    "sanitized": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "--param=asan-stack=0"],
    "pattern": ["-O1", "-ftrivial-auto-var-init=pattern"],
}
# The CUDA kernels, run by tests/cpp/cuda_emulation, in two builds that stand for all three.
CUDA_PLANNING = [ROOT / "csrc" / "cuda" / name for name in ("launch.cpp", "register_plan.cpp", "resident_blocks.cpp")]
CUDA_SOURCES = [*CUDA_PLANNING, *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
CUDA_FLAGS = {
    "optimised": BUILD_FLAGS["pattern"],
    "sanitized": BUILD_FLAGS["sanitized"],
}
CUDA_INCLUDES = [f"-I{SOURCES / 'cuda_emulation'}", f"-I{SOURCES}", "-Wno-unknown-pragmas"]
CUDA_PROGRAMS = ("cuda_rows", "cuda_z_error", "cuda_statistics", "cuda_emulation")
# What programs need of the kernels, if it is not all.
CUDA_PARTS = {
    "cuda_emulation": CUDA_PLANNING,
    "cuda_statistics": [*CUDA_PLANNING, ROOT / "csrc" / "cuda" / "row_statistics.cu"],
}
TEST_LEVEL = {"optimised": "-O1", "sanitized": "-O0", "pattern": "-O1"}  # of the long test sources
# How many points, rows or cases a program tries; see the head of each source.
ARGUMENTS = {
    "optimised": {"math": "1031", "numeric": "1031", "vec": "1031", "losses": "12", "passes": "6", "kernels": "3"},
    "sanitized": {"math": "65537", "numeric": "65537", "vec": "65537", "losses": "2", "passes": "1", "kernels": "12"},
    "pattern": {"losses": "2", "passes": "1", "kernels": "4"},
}
ARGUMENTS["optimised"] |= {
    "cuda_rows": "16 1",
    "cuda_z_error": "50 1 2 3",
    "cuda_statistics": "1 2",
    "cuda_emulation": "",
}
ARGUMENTS["sanitized"] |= {"cuda_rows": "40 4", "cuda_z_error": "30 4", "cuda_statistics": "3", "cuda_emulation": ""}
# Longest builds first. What is made of scalars is the same for every instruction set but for fused multiply-adds, so
# the slower builds try it once.
RUNS = [
    *[("optimised", "kernels", isa) for isa in reversed(ISA_FLAGS)],
    ("sanitized", "kernels", "baseline"),
    ("pattern", "kernels", "baseline"),
    *[("optimised", program, isa) for program in ("losses", "passes") for isa in ENDS],
    *[("optimised", program, isa) for program in ("math", "numeric", "vec") for isa in ISA_FLAGS],
    *[("sanitized", program, "baseline") for program in ("losses", "passes", "math", "numeric", "vec")],
    *[("pattern", program, "baseline") for program in ("losses", "passes")],
    *[(build, program, "baseline") for build in CUDA_FLAGS for program in CUDA_PROGRAMS],
]

Result = subprocess.CompletedProcess[str]


def kernels_of_the_library(isa: str) -> Path | None:
    """The object that is in the library, if it was built here from these very sources: compiling takes a minute."""
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    changed = max(path.stat().st_mtime for path in sources)
    objects = (ROOT / "build").glob(f"*/CMakeFiles/fused_losses_cpu_{isa}.dir/csrc/cpu/kernels.cpp.o")
    return next((path for path in objects if path.stat().st_mtime > changed), None)


class Workshop:
    """Compiles and runs two things at a time; what waits for its inputs has a thread, but no turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(100)
        self.turns = Semaphore(2)
        self.files: dict[str, Future[Path]] = {}

    def compile(self, name: str, flags: list[str], inputs: list[Path | Future[Path]]) -> Future[Path]:
        """The file ``name``, from sources and from files that are being compiled; built once."""

        def run() -> Path:
            paths = [str(i.result() if isinstance(i, Future) else i) for i in inputs]
            command = [*CXX, "-std=c++20", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", *flags, *paths]
            with self.turns:
                result = subprocess.run([*command, "-o", str(self.folder / name)], capture_output=True, text=True)
            assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
            return self.folder / name

        if name not in self.files:
            self.files[name] = self.pool.submit(run)
        return self.files[name]

    def kernels_object(self, build: str, isa: str) -> Future[Path]:
        built = kernels_of_the_library(isa) if build == "optimised" and "CXX" not in os.environ else None
        if built is not None:
            return self.pool.submit(lambda: built)
        flags = [*ISA_FLAGS[isa], *BUILD_FLAGS[build], "-c"]
        return self.compile(f"kernels_{build}_{isa}.o", flags, [ROOT / "csrc" / "cpu" / "kernels.cpp"])

    def cuda_program(self, build: str, program: str) -> Future[Path]:
        flags = [*CUDA_FLAGS[build], *CUDA_INCLUDES]
        sources = CUDA_PARTS.get(program, CUDA_SOURCES)
        kernels = [self.compile(f"{s.stem}_{build}.o", [*flags, "-xc++", "-c"], [s]) for s in sources]
        main = self.compile(f"{program}_{build}.o", [*flags, "-c"], [SOURCES / f"test_{program}.cpp"])
        return self.compile(f"{program}_{build}", flags, [main, *kernels])

    def program(self, build: str, program: str, isa: str) -> Future[Path]:
        if program in CUDA_PROGRAMS:
            return self.cuda_program(build, program)
        source = SOURCES / f"test_{program}.cpp"
        level = [TEST_LEVEL[build]] if program in {"losses", "passes", "kernels"} else []
        if program != "kernels":
            return self.compile(f"{program}_{build}_{isa}", [*ISA_FLAGS[isa], *BUILD_FLAGS[build], *level], [source])
        # One program for all instruction sets, linked in the order of the library.
        isas = [name for name in ISA_FLAGS if (build, program, name) in RUNS]
        have = [f"-DFL_HAVE_{name.upper()}" for name in isas if name != "baseline"]
        objects = {name: self.kernels_object(build, name) for name in reversed(isas)}
        flags = [*ISA_FLAGS["baseline"], *BUILD_FLAGS[build], *level, *have]
        main = self.compile(f"test_kernels_{build}.o", [*flags, "-c"], [source])
        return self.compile(f"test_kernels_{build}", flags, [main, *(objects[name] for name in isas)])

    def result(self, build: str, program: str, isa: str) -> Future[Result]:
        executable = self.program(build, program, isa)
        arguments = [isa] if program == "kernels" else []
        # glibc fills what malloc returns with the complement of this, what is freed with itself
        environment = {**os.environ, "MALLOC_PERTURB_": "255"} if build == "pattern" else None

        def run() -> Result:
            command = [str(executable.result()), *arguments, *ARGUMENTS[build][program].split()]
            with self.turns:
                return subprocess.run(command, env=environment, capture_output=True, text=True)

        return self.pool.submit(run)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("cpp"))
    yield workshop
    workshop.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, workshop: Workshop) -> dict[tuple[str, str, str], Future[Result]]:
    """The runs that were asked for, all started at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    parameters = [item.callspec.params for item in items if item.originalname == "test_program"]
    chosen = [(p["build"], p["program"], p["isa"]) for p in parameters]
    return {run: workshop.result(*run) for run in chosen if runs_here(run[2])}


# Minutes of compiling: `make test-long`.
LONG = {
    *(("pattern", program) for program in ("kernels", "losses", "passes")),
    *(("sanitized", program) for program in ("kernels", "cuda_rows", "cuda_z_error")),
}


@pytest.mark.parametrize(
    ("build", "program", "isa"),
    [pytest.param(*run, marks=pytest.mark.long if run[:2] in LONG else ()) for run in RUNS],
)
def test_program(results: dict[tuple[str, str, str], Future[Result]], build: str, program: str, isa: str) -> None:
    if not runs_here(isa):
        pytest.skip(f"this processor has no {isa}")
    result = results[build, program, isa].result()
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}{result.stdout}"
    assert re.search(r"\d+ checks, 0 failures", result.stdout)


# Two types of one name in one namespace break the one-definition rule even if no file includes both. `-flto -Wodr`
# finds them in minutes; read together, their headers do not compile.
def test_no_two_headers_define_the_same_name(workshop: Workshop) -> None:
    headers = [path for folder in ("core", "losses", "z_error", "cpu") for path in (ROOT / "csrc" / folder).glob("*.h")]
    torch_free = [path for path in sorted(headers) if "#include <torch/" not in path.read_text()]
    assert len(torch_free) > 20
    source = workshop.folder / "all_headers.cpp"
    source.write_text("".join(f'#include "{path}"\n' for path in torch_free))
    for isa, flags in ISA_FLAGS.items():
        workshop.compile(f"all_headers_{isa}.o", [*flags, "-fsyntax-only"], [source]).result()


# Of an inline function defined in several objects the linker keeps one copy for all. So none that is compiled for a
# newer processor may carry a name that other objects define, too.
@pytest.mark.parametrize("isa", [isa for isa in ISA_FLAGS if isa != "baseline"])
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_no_shared_function_is_compiled_for_a_newer_processor(workshop: Workshop, isa: str) -> None:
    compiled = workshop.kernels_object("optimised", isa).result()
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(compiled)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    functions = [name for kind, name in symbols if kind in "TW"]  # V: data, such as a pointer for the unwinder
    assert len(functions) > 1
    entry = "fused_losses::CpuKernels fused_losses::cpu_kernels<"
    shared = [name for name in functions if f"fused_losses::{isa}::" not in name and not name.startswith(entry)]
    assert shared == []
    assert [kind for kind, _ in symbols if kind not in "TWV"] == []
