"""What issue_report.py counts: kernels by shape and dtype, their budgets, and what a warp has to do for its rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

CLASSES = (10, 19, 33, 100, 150, 257, 1000, 1001, 4099, 21841, 50257, 128256)
DTYPES = ("bfloat16", "float32")  # float16 differs from bfloat16 in two conversions, of one instruction each
STORED = {"bfloat16": "BFloat16", "float16": "Half", "float32": "float"}
# How a kernel's name spells them.
MANGLED = {"bfloat16": r"BFloat16E", "float16": r"4HalfE", "float32": r"f"}
NAMES = {"p_y": "cross_entropy", "NCE": "nce", "pixels p_y": "cross_entropy", "HEM": "hem"}
NAMES |= {"multi-margin": "multi_margin", "NGCE": "ngce", "bi-tempered": "bi_tempered"}
# The function that evaluates any of the losses that kernels tell apart at run time, and where it reads the number.
EVALUATION, LOSS_AT = "evaluate_anyIf", re.escape("c[0x0][0x2b8]")
# Of the C++ enumeration.
FACTORS = {"p_y": 0, "NCE": 1, "pixels p_y": 0}


@dataclass(frozen=True)
class Passes:
    """A loss of several passes whose row stays in registers."""

    kept: int  # numbers of a class
    budget: int
    kernel: str  # how the name of its kernels spells it
    sums: int  # that the lanes of a row add up together, or largest numbers
    needs_max: bool
    per_class: dict[str, int]  # instructions that forward needs for each class, among others
    per_row: dict[str, int]
    miss: str  # why it misses its budget
    # Of a row and a thread, counted by hand: what the search leaves out, where steps of a loop may take different ways,
    # and of that for each step of a sum over a few lanes.
    left_out: int = 0
    left_out_of_step: int = 0


MARGIN = (
    "HEM and multi-margin in float32, 10 classes: the budget is that of 16 bits; 10 instructions a class for memory "
    "and tiles, 14 for its error, its part of the sums and its gradient, 110 a row"
)
POWER = (
    "NGCE in float32, 10 classes: the budget is that of 16 bits; 25 a class, 12 of them for its two exponentials, and "
    "250 a row for a logarithm, powers and a division"
)
TEMPERED = (
    "bi-tempered, 10 classes: 60 instructions a class in seven passes, and 300 a row for the powers and logarithms "
    "between them"
)
PASSES = {
    "HEM": Passes(1, 30, r"MarginLossI.*KnowingILb1ELb0E", 3, False, {"FADD": 2}, {}, MARGIN),
    "multi-margin": Passes(1, 30, r"MarginLossI.*KnowingILb0ELb0E", 2, False, {"FADD": 1}, {}, MARGIN),
    "NGCE": Passes(2, 45, r"PowerLossI.*ELb1E", 4, True, {"MUFU.EX2": 2, "FADD": 4}, {"MUFU.EX2": 3}, POWER),
    "bi-tempered": Passes(1, 90, r"BiTemperedOfILi5ELb1E", 10, True, {"MUFU.RCP": 7}, {}, TEMPERED, 91, 57),
}
PASSES_CLASSES = (10, 100, 1000)

FULL = 0.7  # of the issue slots may be taken
SLOTS_OF_BYTE = 32 * 132 * 4 * 1.98e9 / 4.3e12  # of an H200, by 32 lanes, at the speed of a copy


@dataclass(frozen=True)
class Other:
    """A kernel that goes over the classes of a row in loops.

    Its budget is what hides behind memory on an H200: 70 % of the issue slots that a copy of the same bytes leaves.
    """

    moved: dict[str, float]  # bytes of device memory for a logit, by dtype
    kernel: str  # how the names of its kernels begin
    per_class: dict[str, int]  # instructions that a lane needs for each of its classes, among others
    sums: int  # that the lanes of a row add up together, or largest numbers
    miss: str
    kept: int = 0  # numbers of a class in shared memory; 0: rows are read again where they lie
    has_label: bool = True
    budget: int = 0  # that of losses like it; 0: as above

    @property
    def classes(self) -> tuple[int, ...]:
        """Counted ones: where many ways lead through many loops, the search takes minutes a case."""
        return (10,) if self.kept or self.per_class.get("MUFU.EX2", 0) > 1 else PASSES_CLASSES


BOTH = {"bfloat16": 4.0, "float32": 8.0}
KEPT = (
    "NFL, JAL, LDR-KL and class probabilities: their rows are in shared memory, and each of five loops over them takes "
    "10 to 15 instructions a class besides its formula"
)
READ_AGAIN = (
    "statistics, LogitNorm, ELR and GJS: numbers are read and written one by one where they lie, 5 instructions for "
    "each with its address; statistics keep the two largest logits, a place and two sums, ELR takes 4 exponentials a "
    "class, GJS 7 of a class and view"
)
NFL_CLASS = {"MUFU.EX2": 1, "MUFU.RSQ": 1, "FMNMX": 1}
OTHERS = {
    "NFL": Other(BOTH, r"NormalizedLossI.*NFLMAE", NFL_CLASS | {"STS.!64": 6}, 4, KEPT, 2, budget=45),
    "JAL": Other(BOTH, r"NormalizedLossI.*NFLSum", NFL_CLASS | {"STS.!64": 7}, 6, KEPT, 3, budget=45),
    "LDR-KL": Other(BOTH, r"LDRKL", {"MUFU.EX2": 2, "MUFU.RCP": 1, "FMNMX": 1, "STS.!64": 6}, 5, KEPT, 2),
    "class probabilities": Other(
        {"bfloat16": 8.0, "float32": 12.0}, "labels", {"MUFU.EX2": 2, "FMNMX": 1, "STS.!64": 6}, 7, KEPT, 2, False
    ),
    "statistics": Other({"bfloat16": 2.0, "float32": 4.0}, "statistics", {"MUFU.EX2": 1}, 5, READ_AGAIN),
    "LogitNorm": Other({"bfloat16": 6.0, "float32": 8.0}, "rescale", {"STG.!64": 1, "LDG": 2}, 1, READ_AGAIN, 0, False),
    "LogitNorm backward": Other(
        {"bfloat16": 8.0, "float32": 12.0}, "rescale", {"STG": 1, "LDG": 4}, 1, READ_AGAIN, 0, False
    ),
    "ELR": Other({"bfloat16": 14.0, "float32": 16.0}, "elr_rows", {"MUFU.EX2": 4, "STG": 2}, 4, READ_AGAIN),
    "GJS of two views": Other({"float32": 8.0}, "gjs", {"MUFU.EX2": 14, "STG": 2}, 6, READ_AGAIN),
}
EVALUATED = "60 instructions a row choose the loss at run time and evaluate it"
# Why cases miss their budgets, by loss, dtype and whether there are more than 256 classes.
MISSES = {
    ("p_y", "bfloat16", True): (
        "p_y, 257 classes of 16 bits: 8 rows are the fewest that end at 16 bytes, twice as many do not fit, so that "
        "bringing and sending a tile costs 3.4 instructions a logit; p_y of 16 bits from 21841 classes on: 140 of a "
        "warp's 530 instructions are sums over warps and blocks, and a tenth of the threads' places stay empty"
    ),
    ("NCE", "bfloat16", False): f"NCE, 10 classes: {EVALUATED}",
    ("NCE", "float32", False): (
        "NCE in float32 up to 100 classes: its budget is that of 16 bits, while p_y alone is allowed 40 and 33; "
        + EVALUATED
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
        if self.loss in OTHERS:
            return "kept" if OTHERS[self.loss].kept else "lanes"
        return "pixels" if self.loss == "pixels p_y" else "rows"

    @property
    def budget(self) -> int:
        """The most instructions per logit that it should need."""
        if self.loss in PASSES:
            return PASSES[self.loss].budget
        if self.loss in OTHERS:
            return OTHERS[self.loss].budget or int(FULL * SLOTS_OF_BYTE * OTHERS[self.loss].moved[self.dtype])
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
    number: int  # of the loss

    def __str__(self) -> str:
        if self.kind == "tile":
            return f"tile of {self.tile_rows} rows, {self.lanes} x {self.held}"
        if self.kind == "columns":
            return f"{self.lanes} warps x {self.held}"
        if self.kind == "kept_tile":
            return f"tile of {self.tile_rows} rows, {self.lanes} x {self.held} in shared memory"
        if self.kind == "kept":
            return f"{self.lanes} x {self.held} in shared memory"
        if self.kind == "lanes":
            return "device memory"
        blocks = f"{self.cluster} blocks x " if self.cluster > 1 else ""
        return f"{blocks}{self.lanes} x {self.held}"


def plan_of_lanes(classes: int, is_elr: bool) -> Plan:
    """How kernels with nothing in registers share out rows (row_sums.cuh)."""
    lanes = 1 if classes <= 16 else 8 if classes <= 256 and not is_elr else 32
    return Plan("lanes", 0, lanes, -(-classes // lanes), 0, 0, 0, 256, 1, 1, -1)


# Reading a label, which is not the one that is ignored: it is compared with the number of classes.
LABEL = {"LDG.64": 1, "ISETP.GE.U32.EX": 1}
LOSS = {"DADD": 2}  # added up in doubles, with its weight


def work_of_row(case: Case, plan: Plan) -> tuple[dict[str, int], int]:
    """What a thread has to do for its part of a row besides reading and writing it, and how many numbers it reduces."""
    row = LABEL | LOSS
    largest = {"VHMNMX|HMNMX2": plan.held // 4} if case.size == 2 else {"FMNMX": plan.held - 1}
    if case.loss in PASSES:
        loss = PASSES[case.loss]
        row |= Counter({op: n * plan.held for op, n in loss.per_class.items()}) + Counter(loss.per_row)
        return row | (largest if loss.needs_max else {}), loss.sums
    row |= largest | {"MUFU.EX2": plan.held, "MUFU.RCP": 1}
    if case.size == 2:
        row |= {"MUFU.LG2": 1}
    if case.loss == "NCE":  # sums of exponentials and of arguments, which float32 makes one by one
        row |= {"FADD": (2 if case.size == 2 else 3) * plan.held - 4, "CALL": 1}
    return row, 4 if case.loss == "NCE" else 2


def trips(case: Case, plan: Plan) -> tuple[list[tuple[dict[str, int], bool, float]], float]:
    """Work of a loop's trip, whether that is the outermost loop, and how many trips; for how many logits / 32."""
    if plan.kind == "columns":
        return trips_of_columns(case, plan)
    if case.loss in OTHERS:
        return trips_of_other(OTHERS[case.loss], case, plan)
    halves = case.size == 2
    words = plan.held // 2 if halves else plan.held
    beside = case.classes * case.size % (4 if plan.kind == "tile" else 16) != 0  # numbers beside the whole accesses
    row, reduced = work_of_row(case, plan)
    if plan.kind == "tile":
        accesses = -(-plan.tile_rows * case.classes * case.size // 512)
        steps = plan.lanes.bit_length() - 1
        row |= {"SHFL": reduced * steps} if steps else {}
        if halves:
            row |= {"LDS.!64.!U16.!128": words, "LDS.U16": 1 + beside, "STS.!64.!U16": words, "STS.U16": 1 + beside}
        else:
            row |= {"LDS.!64.!128": words + 1, "STS.!64": words + 1}
        # What is done once a tile is what a trip of the outer loop needs more than the trip of the inner one in it.
        start = LABEL | LOSS | {"STS.64": 2}  # the sums are kept in shared memory
        return [
            (start | {"LDGSTS": accesses, "STG.128": accesses}, True, 1),
            (start, False, -1),
            (row, False, plan.tile_rows * plan.lanes / 32),
        ], plan.tile_rows * case.classes / 32
    accesses, single = plan.held * case.size // 16, "U16" if halves else "!64.!128"
    steps = 5 * (1 + (plan.lanes > 32) + (plan.cluster > 1))  # of a warp, of the warps of a block, of blocks
    row |= {"LDG.128": accesses, "STG.128": accesses, "SHFL": reduced * steps}
    row |= {f"LDG.{single}": 1 + beside, f"STG.{single}": 1 + beside}
    return [(row, True, plan.lanes / 32 * plan.cluster)], case.classes / 32


def trips_of_other(other: Other, case: Case, plan: Plan) -> tuple[list[tuple[dict[str, int], bool, float]], float]:
    """The same for kernels with loops over the classes of a lane."""
    steps = min(plan.lanes, 32).bit_length() - 1 + (5 if plan.lanes > 32 else 0)
    of_row = (LABEL if other.has_label else {}) | ({"SHFL": other.sums * steps} if steps else {})
    if plan.kind == "lanes":
        views = 2 if case.loss == "GJS of two views" else 1
        row = of_row | {op: n * plan.held for op, n in other.per_class.items()}
        return [(row, True, 1)], views * case.classes / plan.lanes
    # Loops of a class a trip, but for one that brings eight: what three more classes take tells what all take.
    tile = plan.kind == "kept_tile"
    read, write = ("LDS.U16", "STS.U16") if tile else ("LDG.U16", "STG.U16")

    def row_of(n: int) -> dict[str, int]:
        as_stored = {read: n, write: n} if case.size == 2 else {}
        return of_row | LOSS | {op: m * n for op, m in other.per_class.items()} | as_stored

    rows = plan.tile_rows * plan.lanes / 32 if tile else plan.lanes / 32 * plan.cluster
    thirds = (plan.held - 1) / 3
    levels: list[tuple[dict[str, int], bool, float]] = [
        (row_of(1), not tile, rows * (1 - thirds)),
        (row_of(4), not tile, rows * thirds),
        ({read: 8, "STS.!64": 8}, False, rows * ((plan.held - 1) // 8)),
    ]
    if not tile:
        return levels, case.classes / 32
    accesses = -(-plan.tile_rows * case.classes * case.size // 512)
    start = LOSS | {"STS.64": 2}
    levels += [(start | {"LDGSTS": accesses, "STG.128": accesses}, True, 1), (start, False, -1)]
    return levels, plan.tile_rows * case.classes / 32


def trips_of_columns(case: Case, plan: Plan) -> tuple[list[tuple[dict[str, int], bool, float]], float]:
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
    if case.loss in OTHERS:
        return other_kernel_name(case, plan)
    if case.loss in PASSES:
        loss = PASSES[case.loss].kernel
        if plan.kind == "tile":
            lanes = 1 if plan.lanes == 1 and plan.held == 10 else 0
            return rf"passes_in_register_tilesI.*{loss}.*{MANGLED[case.dtype]}Li{lanes}ELi{plan.held}E"
        team = "WarpTeam" if plan.lanes == 32 else "RowTeam"
        return rf"passes_in_registersI.*{loss}.*{MANGLED[case.dtype]}Li{plan.held}E.*{team}"
    factors = rf"LNS0_7FactorsE{plan.factors}E"
    if plan.kind == "columns":
        return rf"softmax_in_columnsI.*{MANGLED[case.dtype]}{factors}Li{plan.held}E"
    if plan.kind == "tile":
        lanes = plan.lanes if plan.factors == 0 or plan.held == 10 else 0
        return rf"softmax_in_tilesI.*{MANGLED[case.dtype]}{factors}Li{lanes}ELi{plan.held}E"
    team = "WarpTeam" if plan.factors == 0 and plan.lanes == 32 else "RowTeam"
    return rf"softmax_in_registersI.*{MANGLED[case.dtype]}{factors}Li{plan.held}E.*{team}"


def other_kernel_name(case: Case, plan: Plan) -> str:
    """The same for kernels with loops over classes."""
    name, stored, lanes = OTHERS[case.loss].kernel, MANGLED[case.dtype], f"Li{plan.lanes}E"
    if name == "labels":
        return "labels_in_tilesILb1E" if plan.kind == "kept_tile" else "labels_of_rowsIfLb1ELb1E"
    if plan.kind == "kept_tile":
        return rf"passes_in_tilesI.*{name}"
    if plan.kind == "kept":
        return rf"passes_of_rowsI.*{name}.*fLb1E"
    if name == "rescale":
        return rf"rescaleI.*{stored}{lanes}Lb{int('backward' in case.loss)}E"
    return rf"{name}I.*{stored}{'f' if name == 'elr_rows' else ''}{lanes}"
