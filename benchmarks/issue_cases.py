"""What issue_report.py counts: kernels by shape and dtype, and how a warp goes through their loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TypeAlias

from benchmarks.issue_losses import (
    CLASSES,
    DTYPES,
    FEW_CLASSES,
    LOOKS,
    MANGLED,
    MULTI_REDUCTION,
    OF_P_Y,
    OF_ROWS,
    OF_SUMS,
    OTHERS,
    SHARES,
    WITH_STATISTICS,
    WORD,
    MultiReduction,
    Other,
    softmax_budget,
)


@dataclass(frozen=True)
class Case:
    """A shape of many rows, and what its loss asks for."""

    loss: str  # "p_y" is cross entropy, "pixels p_y" that of pixels; the others as in issue_losses.py
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
    def moved(self) -> float:
        """Bytes of device memory for a logit, labels of 8 bytes counted."""
        if self.loss in OF_ROWS:
            return OF_ROWS[self.loss].moved
        if self.loss == SHARES:
            return 2.0 * self.size + 4
        other = OTHERS.get(self.loss)
        has_label = other is None or other.has_label
        return (other.moved[self.dtype] if other else 2 * self.size) + (8 / self.classes if has_label else 0)

    @property
    def budget(self) -> int | None:
        """The most instructions per logit that it should need, if that is stated."""
        if self.loss in MULTI_REDUCTION:
            return MULTI_REDUCTION[self.loss].budget
        if self.loss in OTHERS or self.loss in OF_ROWS or self.loss in (SHARES, WITH_STATISTICS):
            return None
        return softmax_budget(self.loss, self.size, self.classes)


def cases(*, quick: bool) -> list[Case]:
    """All, or those of a few kernels of softmax losses that are counted in seconds."""
    found = [Case("p_y", dtype, classes) for dtype in DTYPES for classes in CLASSES]
    found += [Case("NCE", dtype, n) for dtype in DTYPES for n in FEW_CLASSES if not (quick and n == 100)]
    found += [Case("pixels p_y", dtype, classes) for dtype in DTYPES for classes in (19, 150)]
    if quick:
        return found
    chosen = [loss for loss in OF_P_Y + OF_SUMS if loss != "NCE"]
    found += [
        Case(loss, dtype, n)
        for loss in (*chosen, *MULTI_REDUCTION, SHARES, WITH_STATISTICS)
        for dtype in DTYPES
        for n in (FEW_CLASSES if loss != LOOKS else (1000,))  # in tiles, that search takes minutes
    ]
    found += [Case(loss, dtype, n) for loss, other in OTHERS.items() for dtype in other.moved for n in FEW_CLASSES]
    return found + [Case(loss, "float32", 1) for loss in OF_ROWS]


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
    number: int  # of the loss
    # Where kernels read what, in bytes from their first argument: the number of the loss among them.
    told: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        if self.kind == "tile":
            return f"tile of {self.tile_rows} rows, {self.lanes} x {self.held}"
        if self.kind == "columns":
            return f"{self.lanes} warps x {self.held}"
        if self.kind == "lanes":
            return "device memory"
        blocks = f"{self.cluster} blocks x " if self.cluster > 1 else ""
        return f"{blocks}{self.lanes} x {self.held}"


def plan_of_lanes(case: Case, in_registers: Container[str]) -> Plan:
    """How other kernels share out rows (row_sums.cuh, z_error.cu, elr.cu, gjs.cu)."""
    most = 32 * 32 if case.loss == "GJS of two views" else 8 * 13
    if case.loss in in_registers and case.classes <= most:
        lanes, held = (1, 10) if case.classes <= 10 else (8, 13) if case.classes <= 8 * 13 else (32, 32)
        return Plan("held", 0, lanes, held, 0, 0, 0, 256, 1, 1, -1)
    lanes = 1 if case.classes <= 16 else 8 if case.classes <= 256 and case.loss != "ELR" else 32
    return Plan("lanes", 0, lanes, -(-case.classes // lanes), 0, 0, 0, 256, 1, 1, -1)


def kind_of(case: Case) -> str:
    """How its rows lie, as launch_plans.cpp calls it; "lanes" if it plans nothing for them."""
    if case.loss in OTHERS or case.loss in OF_ROWS:
        return "lanes"
    return "pixels" if case.loss == "pixels p_y" else "rows"


def factors_of(case: Case) -> int:
    """Of the C++ enumeration KernelKind."""
    if case.loss in (SHARES, WITH_STATISTICS):
        return 2 + (case.loss == WITH_STATISTICS)
    return 3 + MULTI_REDUCTION[case.loss].kept if case.loss in MULTI_REDUCTION else int(case.loss in OF_SUMS)


def multi_reduction_of(case: Case, plan: Plan) -> MultiReduction | None:
    """The multi-reduction loss, if the plan keeps its rows in registers."""
    return MULTI_REDUCTION.get(case.loss) if plan.kind in ("tile", "direct") else None


# Work of a loop's trip, whether that is the outermost loop, and how many trips; for how many logits / 32.
Trips: TypeAlias = tuple[list[tuple[dict[str, int], bool, float]], float]

# Reading the label of a later row.
LABEL = {"LDG.64": 1}
LOSS = {"DADD": 2}  # added up in doubles, with its weight


def work_of_row(case: Case, plan: Plan) -> tuple[dict[str, int], int]:
    """What a thread has to do for its part of a row besides reading and writing it, and how many numbers it reduces."""
    row = LOSS | ({} if case.loss == SHARES else LABEL)
    largest = {"VHMNMX|HMNMX2": plan.held // 4} if case.size == 2 else {"FMNMX": plan.held - 1}
    if loss := multi_reduction_of(case, plan):
        row |= Counter({op: n * plan.held for op, n in loss.per_class.items()}) + Counter(loss.per_row)
        if loss.looks:
            row |= {"MUFU.EX2": plan.held + 1, "STG.64": 1, "STG.!64.!128.!U16": 5}
        return row | (largest if loss.needs_max else {}), loss.sums
    row |= largest | {"MUFU.EX2": plan.held, "MUFU.RCP": 1}
    if case.size == 2:
        row |= {"MUFU.LG2": 1}
    if case.loss == SHARES:
        return row, 5
    if case.loss == WITH_STATISTICS:  # beside the loss's sum and largest: the sum for the entropy, the lowest class
        return row | {"STG": 6, "MUFU.EX2": plan.held + 2} | ({"MUFU.LG2": 2} if case.size == 2 else {}), 4
    if case.loss in OF_SUMS:  # sums of exponentials and of arguments, which float32 makes one by one
        row |= {"FADD": (2 if case.size == 2 else 3) * plan.held - 4}
    return row, 4 if case.loss in OF_SUMS else 2


def trips(case: Case, plan: Plan) -> Trips:
    """How a warp goes through the case's kernel."""
    if plan.kind == "columns":
        return trips_of_columns(case, plan)
    if case.loss in OF_ROWS:
        return [(OF_ROWS[case.loss].work, False, OF_ROWS[case.loss].trips)], 1
    if case.loss == "Z-Error entropies":
        return trips_of_entropies(case, plan)
    if case.loss in OTHERS and not multi_reduction_of(case, plan):
        return trips_of_other(OTHERS[case.loss], case, plan)
    halves = case.size == 2
    words = plan.held // 2 if halves else plan.held
    beside = case.classes * case.size % (4 if plan.kind == "tile" else 16) != 0  # numbers beside the whole accesses
    shares, single = case.loss == SHARES, beside + (case.loss != SHARES)  # the label's logit is read by itself
    row, reduced = work_of_row(case, plan)
    loss = multi_reduction_of(case, plan)
    reads = 3 if loss and loss.looks else 1  # of the row in shared memory
    if plan.kind == "tile":
        accesses = -(-plan.tile_rows * case.classes * case.size // 512)
        steps = plan.lanes.bit_length() - 1
        row |= {"SHFL": reduced * steps} if steps else {}
        if halves:
            row |= {"LDS.!64.!U16.!128": reads * words, "STS.!64.!U16": words}
            row |= {"LDS.U16": single, "STS.U16": single} if single else {}
        else:
            row |= {"LDS.!64.!128": reads * words + single, "STS.!64": words + single}
        row |= {"LDG.!64.!128": plan.held} if shares else {}
        # What is done once a tile is what a trip of the outer loop needs more than the trip of the inner one in it.
        start = LOSS | {"STS.64": 2} | ({} if shares else LABEL)  # the sums are kept in shared memory
        asked = {} if shares else {"CCTL": 1}  # the labels of the next tile
        return [
            (start | {"LDGSTS": accesses, "STG.128": accesses} | asked, True, 1),
            (start, False, -1),
            (row, False, plan.tile_rows * plan.lanes / 32),
        ], plan.tile_rows * case.classes / 32
    accesses = plan.held * case.size // 16
    steps = 5 * (1 + (plan.lanes > 32) + (plan.cluster > 1))  # of a warp, of the warps of a block, of blocks
    row |= {"LDGSTS": accesses, "LDS.128": reads * accesses, "STG.128": accesses, "SHFL": reduced * steps}
    row |= {"LDG.128": plan.held // 4} if shares else {}
    width = "U16" if halves else "!64.!128"
    row |= {f"LDG.{width}": single, f"STG.{width}": single} if single else {}
    return [(row, True, plan.lanes / 32 * plan.cluster)], case.classes / 32


def trips_of_entropies(case: Case, plan: Plan) -> Trips:
    """The same for scores that Z-Error makes of logits, chunks of 8 classes of a lane."""
    work = {"LDG.64": 1, "MUFU.EX2": 9 * -(-plan.held // 8) + 1, "LDG.U16" if case.size == 2 else WORD: plan.held + 1}
    if steps := plan.lanes.bit_length() - 1:
        work["SHFL"] = OTHERS[case.loss].sums * steps
    return [(work, False, 1)], case.classes / plan.lanes


def by_four(
    work_of: Callable[[int], dict[str, int]], held: int, sums: dict[str, int]
) -> list[tuple[dict[str, int], bool, float]]:
    """A row by a search for a few of a lane's classes, and one for four more, a loop's trip, which tells what all take.

    A search for all of them takes minutes, and so does one for sums over lanes besides: that is done for one class.
    """
    few = (held - 1) % 4 + 1
    rest = (held - few) / 4
    found = [(work_of(few), True, 1 - rest)]
    found += [(work_of(few + 4), True, rest)] if rest else []
    found += [(work_of(1) | sums, True, 1.0), (work_of(1), True, -1.0)] if sums else []
    return found


def trips_of_other(other: Other, case: Case, plan: Plan) -> Trips:
    """The same for kernels with loops over the classes of a lane."""
    steps = plan.lanes.bit_length() - 1
    sums = {"SHFL": other.sums * steps} if steps else {}
    of_row = (LABEL if other.has_label else {}) | (other.per_row or {})
    logits = other.views * case.classes / plan.lanes
    per_class = (other.per_class_held or {}) if plan.kind == "held" else other.per_class

    def row_of(n: int) -> dict[str, int]:
        return of_row | {op: m * n for op, m in per_class.items()}

    if plan.kind == "lanes" and per_class.get("MUFU.EX2", 0) > 1:
        return by_four(row_of, plan.held, sums), logits
    return [(row_of(plan.held) | sums, True, 1)], logits


def trips_of_columns(case: Case, plan: Plan) -> Trips:
    """The same for pixels: each is finished by one of the warps that share its classes."""
    columns = 4 // case.size  # of a lane
    share = -(-case.classes // plan.lanes)
    exponentials = (2 if columns == 2 else 1) * plan.held * columns + columns  # those of two columns once more
    work = {"MUFU.EX2": exponentials, "LDG.!64.!U16": share, "STG.!U16": share}
    work |= {op: n * columns for op, n in LABEL.items()}
    work |= {"VHMNMX|HMNMX2": plan.held // 2} if columns == 2 else {"FMNMX": plan.held // 2}
    if plan.lanes == 1:
        return [(work | {"DADD": 2 * columns, "MUFU.RCP": columns}, True, 1)], columns * case.classes
    work["BAR"] = 3
    finishing = (work | {"DADD": 2, "MUFU.RCP": 1}, True, float(columns))
    return [finishing, (work, True, plan.lanes - columns)], columns * case.classes


def kernel_name(case: Case, plan: Plan) -> str:
    """A pattern that finds the kernel of a plan by its parameters."""
    if case.loss in OF_ROWS:
        return OF_ROWS[case.loss].kernel
    stored = MANGLED[case.dtype]
    if loss := multi_reduction_of(case, plan):
        if plan.kind == "tile":
            lanes = 1 if plan.lanes == 1 and plan.held == 10 else 0
            return rf"multi_reduction_in_register_tilesI.*{loss.kernel}.*{stored}Li{lanes}ELi{plan.held}E"
        team = "WarpTeam" if plan.lanes == 32 else "RowTeam"
        return rf"multi_reduction_in_registersI.*{loss.kernel}.*{stored}Li{plan.held}E.*{team}"
    if case.loss in OTHERS:
        return other_kernel_name(case, plan)
    factors = rf"LNS0_10KernelKindE{plan.factors}E"
    if plan.kind == "columns":
        return rf"softmax_in_columnsI.*{stored}{factors}Li{plan.held}E"
    if plan.kind == "tile":
        lanes = plan.lanes if plan.factors == 0 or plan.held == 10 else 0
        return rf"softmax_in_tilesI.*{stored}{factors}Li{lanes}ELi{plan.held}E"
    team = "WarpTeam" if plan.lanes == 32 else "RowTeam"
    return rf"softmax_in_registersI.*{stored}{factors}Li{plan.held}E.*{team}"


def other_kernel_name(case: Case, plan: Plan) -> str:
    """The same for kernels with loops over classes."""
    name, stored, lanes = OTHERS[case.loss].kernel, MANGLED[case.dtype], f"Li{plan.lanes}E"
    if name == "7rescale":
        return rf"{name}I.*{stored}{lanes}Lb{int('backward' in case.loss)}E"
    if name == "masked_lossIfLb1":
        return name
    if plan.kind == "held":
        held = f"{lanes}Li{plan.held}E"
        return rf"{name}I.*{stored}f{held}" if name == "8elr_rows" else rf"{OTHERS[case.loss].in_registers}I{held}"
    return rf"{name}.*{stored}{'f' if name == '8elr_rows' else ''}{lanes}"
