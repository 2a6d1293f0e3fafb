"""CUDA sources compiled for one architecture, as CMakeLists.txt does by default, and kept in build/cubins.

A file is compiled again when it, a header that it includes or the compiler has changed; what has been compiled before
an interruption stays.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from benchmarks.sass import find_tool

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "cubins"


@cache
def compiler() -> str:
    """What the compiler says about itself."""
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def key_of(command: Iterable[str], dependencies: Iterable[Path]) -> str:
    """Tells apart what may compile to different code."""
    digest = hashlib.sha256("\0".join([compiler(), *command]).encode())
    for path in dependencies:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def is_for_hopper(source: Path) -> bool:
    """Sources that do not are compiled to PTX for sm_80."""
    found = re.search(r'set\(for_hopper "/(\(\S+\))\\\\\.cu\$"\)', (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt does not say which CUDA sources are compiled to PTX for sm_90"
    return bool(re.fullmatch(found[1], source.stem))


def dependencies_in(makefile: Path) -> list[Path]:
    """Files of csrc in what ``nvcc -MD`` has written."""
    names = re.findall(r"[^\s\\]+", makefile.read_text().split(":", 1)[1])
    return [ROOT / name for name in sorted(names) if name.startswith("csrc/")]


def compiled(source: Path, arch: str = "90", folder: Path = FOLDER) -> Path:
    """Its cubin. What ``ptxas -v`` has said lies beside it, with the suffix ``.log``."""
    virtual = min(int(arch), 90 if is_for_hopper(source) else 80)
    command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-DFL_WITH_CUDA", "--expt-relaxed-constexpr", "-Xptxas=-v"]
    command += ["-cubin", f"-gencode=arch=compute_{virtual},code=sm_{arch}", "-Icsrc", str(source.relative_to(ROOT))]
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    key, makefile = cubin.with_suffix(".key"), cubin.with_suffix(".d")
    if key.exists() and key.read_text() == key_of(command, dependencies_in(makefile)):
        return cubin
    folder.mkdir(parents=True, exist_ok=True)
    key.unlink(missing_ok=True)
    made = [*command, "-o", str(cubin), "-MD", "-MF", str(makefile)]
    result = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"nvcc failed for {source.name}:\n{result.stderr}")
    cubin.with_suffix(".log").write_text(result.stdout + result.stderr)
    key.write_text(key_of(command, dependencies_in(makefile)))  # last: the others are whole
    return cubin


def compile_all(sources: Iterable[Path], arch: str = "90", folder: Path = FOLDER) -> list[Path]:
    """Their cubins in that order, two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: compiled(source, arch, folder), sources))


def in_library(library: Path, folder: Path) -> list[Path]:
    """The cubins for sm_90 that a built library has, taken out into a folder; none without the tool for it."""
    tool = find_tool("cuobjdump")
    if tool is None or not library.exists():
        return []
    subprocess.run([tool, "-xelf", "sm_90", str(library.resolve())], cwd=folder, capture_output=True, check=False)
    return sorted(folder.glob("*.cubin"))
