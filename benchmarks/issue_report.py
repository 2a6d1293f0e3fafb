"""Warp instructions per logit of the CUDA kernels, counted in machine code for sm_90; needs no GPU.

    python benchmarks/issue_report.py [--markdown TABLE] [--check benchmarks/results/cuda_issue.md]

A kernel at the speed of a copy may issue so many warp instructions per logit (32 lanes, a logit each; 132
multiprocessors with 4 issue slots at 1.98 GHz): what fills more than 70 % of them does not hide behind memory. For
every case the launch plan says how a row is shared out, and ``sass.cheapest_trip`` finds the fewest instructions with
which a warp can do that: so many loads, exponentials, shuffles and stores, a label, and the loss added up in doubles;
in code without what only other losses and calls ask for (``known_numbers.py``). A search for the cheapest way takes
ways that no row takes: issue_cases.py asks for enough to rule them out, which the test of this file holds against
counts by hand. What runs once a block is left out. ``--check`` fails if a case needs a tenth more than in the table.
Needs nvcc, g++ and nvdisasm (PyPI: nvidia-cuda-nvdisasm).

Compiling takes 8 to 15 minutes on two cores, and 400 MB a file; what is compiled stays in build/cubins until its
sources change (cubins.py). Counting takes 5 minutes of one core, and 300 MB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cubins, known_numbers, sass  # noqa: E402
from benchmarks.issue_cases import (  # noqa: E402
    Case,
    Plan,
    cases,
    factors_of,
    kernel_name,
    kind_of,
    multi_reduction_of,
    plan_of_lanes,
    trips,
)
from benchmarks.issue_losses import FULL, NAMES, OTHERS, reason  # noqa: E402

SOFTMAX = ("register_tile", "register_direct", "softmax_columns")
REST = (
    *(path.stem for path in sorted(cubins.SOURCES.glob("multi_reduction_*.cu"))),
    *("softmax_labels", "row_statistics", "rescale", "elr", "gjs", "z_error"),
)
BYTES_PER_SECOND = {"H100": 3.0e12, "H200": 4.3e12}  # of a copy, read and write
SLOTS_PER_SECOND = 132 * 4 * 1.98e9
ARGUMENTS_AT = 0x210  # in the constants of a kernel
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
        """The part of the issue slots that it takes at the speed of a copy."""
        return self.total / 32 / SLOTS_PER_SECOND / (self.case.moved / BYTES_PER_SECOND[gpu])

    @property
    def is_missed(self) -> bool:
        return self.case.budget is not None and self.total > self.case.budget

    @property
    def is_slow(self) -> bool:
        """Whether no budget is stated, and it does not hide behind memory."""
        return self.case.budget is None and self.fill("H200") > FULL


Work = tuple[tuple[str, int], ...]
ROW_STATISTICS = "STG.64"  # of a multi-reduction loss leave a class number, which nothing else does in a loop
FOUND: dict[tuple[str, Work, bool], Counter[str]] = {}
OF_LOSS: dict[str, sass.Kernel] = {}


def of_loss(kernel: sass.Kernel, plan: Plan) -> sass.Kernel:
    """The kernel without the formulas of other losses, and what other calls ask for."""
    name = f"{kernel.name} of {plan.number}"
    if plan.told and name not in OF_LOSS:
        known = known_numbers.knowing(kernel, {f"c[0x0][{ARGUMENTS_AT + at:#x}]": number for at, number in plan.told})
        OF_LOSS[name] = replace(known, name=name)
    return OF_LOSS.get(name, kernel)


def units_of(kernel: sass.Kernel, work: Work, outermost: bool, never: str | None = None) -> Counter[str]:
    """Instructions of the cheapest trip by their unit; many cases differ in nothing but how often they make it."""
    key = (kernel.name, work, outermost)
    if key not in FOUND:
        FOUND[key] = sass.per_class(sass.cheapest_trip(kernel, dict(work), outermost=outermost, never=never))
    return FOUND[key]


def count(case: Case, plan: Plan, kernel: sass.Kernel) -> Count:
    """Counts the case in its kernel."""
    by_class = dict.fromkeys(COUNTED, 0.0)
    levels, logits = trips(case, plan)
    kernel = of_loss(kernel, plan)
    for work, outermost, times in levels:
        held = multi_reduction_of(case, plan)
        never = ROW_STATISTICS if held and not held.looks else None
        for unit, n in units_of(kernel, tuple(work.items()), outermost, never).items():
            by_class[unit] = by_class.get(unit, 0.0) + n * times / logits
    if loss := multi_reduction_of(case, plan):
        steps = plan.lanes.bit_length() - 1 if plan.kind == "tile" else 0
        threads = plan.lanes * plan.cluster * max(1, plan.tile_rows) / 32
        by_class["ALU"] += (loss.left_out + loss.left_out_of_step * steps) * threads / logits
    return Count(case, plan, sum(by_class.values()), by_class)


def plan_of(line: str) -> Plan:
    """What launch_plans.cpp has printed of a case."""
    kind, *words = line.split()
    told = [word.split(":") for word in words if ":" in word]
    return Plan(
        kind, *(int(word) for word in words if ":" not in word), told=tuple((int(at), int(n)) for at, n in told)
    )


def plans(asked: Sequence[Case], in_registers: Collection[str], folder: Path) -> list[Plan]:
    """The launch plans of the cases, by the planning code itself."""
    program = folder / "launch_plans"
    sources = [ROOT / "benchmarks" / "launch_plans.cpp"]
    sources += [ROOT / "csrc" / "cuda" / name for name in ("register_plan.cpp", "launch.cpp")]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp' / 'cuda_emulation'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    subprocess.run(["g++", "-std=c++20", "-O1", *includes, *map(str, sources), "-o", str(program)], check=True)
    kinds = {case: kind_of(case) for case in asked}
    planned = [case for case in asked if kinds[case] != "lanes"]
    given = []
    for case in planned:
        name = NAMES.get(case.loss, case.loss if case.loss.islower() else "none")
        given.append(f"{kinds[case]}:{case.dtype}:{factors_of(case)}:{case.classes}:{case.rows}:{name}")
    lines = subprocess.run([str(program), *given], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {case: plan_of(line) for case, line in zip(planned, lines, strict=True)}
    return [found.get(case) or plan_of_lanes(case, in_registers) for case in asked]


def count_all(asked: Sequence[Case], paths: Iterable[Path], folder: Path) -> tuple[list[Count], list[str]]:
    """Counts the cases in these cubins, one cubin after the other, and says which it could not count."""
    place_of = {name: path for path in paths for name in sass.names_in(path)}
    in_registers = [
        loss
        for loss, other in OTHERS.items()
        if other.in_registers and any(re.search(other.in_registers, name) for name in place_of)
    ]
    wanted: dict[Path, list[tuple[Case, Plan, str]]] = defaultdict(list)
    counts: dict[Case, Count] = {}
    failures = []
    for case, plan in zip(asked, plans(asked, in_registers, folder), strict=True):
        pattern = kernel_name(case, plan) if plan.kind != "none" else "no plan"
        name = next((name for name in place_of if re.search(pattern, name)), None)
        if name is None:
            failures.append(f"{case.loss} {case.dtype}, {case.classes}: there is no kernel {pattern}")
        else:
            wanted[place_of[name]].append((case, plan, name))
    for path, those in wanted.items():
        kernels = {kernel.name: kernel for kernel in sass.disassemble(path, {name for *_, name in those})}
        for case, plan, name in those:
            try:
                counts[case] = count(case, plan, kernels[name])
                found = f"{counts[case].total:.1f}"
            except ValueError as error:
                found = str(error)
                failures.append(f"{case.loss} {case.dtype}, {case.classes}: {error}")
            print(f"{case.loss} {case.dtype}, {case.classes}: {found}", file=sys.stderr, flush=True)
    return [counts[case] for case in asked if case in counts], failures


def names_of(counts: Iterable[Count]) -> str:
    """Losses, each once, with what was counted of them."""
    found: dict[str, list[str]] = defaultdict(list)
    for c in counts:
        budget = f" of {c.case.budget}" if c.case.budget is not None else ""
        found[c.case.loss].append(f"{c.case.dtype} {c.case.classes}: {c.total:.1f}{budget}")
    return "\n".join(f"- {loss}: {'; '.join(those)}" for loss, those in found.items())


def summary(counts: Sequence[Count], failures: Sequence[str]) -> list[str]:
    """What a reader wants to know first."""
    stated, rest = [c for c in counts if c.case.budget is not None], [c for c in counts if c.case.budget is None]
    missed, slow = [c for c in stated if c.is_missed], [c for c in rest if c.is_slow]
    lines = [f"**{len(stated) - len(missed)} of {len(stated)} stated budgets are met.**"]
    if missed:
        why = dict.fromkeys(reason(c.case.loss, c.case.dtype, c.case.classes) for c in missed)
        lines += ["Missed (instructions of budget):", "", names_of(missed), "", "Why:", ""]
        lines += [line for each in why for line in textwrap.wrap(f"- {each}.", 117, subsequent_indent="  ")]
    lines += [
        "",
        f"**Of {len(rest)} without a stated budget, {len(rest) - len(slow)} hide behind memory on an H200.**",
    ]
    lines += ["These do not:", "", names_of(slow)] if slow else []
    lines += ["", "**Not counted:**", "", *(f"- {failure}" for failure in failures)] if failures else []
    return lines


def markdown(counts: Sequence[Count], failures: Sequence[str] = ()) -> str:
    """The table, as a page."""
    lines = [
        "# Warp instructions per logit",
        "",
        "Forward that writes the gradient, many rows, sm_90; written by `python benchmarks/issue_report.py --markdown",
        "benchmarks/results/cuda_issue.md`, whose head says how they are counted. Full: the part of the issue slots",
        "that is taken at the speed of a copy; above 70 % a kernel does not hide behind memory. Conflicts: how many",
        "lanes ask the same bank of shared memory. Where there is 1 class, a row is a logit.",
        "",
        *summary(counts, failures),
        "",
        f"| loss | dtype | classes | rows are in | instructions | {' | '.join(COUNTED)} | conflicts "
        "| full H100 | full H200 | budget | |",
        f"|---|---|--:|---|--:|{'--:|' * len(COUNTED)}--:|--:|--:|--:|---|",
    ]
    for c in counts:
        units = " | ".join(f"{c.by_class.get(unit, 0):.1f}" for unit in COUNTED)
        fills = " | ".join(f"{100 * c.fill(gpu):.0f} %" for gpu in BYTES_PER_SECOND)
        stated = "none stated" if c.case.budget is None else str(c.case.budget)
        verdict = "missed" if c.is_missed else "met" if c.case.budget is not None else "slow" if c.is_slow else ""
        lines.append(
            f"| {c.case.loss} | {c.case.dtype} | {c.case.classes} | {c.plan} | {c.total:.1f} | {units} | "
            f"{c.plan.conflicts} | {fills} | {stated} | {verdict} |"
        )
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
    parser.add_argument("--quick", action="store_true", help="only cross entropy and NCE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [cubins.SOURCES / f"{stem}.cu" for stem in (SOFTMAX if args.quick else SOFTMAX + REST)]
        paths = cubins.in_library(args.library, folder) if args.library else cubins.compile_all(sources)
        counts, failures = count_all(cases(quick=args.quick), paths, folder)
    page = markdown(counts, failures)
    print(page)
    if args.markdown:
        args.markdown.write_text(page)
    failures += grown(counts, read_table(args.check.read_text())) if args.check else []
    print("\n".join(f"issue_report: {failure}" for failure in failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
