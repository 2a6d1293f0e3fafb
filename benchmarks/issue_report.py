"""Warp instructions per logit of the CUDA kernels, counted in machine code for sm_90; needs no GPU.

    python benchmarks/issue_report.py [--markdown TABLE] [--check benchmarks/results/cuda_issue.md]

A kernel at the speed of a copy may issue so many warp instructions per logit (32 lanes, a logit each; 132
multiprocessors with 4 issue slots at 1.98 GHz): what fills more than 70 % of them does not hide behind memory. For
every case the launch plan says how a row is shared out, and ``sass.cheapest_trip`` finds the fewest instructions with
which a warp can do that: so many loads, exponentials, shuffles and stores, a label that is not the ignored one, the
loss added up in doubles, and where the loss is chosen at run time the call of its formula. A search for the cheapest
way takes ways that no row takes: issue_cases.py asks for enough to rule them out, which the test of this file holds
against counts by hand. What runs once a block is left out. ``--check`` fails if a case needs a tenth more than in the
table. Needs nvcc, g++ and nvdisasm (PyPI: nvidia-cuda-nvdisasm).
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
from benchmarks.issue_cases import (  # noqa: E402
    CLASSES,
    DTYPES,
    EVALUATION,
    FACTORS,
    LOSS_AT,
    MISSES,
    NAMES,
    OTHERS,
    PASSES,
    PASSES_CLASSES,
    Case,
    Plan,
    kernel_name,
    plan_of_lanes,
    trips,
)

# Sources, and a kernel that they alone have. Disassembling those of several passes takes most of the time.
SOFTMAX = {"register_tile": b"softmax_in_tiles", "register_forward": b"softmax_in_registers"}
SOFTMAX |= {"softmax_columns": b"softmax_in_columns"}
SEVERAL_PASSES = {"passes": b"passes_in_register_tiles", "tempered_passes": b"passes_in_register_tiles"}
LOOPS = {"softmax_labels": b"labels_in_tiles", "row_statistics": b"10statistics", "rescale": b"7rescale"}
LOOPS |= {"elr": b"8elr_rows", "gjs": b"3gjsI"}
BYTES_PER_SECOND = {"H100": 3.0e12, "H200": 4.3e12}  # of a copy, read and write
SLOTS_PER_SECOND = 132 * 4 * 1.98e9
GROWTH = 1.1
COUNTED = ("FMA", "ALU", "MUFU", "LSU", "branch")


@dataclass(frozen=True)
class Count:
    """Warp instructions per logit, 32 lanes a logit each."""

    case: Case
    plan: Plan
    total: float
    by_class: dict[str, float]

    def fill(self, gpu: str) -> float:
        """The part of the issue slots that it takes at the speed of a copy, labels of 8 bytes counted."""
        other = OTHERS.get(self.case.loss)
        moved = other.moved[self.case.dtype] if other else 2 * self.case.size
        moved += 0 if other and not other.has_label else 8 / self.case.classes
        return self.total / 32 / SLOTS_PER_SECOND / (moved / BYTES_PER_SECOND[gpu])


Work = tuple[tuple[str, int], ...]
FOUND: dict[tuple[str, Work, bool], Counter[str]] = {}


def units_of(kernel: sass.Kernel, work: Work, outermost: bool) -> Counter[str]:
    """Instructions of the cheapest trip by their unit; many cases differ in nothing but how often they make it."""
    key = (kernel.name, work, outermost)
    if key not in FOUND:
        FOUND[key] = sass.per_class(sass.cheapest_trip(kernel, dict(work), outermost=outermost))
    return FOUND[key]


def count(case: Case, plan: Plan, kernels: Iterable[sass.Kernel]) -> Count:
    """Counts the case in its kernel."""
    name = kernel_name(case, plan)
    kernel = next(k for k in kernels if re.search(name, k.name))
    by_class = dict.fromkeys(COUNTED, 0.0)
    levels, logits = trips(case, plan)
    for work, outermost, times in levels:
        units = Counter(units_of(kernel, tuple(work.items()), outermost))
        if "CALL" in work:
            units += sass.per_class(sass.cheapest_call(kernel, EVALUATION, LOSS_AT, plan.number))
        for unit, n in units.items():
            by_class[unit] = by_class.get(unit, 0.0) + n * times / logits
    if case.loss in PASSES:
        loss = PASSES[case.loss]
        steps = plan.lanes.bit_length() - 1 if plan.kind == "tile" else 0
        threads = plan.lanes * plan.cluster * max(1, plan.tile_rows) / 32
        by_class["ALU"] += (loss.left_out + loss.left_out_of_step * steps) * threads / logits
    return Count(case, plan, sum(by_class.values()), by_class)


def compile_kernels(sources: Iterable[str], folder: Path) -> list[sass.Kernel]:
    """Their kernels for sm_90, two files at a time."""

    def compiled(source: str) -> list[sass.Kernel]:
        virtual = (
            90 if source in ("register_forward", "passes", "tempered_passes") else 80
        )  # as CMakeLists.txt does by default
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
    factors |= {name: other.kept for name, other in OTHERS.items()}
    planned = [case for case in cases if case.kind != "lanes"]
    asked = [
        f"{case.kind}:{case.dtype}:{factors[case.loss]}:{case.classes}:{case.rows}:{NAMES.get(case.loss, 'none')}"
        for case in planned
    ]
    lines = subprocess.run([str(program), *asked], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {case: Plan(kind, *map(int, n)) for case, (kind, *n) in zip(planned, map(str.split, lines), strict=True)}
    return [found.get(case) or plan_of_lanes(case.classes, case.loss == "ELR") for case in cases]


def reason(case: Case) -> str:
    """Why a case misses its budget."""
    if case.loss in PASSES:
        return PASSES[case.loss].miss
    if case.loss in OTHERS:
        return OTHERS[case.loss].miss
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
        sources = SOFTMAX | SEVERAL_PASSES | LOOPS
        cases += [Case(loss, dtype, classes) for loss in PASSES for dtype in DTYPES for classes in PASSES_CLASSES]
        cases += [
            Case(loss, dtype, n) for loss, other in OTHERS.items() for dtype in other.moved for n in PASSES_CLASSES
        ]
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
