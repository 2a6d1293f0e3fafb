"""Registers, spills and shared memory of every CUDA kernel, as nvcc reports them; needs no GPU.

    python benchmarks/resource_report.py [--arch 90 80 100] [--json report.json] [--markdown report.md]
                                         [--source row_forward.cu ...] [--no-spills]

Compiles csrc/cuda/*.cu with ``-Xptxas -v``, two at a time, and prints one line per kernel, those with most registers
first. "blocks" is how many blocks of 256 threads the registers of one multiprocessor (65536) are enough for. With
``--no-spills`` the exit status is 1 if a kernel keeps registers in local memory. The first architecture is shown in
full, of the others the spills. The report of all kernels is kept in ``benchmarks/results/cuda_resources.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BLOCK_THREADS = 256  # kBlock in csrc/cuda/launch.cuh
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Kernel:
    source: str
    arch: str
    name: str
    registers: int
    spill_stores: int  # bytes, as all below
    spill_loads: int
    stack: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks of 256 threads that the registers of a multiprocessor are enough for; a warp gets them by 256."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return REGISTERS // (per_warp * BLOCK_THREADS // 32)


def compile_verbosely(source: Path, arch: str) -> str:
    """What ptxas says about the kernels of one file, compiled as CMakeLists.txt does by default."""
    clusters = source.name.endswith("_forward.cu")  # others are compiled once, to PTX for sm_80
    virtual = min(int(arch), 90 if clusters else 80)
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-DFL_WITH_CUDA", "--expt-relaxed-constexpr"]
        command += [f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{virtual},code=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command += ["-o", str(Path(folder) / "out.cubin"), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"resource_report: nvcc failed for {source.name}:\n{result.stderr}")
    return result.stdout + result.stderr


def parse(log: str, source: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` prints."""
    kernels = []
    for entry in re.split(r"Compiling entry function ", log)[1:]:
        name, arch = re.findall(r"^'(\w+)' for '(\w+)'", entry)[0]

        def number(pattern: str, entry: str = entry) -> int:
            found = re.search(pattern, entry)
            return int(found[1]) if found else 0

        kernels.append(
            Kernel(
                source=source,
                arch=arch,
                name=name,
                registers=number(r"Used (\d+) registers"),
                spill_stores=number(r"(\d+) bytes spill stores"),
                spill_loads=number(r"(\d+) bytes spill loads"),
                stack=number(r"(\d+) bytes stack frame"),
                shared=number(r"(\d+) bytes smem"),
            )
        )
    return kernels


def readable(names: Iterable[str]) -> list[str]:
    """Names as in the sources, without namespaces and function parameters, if c++filt is there."""
    names = list(names)
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    short = []
    for name in names:
        name = re.sub(r"\(anonymous namespace\)::|fused_losses::|baseline::|cuda::|^void ", "", name)
        short.append(re.sub(r"\((int|bool)\)", "", name).split("(")[0])
    return short


def report(sources: list[Path], arch: str) -> list[Kernel]:
    """The kernels of all files for one architecture, the worst first."""
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda source: compile_verbosely(source, arch), sources))
    kernels = [kernel for source, log in zip(sources, logs, strict=True) for kernel in parse(log, source.name)]
    names = readable(kernel.name for kernel in kernels)
    kernels = [Kernel(**{**asdict(k), "name": name}) for k, name in zip(kernels, names, strict=True)]
    return sorted(kernels, key=lambda k: (-k.spill_stores, -k.registers, k.source, k.name))


def count(kernels: list[Kernel]) -> str:
    spilling = sum(k.spill_stores > 0 for k in kernels)
    return f"{len(kernels)} kernels for {kernels[0].arch}, {spilling} with spills (bytes, stores and loads)"


def table(kernels: list[Kernel]) -> str:
    lines = [f"{'registers':>9} {'blocks':>6} {'spills':>6} {'stack':>6} {'shared':>6}  kernel"]
    for k in kernels:
        spills = k.spill_stores + k.spill_loads
        lines.append(f"{k.registers:9} {k.blocks:6} {spills:6} {k.stack:6} {k.shared:6}  {k.source}: {k.name}")
    return "\n".join(lines)


def rows(kernels: Iterable[Kernel]) -> list[str]:
    """Rows of a markdown table, in the order of their sources and names."""
    lines = ["| source | kernel | registers | blocks | spills | stack | shared |", "|---|---|--:|--:|--:|--:|--:|"]
    for k in sorted(kernels, key=lambda k: (k.source, k.name)):
        numbers = [k.registers, k.blocks, k.spill_stores + k.spill_loads, k.stack, k.shared]
        lines.append(f"| {k.source} | `{k.name}` | {' | '.join(map(str, numbers))} |")
    return lines


def markdown(reports: list[list[Kernel]], archs: list[str]) -> str:
    """A page of its own: the first architecture in full, of the others what spills."""
    lines = [
        f"# CUDA kernels for {', '.join(f'sm_{arch}' for arch in archs)}",
        "",
        f"Written by `python benchmarks/resource_report.py --arch {' '.join(archs)} --markdown",
        "benchmarks/results/cuda_resources.md`. Bytes, but for registers and blocks of",
        f"{BLOCK_THREADS} threads per multiprocessor. Dynamic shared memory is extra.",
        "",
    ]
    for position, kernels in enumerate(reports):
        shown = kernels if position == 0 else [k for k in kernels if k.spill_stores > 0]
        lines += [f"{count(kernels)}.", "", *([*rows(shown), ""] if shown else [])]
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["90"], help="compute capabilities without the dot (default: 90)")
    parser.add_argument("--source", nargs="+", help="files of csrc/cuda (default: all)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--no-spills", action="store_true", help="fail if a kernel spills")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on PATH")
    sources = [SOURCES / name for name in args.source] if args.source else sorted(SOURCES.glob("*.cu"))
    missing = [source.name for source in sources if not source.exists()]
    if missing:
        parser.error(f"--source: csrc/cuda has no {', '.join(missing)}")
    reports = [report(sources, arch) for arch in args.arch]
    print(table(reports[0]))
    for kernels in reports:
        print(count(kernels))
    everything = [kernel for kernels in reports for kernel in kernels]
    if args.json:
        args.json.write_text(json.dumps([{**asdict(k), "blocks": k.blocks} for k in everything], indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(reports, args.arch))
    return int(args.no_spills and any(k.spill_stores > 0 for k in everything))


if __name__ == "__main__":
    sys.exit(main())
