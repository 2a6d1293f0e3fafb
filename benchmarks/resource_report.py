"""Registers, spills, shared memory and stores of every CUDA kernel, as nvcc reports them; needs no GPU.

    python benchmarks/resource_report.py [--arch 90 80 100] [--json report.json] [--markdown report.md]
                                         [--source register_direct.cu ...] [--strict]

Compiles csrc/cuda/*.cu with ``-Xptxas -v``, two at a time, and prints one line per kernel, those with most registers
first. "blocks" is how many blocks of 256 threads the registers of one multiprocessor (65536) are enough for. "narrow"
counts instructions that store less than 16 bytes to global memory, "split" those of them that would have been one
store of 16 bytes: neighbours of up to four bytes from one address on. "votes" counts the loops that find out which
lanes take part in a shuffle. These three come from ``cuobjdump`` of the toolkit, of Triton or of the package
nvidia-cuda-cuobjdump.

Compiling takes 8 to 15 minutes an architecture on two cores, and 400 MB a file. What is compiled stays in build/cubins
until its sources change (cubins.py): a run that was interrupted goes on, and issue_report.py finds its kernels there.

With ``--strict`` the exit status is 1 if a kernel keeps registers in local memory, has split stores or such loops. The
first architecture is shown in full, of the others a line and what fails. The report is kept in
``benchmarks/results/cuda_resources.md``.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cubins import SOURCES, compile_all  # noqa: E402
from benchmarks.sass import find_tool  # noqa: E402

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
    narrow: int  # instructions
    split: int
    votes: int

    @property
    def fails(self) -> bool:
        """What ``--strict`` objects to."""
        return self.spill_stores + self.split + self.votes > 0

    @property
    def blocks(self) -> int:
        """Blocks of 256 threads that the registers of a multiprocessor are enough for; a warp gets them by 256."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return REGISTERS // (per_warp * BLOCK_THREADS // 32)


@dataclass(frozen=True)
class Instructions:
    """What the machine code of a kernel tells."""

    narrow: int = 0
    split: int = 0
    votes: int = 0


STORE = re.compile(r"\bSTG((?:\.\w+)*) +(?:desc\[\w+\])?\[([^\]]+?)(?:\+(0x[0-9a-f]+))?\]")
BRANCH = re.compile(r"\b(BRA|BRX|EXIT|RET|CALL|BSYNC|WARPSYNC)\b")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def width_of(modifiers: str) -> int:
    """Bytes that a store moves, by what follows its name."""
    return next((WIDTHS[part] for part in modifiers.split(".") if part in WIDTHS), 4)


def neighbours(stores: Iterable[tuple[str, int, int]]) -> int:
    """Of (address, offset, width) of stores up to four bytes wide: how many cover 16 bytes together with others."""
    offsets: dict[tuple[str, int], set[int]] = collections.defaultdict(set)
    for address, offset, width in stores:
        if width <= 4:
            offsets[address, width].add(offset)
    split = 0
    for (_, width), found in offsets.items():
        begins = [at for at in found if all(at + i in found for i in range(0, 16, width))]
        split += len({at + i for at in begins for i in range(0, 16, width)})
    return split


def count_instructions(sass: str) -> dict[str, Instructions]:
    """By kernel, from what ``cuobjdump -sass`` prints."""
    counted = {}
    for entry in re.split(r"\bFunction : ", sass)[1:]:
        stores: list[tuple[str, int, int]] = []  # since the last branch
        narrow = split = 0
        for line in entry.splitlines():
            if BRANCH.search(line):
                split += neighbours(stores)
                stores.clear()
            elif store := STORE.search(line):
                stores.append((store[2], int(store[3] or "0", 16), width_of(store[1])))
                narrow += stores[-1][2] < 16
        votes = len(re.findall(r"\bMATCH\.", entry))
        counted[entry.split(maxsplit=1)[0]] = Instructions(narrow, split + neighbours(stores), votes)
    return counted


