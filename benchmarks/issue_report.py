"""Warp instructions per logit of the CUDA kernels, counted in machine code for sm_90; needs no GPU.

    python benchmarks/issue_report.py [--markdown TABLE] [--check benchmarks/results/cuda_issue.md]

A kernel at the speed of a copy may issue so many warp instructions per logit (32 lanes, a logit each; 132
multiprocessors with 4 issue slots at 1.98 GHz): what fills more than 70 % of them does not hide behind memory. For
every case the launch plan says how a row is shared out, and ``sass.cheapest_trip`` finds the fewest instructions with
which a warp can do that: so many loads, exponentials, shuffles, stores, the target of the next row, and the loss added
up in doubles. What runs once a block is left out. ``--check`` fails if a case needs a tenth more than the table says.
Needs nvcc, g++ and nvdisasm (PyPI: nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import sass  # noqa: E402

CLASSES = (10, 19, 33, 100, 150, 257, 1000, 1001, 4099, 21841, 50257, 128256)
DTYPES = ("bfloat16", "float32")  # float16 differs from bfloat16 in two conversions, of one instruction each
STORED = {"bfloat16": "BFloat16", "float16": "Half", "float32": "float"}
# How a kernel's name spells them.
MANGLED = {"bfloat16": r"BFloat16E", "float16": r"4HalfE", "float32": r"f"}
# Sources, and a kernel that they alone have. Disassembling those of several passes takes most of the time.
SOFTMAX = {"register_tile": b"softmax_in_tiles", "register_forward": b"softmax_in_registers"}
SOFTMAX |= {"softmax_columns": b"softmax_in_columns"}
SEVERAL_PASSES = {"passes": b"passes_in_register_tiles", "tempered_passes": b"passes_in_register_tiles"}
# Of the C++ enumeration.
FACTORS = {"p_y": 0, "NCE": 1, "pixels p_y": 0}


@dataclass(frozen=True)
class Passes:
    """A loss of several passes whose row stays in registers."""

    kept: int  # numbers of a class
    budget: int
    kernel: str  # how the name of its kernels spells it
    sums: int  # that the lanes of a row add up together, or largest numbers
    per_class: dict[str, int]  # instructions that forward needs for each class, among others
    miss: str  # why it misses its budget


MARGIN = (
    "HEM and multi-margin in float32, 10 classes: the budget is that of 16 bits; 10 instructions a class for memory "
    "and tiles, 14 for its error, its part of the sums and its gradient, 110 a row"
)
POWER = (
    "NGCE in float32: the budget is that of 16 bits; 18 instructions a class for two exponentials as exact as logits "
    "of 32 bits ask for, and 250 a row for a logarithm, powers and a division"
)
PASSES = {
    "HEM": Passes(1, 30, r"MarginLossI.*KnowingILb1ELb0E", 3, {"FADD": 2}, MARGIN),
    "multi-margin": Passes(1, 30, r"MarginLossI.*KnowingILb0ELb0E", 2, {"FADD": 1}, MARGIN),
    "NGCE": Passes(2, 45, r"PowerLossI.*ELb1E", 4, {"MUFU.EX2": 2, "FADD": 4}, POWER),
    "bi-tempered": Passes(1, 90, r"BiTemperedOfILi5ELb1E", 10, {"MUFU.RCP": 7}, "no reason is known"),
}
PASSES_CLASSES = (10, 100, 1000)
BYTES_PER_SECOND = {"H100": 3.0e12, "H200": 4.3e12}  # of a copy, read and write
SLOTS_PER_SECOND = 132 * 4 * 1.98e9
GROWTH = 1.1
COUNTED = ("FMA", "ALU", "MUFU", "LSU", "branch")
# Why cases miss their budgets, by loss, dtype and whether there are more than 256 classes.
MISSES = {
    ("p_y", "bfloat16", True): (
        "257 classes of 16 bits: 8 rows are the fewest that end at 16 bytes, and twice as many do not fit, so that "
        "bringing and sending a tile costs 2.9 instructions a logit; words that not every lane has cost .7 more"
    ),
    ("NCE", "float32", False): (
        "NCE in float32 up to 100 classes: its budget is that of 16 bits; expf takes 7 instructions a logit more than "
        "EX2, and p_y alone is allowed 40 at 10 classes and 33 at 100"
    ),
}


@dataclass(frozen=True)
class Case:
    """A shape of many rows, and what its loss asks for."""

    # "p_y": losses of log p_y, cross entropy first, of "pixels p_y" side by side; "NCE": those with a sum over the
    # classes as well; PASSES
    loss: str
    dtype: str
    classes: int

    @property
    def size(self) -> int:
        """Bytes of a logit."""
        return 4 if self.dtype == "float32" else 2

    @property
    def rows(self) -> int:
        """Enough to fill the device many times over."""
        return max(1000, (1 << 30) // self.classes)

    @property
    def kind(self) -> str:
        """How its rows lie, as launch_plans.cpp calls it."""
        return "pixels" if self.loss == "pixels p_y" else "rows"

    @property
    def budget(self) -> int:
        """The most instructions per logit that it should need."""
        if self.loss in PASSES:
            return PASSES[self.loss].budget
        if self.loss == "NCE":
            return 30
        if self.loss == "pixels p_y":
            return 26 if self.size == 2 else 40
        by_classes = (26, 21, 15) if self.size == 2 else (40, 33, 28)
        return by_classes[(self.classes > 32) + (self.classes > 256)]


@dataclass(frozen=True)
class Plan:
    """How the rows of a case are shared out (register_plan.h)."""

    kind: str
    factors: int
    lanes: int
    held: int
    rounds: int
    tile_rows: int
    tile_bytes: int
    threads: int
    cluster: int
    conflicts: int

    def __str__(self) -> str:
        if self.kind == "tile":
            return f"tile of {self.tile_rows} rows, {self.lanes} x {self.held}"
        if self.kind == "columns":
            return f"{self.lanes} warps x {self.held}"
        blocks = f"{self.cluster} blocks x " if self.cluster > 1 else ""
        return f"{blocks}{self.lanes} x {self.held}"


@dataclass(frozen=True)
class Count:
    """Warp instructions per logit, 32 lanes a logit each."""

    case: Case
    plan: Plan
    total: float
    by_class: dict[str, float]

    def fill(self, gpu: str) -> float:
        """The part of the issue slots that it takes at the speed of a copy, targets of 8 bytes counted."""
        moved = 2 * self.case.size + 8 / self.case.classes
        return self.total / 32 / SLOTS_PER_SECOND / (moved / BYTES_PER_SECOND[gpu])


Work = tuple[tuple[str, int], ...]


def work_of_row(case: Case, plan: Plan) -> tuple[dict[str, int], int]:
    """What a thread has to do for its part of a row besides reading and writing it, and how many numbers it reduces."""
    row = {"LDG.64": 1, "DADD": 2}  # the target, which is read in good time, and the loss, which is added up in doubles
    if case.loss in PASSES:
        loss = PASSES[case.loss]
        return row | {op: n * plan.held for op, n in loss.per_class.items()}, loss.sums
    row |= {"MUFU.EX2": plan.held, "MUFU.RCP": 1}
    if case.size == 2:
        row |= {"MUFU.LG2": 1, "VHMNMX|HMNMX2": plan.held // 4}
    else:
        row |= {"FMNMX": plan.held - 1}
    if case.loss == "NCE":  # sums of exponentials and of arguments; expf has two itself
        row["FADD"] = (2 if case.size == 2 else 4) * plan.held - 4
    return row, 4 if case.loss == "NCE" else 2


def trips(case: Case, plan: Plan) -> tuple[list[tuple[dict[str, int], bool, float]], float]:
    """Work of a loop's trip, whether that is the outermost loop, and how many trips; for how many logits / 32."""
    if plan.kind == "columns":
        return trips_of_columns(case, plan)
    halves = case.size == 2
    words = plan.held // 2 if halves else plan.held
    beside = case.classes * case.size % (4 if plan.kind == "tile" else 16) != 0  # numbers beside the whole accesses
    row, reduced = work_of_row(case, plan)
    if plan.kind == "tile":
        accesses = -(-plan.tile_rows * case.classes * case.size // 512)
        steps = plan.lanes.bit_length() - 1
        row |= {"SHFL": reduced * steps} if steps else {}
        if halves:
            row |= {"LDS.!64.!U16": words, "LDS.U16": 1 + beside, "STS.!64.!U16": words, "STS.U16": 1 + beside}
        else:
            row |= {"LDS.!64": words + 1, "STS.!64": words + 1}
        return [
            ({"LDGSTS": accesses, "STG.128": accesses}, True, 1),
            (row, False, plan.tile_rows * plan.lanes / 32),
        ], plan.tile_rows * case.classes / 32
    accesses, single = plan.held * case.size // 16, "U16" if halves else "!64.!128"
    row |= {"LDG.128": accesses, "STG.128": accesses, "SHFL": 10 if case.loss == "NCE" else 5 * reduced}
    row |= {f"LDG.{single}": 1 + beside, f"STG.{single}": 1 + beside}
    return [(row, True, plan.lanes / 32 * plan.cluster)], case.classes / 32


def trips_of_columns(case: Case, plan: Plan) -> tuple[list[tuple[dict[str, int], bool, float]], float]:
    """The same for pixels: each is finished by one of the warps that share its classes."""
    columns = 4 // case.size  # of a lane
    share = -(-case.classes // plan.lanes)
    exponentials = (2 if columns == 2 else 1) * plan.held * columns + columns  # those of two columns once more
    work = {"MUFU.EX2": exponentials, "LDG.!64.!U16": share, "LDG.64": columns, "STG.!U16": share}
    work |= {"VHMNMX|HMNMX2": plan.held // 2} if columns == 2 else {"FMNMX": plan.held // 2}
    if plan.lanes == 1:
        return [(work | {"DADD": 2 * columns, "MUFU.RCP": columns}, True, 1)], columns * case.classes
    work["BAR"] = 3
    finishing = (work | {"DADD": 2, "MUFU.RCP": 1}, True, float(columns))
    return [finishing, (work, True, plan.lanes - columns)], columns * case.classes


FOUND: dict[tuple[str, Work, bool], Counter[str]] = {}


def units_of(kernel: sass.Kernel, work: Work, outermost: bool) -> Counter[str]:
    """Instructions of the cheapest trip by their unit; many cases differ in nothing but how often they make it."""
    key = (kernel.name, work, outermost)
    if key not in FOUND:
        FOUND[key] = sass.per_class(sass.cheapest_trip(kernel, dict(work), outermost=outermost))
    return FOUND[key]


def kernel_name(case: Case, plan: Plan) -> str:
    """A pattern that finds the kernel of a plan by its parameters."""
    if case.loss in PASSES:
        loss = PASSES[case.loss].kernel
        if plan.kind == "tile":
            lanes = 1 if plan.lanes == 1 and plan.held == 10 else 0
            return rf"passes_in_register_tilesI.*{loss}.*{MANGLED[case.dtype]}Li{lanes}ELi{plan.held}E"
        team = "WarpTeam" if plan.lanes == 32 and PASSES[case.loss].kept == 1 else "RowTeam"
        return rf"passes_in_registersI.*{loss}.*{MANGLED[case.dtype]}Li{plan.held}E.*{team}"
    factors = rf"LNS0_7FactorsE{plan.factors}E"
    if plan.kind == "columns":
        return rf"softmax_in_columnsI.*{MANGLED[case.dtype]}{factors}Li{plan.held}E"
    if plan.kind == "tile":
        lanes = plan.lanes if plan.factors == 0 or plan.held == 10 else 0
        return rf"softmax_in_tilesI.*{MANGLED[case.dtype]}{factors}Li{lanes}ELi{plan.held}E"
    team = "WarpTeam" if plan.factors == 0 and plan.lanes == 32 else "RowTeam"
    return rf"softmax_in_registersI.*{MANGLED[case.dtype]}{factors}Li{plan.held}E.*{team}"


def count(case: Case, plan: Plan, kernels: Iterable[sass.Kernel]) -> Count:
    """Counts the case in its kernel."""
    name = kernel_name(case, plan)
    kernel = next(k for k in kernels if re.search(name, k.name))
    by_class = dict.fromkeys(COUNTED, 0.0)
    levels, logits = trips(case, plan)
    for work, outermost, times in levels:
        for unit, n in units_of(kernel, tuple(work.items()), outermost).items():
            by_class[unit] = by_class.get(unit, 0.0) + n * times / logits
    return Count(case, plan, sum(by_class.values()), by_class)


def compile_kernels(sources: Iterable[str], folder: Path) -> list[sass.Kernel]:
    """Their kernels for sm_90, two files at a time."""

    def compiled(source: str) -> list[sass.Kernel]:
        virtual = 80 if source in ("register_tile", "softmax_columns") else 90  # as CMakeLists.txt does by default
        cubin = folder / f"{source}.cubin"
        command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-DFL_WITH_CUDA", "--expt-relaxed-constexpr", "-cubin"]
        command += [f"-gencode=arch=compute_{virtual},code=sm_90", f"-I{ROOT / 'csrc'}", "-o", str(cubin)]
        subprocess.run([*command, str(ROOT / "csrc" / "cuda" / f"{source}.cu")], check=True)
        return sass.disassemble(cubin)

    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(compiled, sources) for kernel in kernels]


def has_kernels(library: Path) -> bool:
    """Whether it was built for sm_90, and there is a tool that takes its kernels out."""
    tool = sass.find_tool("cuobjdump")
    listed = tool and subprocess.run([tool, "-lelf", str(library)], capture_output=True, text=True, check=False).stdout
    return "sm_90" in (listed or "")


def kernels_in(library: Path, sources: dict[str, bytes], folder: Path) -> list[sass.Kernel]:
    """Their kernels for sm_90 in a library that has them."""
    tool = sass.find_tool("cuobjdump")
    assert tool is not None, "cuobjdump was not found (pip install nvidia-cuda-cuobjdump)"
    subprocess.run([tool, "-xelf", "sm_90", str(library.resolve())], cwd=folder, capture_output=True, check=False)
    counted = [path for path in folder.glob("*.cubin") if any(name in path.read_bytes() for name in sources.values())]
    return [kernel for path in counted for kernel in sass.disassemble(path)]


def plans(cases: Sequence[Case], folder: Path) -> list[Plan]:
    """The launch plans of the cases, by the planning code itself."""
    program = folder / "launch_plans"
    sources = [ROOT / "benchmarks" / "launch_plans.cpp"]
    sources += [ROOT / "csrc" / "cuda" / name for name in ("register_plan.cpp", "launch.cpp")]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp' / 'cuda_emulation'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    subprocess.run(["g++", "-std=c++20", "-O1", *includes, *map(str, sources), "-o", str(program)], check=True)
    factors = FACTORS | {name: 3 + loss.kept for name, loss in PASSES.items()}
    asked = [":".join(map(str, (case.kind, case.dtype, factors[case.loss], case.classes, case.rows))) for case in cases]
    lines = subprocess.run([str(program), *asked], capture_output=True, text=True, check=True).stdout.splitlines()
    return [Plan(kind, *map(int, numbers)) for kind, *numbers in map(str.split, lines)]


def reason(case: Case) -> str:
    """Why a case misses its budget."""
    if case.loss in PASSES:
        return PASSES[case.loss].miss
    return MISSES.get((case.loss, case.dtype, case.classes > 256), f"{case}: no reason is known")


def markdown(counts: Sequence[Count]) -> str:
    """The table, as a page."""
    lines = [
        "# Warp instructions per logit",
        "",
        "Forward that writes the gradient, many rows, sm_90; written by `python benchmarks/issue_report.py --markdown",
        "benchmarks/results/cuda_issue.md`, whose head says how they are counted. Full: the part of the issue slots",
        "that is taken at the speed of a copy. Conflicts: how many lanes ask the same bank of shared memory.",
        "",
        f"| loss | dtype | classes | rows are in | instructions | {' | '.join(COUNTED)} | conflicts "
        "| full H100 | full H200 | budget | |",
        f"|---|---|--:|---|--:|{'--:|' * len(COUNTED)}--:|--:|--:|--:|---|",
    ]
    for c in counts:
        units = " | ".join(f"{c.by_class.get(unit, 0):.1f}" for unit in COUNTED)
        fills = " | ".join(f"{100 * c.fill(gpu):.0f} %" for gpu in BYTES_PER_SECOND)
        verdict = "met" if c.total <= c.case.budget else "missed"
        lines.append(
            f"| {c.case.loss} | {c.case.dtype} | {c.case.classes} | {c.plan} | {c.total:.1f} | {units} | "
            f"{c.plan.conflicts} | {fills} | {c.case.budget} | {verdict} |"
        )
    missed = [c.case for c in counts if c.total > c.case.budget]
    lines += ["", f"{len(counts) - len(missed)} of {len(counts)} within budget."]
    why = dict.fromkeys(reason(c) for c in missed)
    lines += ["", "Missed:"] if why else []
    lines += textwrap.wrap("; ".join(why) + ".", 117) if why else []
    return "\n".join(lines) + "\n"


def read_table(text: str) -> dict[Case, float]:
    """Instructions per logit of the cases of a table that ``markdown`` has written."""
    table = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 5 and cells[2].isdigit():
            table[Case(cells[0], cells[1], int(cells[2]))] = float(cells[4])
    return table


def grown(counts: Iterable[Count], table: dict[Case, float]) -> list[str]:
    """The cases that need a tenth more than the table says, or are not in it."""
    return [
        f"{c.case.loss} {c.case.dtype}, {c.case.classes} classes: {c.total:.1f} instead of {table.get(c.case, 0.0):.1f}"
        for c in counts
        if c.total > GROWTH * table.get(c.case, 0.0)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--check", type=Path, help="fail if a case needs a tenth more than in this table")
    parser.add_argument("--library", type=Path, help="a built one, for sm_90 among others: saves compiling")
    parser.add_argument("--quick", action="store_true", help="without losses of several passes, which take longest")
    args = parser.parse_args()
    cases = [Case("p_y", dtype, classes) for dtype in DTYPES for classes in CLASSES]
    cases += [Case("NCE", dtype, classes) for dtype in DTYPES for classes in PASSES_CLASSES]
    cases += [Case("pixels p_y", dtype, classes) for dtype in DTYPES for classes in (19, 150)]
    sources = SOFTMAX
    if not args.quick:
        sources = SOFTMAX | SEVERAL_PASSES
        cases += [Case(loss, dtype, classes) for loss in PASSES for dtype in DTYPES for classes in PASSES_CLASSES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kernels = kernels_in(args.library, sources, folder) if args.library else compile_kernels(sources, folder)
        counts = []
        for case, plan in zip(cases, plans(cases, folder), strict=True):
            counts.append(count(case, plan, kernels))
            print(f"{case.loss} {case.dtype}, {case.classes}: {counts[-1].total:.1f}", file=sys.stderr, flush=True)
    page = markdown(counts)
    print(page)
    if args.markdown:
        args.markdown.write_text(page)
    failures = grown(counts, read_table(args.check.read_text())) if args.check else []
    print("\n".join(f"issue_report: {failure}" for failure in failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