def parse(log: str, source: str, instructions: Mapping[str, Instructions]) -> list[Kernel]:
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
                **asdict(instructions.get(name, Instructions())),
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
    cuobjdump = find_tool("cuobjdump")
    kernels = []
    for source, cubin in zip(sources, compile_all(sources, arch), strict=True):
        instructions = {}
        if cuobjdump is not None:
            code = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
            instructions = count_instructions(code)
        kernels += parse(cubin.with_suffix(".log").read_text(), source.name, instructions)
    names = readable(kernel.name for kernel in kernels)
    kernels = [Kernel(**{**asdict(k), "name": name}) for k, name in zip(kernels, names, strict=True)]
    return sorted(kernels, key=lambda k: (not k.fails, -k.spill_stores, -k.registers, k.source, k.name))


def failing(kernels: list[Kernel]) -> list[int]:
    """How many spill, how many have split stores, and loops of votes."""
    return [sum(getattr(k, what) > 0 for k in kernels) for what in ("spill_stores", "split", "votes")]


def count(kernels: list[Kernel]) -> str:
    spilling, split, voting = failing(kernels)
    return (
        f"{len(kernels)} kernels for {kernels[0].arch}, {spilling} with spills (bytes, stores and loads), "
        f"{split} with split stores, {voting} with loops of votes"
    )


def table(kernels: list[Kernel]) -> str:
    heads = ("registers", "blocks", "spills", "stack", "shared", "narrow", "split", "votes")
    lines = [" ".join(f"{head:>6}" for head in heads) + "  kernel"]
    for k in kernels:
        spills = k.spill_stores + k.spill_loads
        numbers = (
            f"{k.registers:9} {k.blocks:6} {spills:6} {k.stack:6} {k.shared:6} {k.narrow:6} {k.split:6} {k.votes:6}"
        )
        lines.append(f"{numbers}  {k.source}: {k.name}")
    return "\n".join(lines)


def rows(kernels: Iterable[Kernel]) -> list[str]:
    """Rows of a markdown table, in the order of their sources and names."""
    heads = ("source", "kernel", "registers", "blocks", "spills", "stack", "shared", "narrow", "split", "votes")
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'--:|' * (len(heads) - 2)}"]
    for k in sorted(kernels, key=lambda k: (k.source, k.name)):
        numbers = [k.registers, k.blocks, k.spill_stores + k.spill_loads, k.stack, k.shared, k.narrow, k.split, k.votes]
        lines.append(f"| {k.source} | `{k.name}` | {' | '.join(map(str, numbers))} |")
    return lines


def by_architecture(reports: list[list[Kernel]]) -> list[str]:
    """A markdown table with a row for each architecture; the kernel is one of those with most registers."""
    heads = (
        "architecture",
        "kernels",
        "with spills",
        "with split stores",
        "with loops of votes",
        "most registers",
        "in",
    )
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 2)}---|"]
    for kernels in reports:
        largest = max(kernels, key=lambda k: (k.registers, k.name))
        numbers = [len(kernels), *failing(kernels), largest.registers]
        lines.append(f"| {largest.arch} | {' | '.join(map(str, numbers))} | {largest.source}: `{largest.name}` |")
    return lines


def markdown(reports: list[list[Kernel]], archs: list[str]) -> str:
    """A page of its own: a row for each architecture, all kernels of the first, and what fails of the others."""
    lines = [
        "# CUDA kernels by architecture",
        "",
        f"Written by `python benchmarks/resource_report.py --arch {' '.join(archs)} --markdown",
        "benchmarks/results/cuda_resources.md`, which explains the columns. Spills, stack and shared memory are",
        f"bytes, blocks are those of {BLOCK_THREADS} threads per multiprocessor. Dynamic shared memory is extra.",
        "",
        *by_architecture(reports),
        "",
    ]
    for position, kernels in enumerate(reports):
        shown = kernels if position == 0 else [k for k in kernels if k.fails]
        if shown:
            of = "All kernels" if position == 0 else "Those that spill, split stores or loop over votes"
            lines += [f"{of} for {kernels[0].arch}:", "", *rows(shown), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["90"], help="compute capabilities without the dot (default: 90)")
    parser.add_argument("--source", nargs="+", help="files of csrc/cuda (default: all)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument(
        "--strict", action="store_true", help="fail if a kernel spills, splits stores or loops over votes"
    )
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on PATH")
    if args.strict and find_tool("cuobjdump") is None:
        parser.error("--strict needs cuobjdump: the toolkit's, or that of the package nvidia-cuda-cuobjdump")
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
    return int(args.strict and any(k.fails for k in everything))


if __name__ == "__main__":
    sys.exit(main())
