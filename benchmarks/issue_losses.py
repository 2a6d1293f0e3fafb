"""The kernels that issue_report.py counts: what a warp has to do for a row, budgets, and why they are missed."""

from __future__ import annotations

import re
from dataclasses import dataclass

CLASSES = (10, 19, 33, 100, 150, 257, 1000, 1001, 4099, 21841, 50257, 128256)
FEW_CLASSES = (10, 100, 1000)
DTYPES = ("bfloat16", "float32")  # float16 differs from bfloat16 in two conversions, of one instruction each
# How a kernel's name spells them.
MANGLED = {"bfloat16": r"BFloat16E", "float16": r"4HalfE", "float32": r"f"}
NAMES = {"p_y": "cross_entropy", "NCE": "nce", "pixels p_y": "cross_entropy"}
NAMES |= {"HEM": "hem", "HEM, with statistics": "hem"}
NAMES |= {
    "class probabilities": "none",
    "p_y, with statistics": "cross_entropy",
    "multi-margin": "multi_margin",
    "NGCE": "ngce",
    "SGCE": "sgce",
    "AMSE": "amse",
    "bi-tempered": "bi_tempered",
}

# Losses that kernels of softmax losses tell apart at run time, once a row. Functions of p_y and whether y is the
# largest, as cross entropy, which is "p_y" in the table; and those with a sum over the classes.
OF_P_Y = (
    *("mae", "gce", "agce", "aue", "ae", "rce", "sce", "taylor_ce", "phuber_ce", "js", "focal", "bounded_ce", "poly"),
    *("phuber_gce", "truncated_gce", "ece", "ece_mae", "efl_mae"),
)
SHARES = "class probabilities"  # floats: each class has a share, most of them none, of the loss that it would have
WITH_STATISTICS, LOOKS = "p_y, with statistics", "HEM, with statistics"  # of the rows, beside loss and gradient
OF_SUMS = ("NCE", "nce_mae", "nce_rce", "nce_agce", "nce_aue", "cores", "unhinged")


@dataclass(frozen=True)
class MultiReduction:
    """A multi-reduction loss whose row stays in registers."""

    kept: int  # numbers of a class
    budget: int | None
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
    looks: bool = False  # with row statistics, for which it reads a row in shared memory twice more


MARGIN = (
    "HEM and multi-margin, 10 classes: in float32 the budget is that of 16 bits; 10 instructions a class for memory "
    "and tiles, 14 for its error, its part of the sums and its gradient, 120 a row"
)
POWER = (
    "NGCE, 10 classes: in float32 the budget is that of 16 bits; 25 a class, 12 of them for its two exponentials, and "
    "240 a row for a logarithm, powers and a division"
)
TEMPERED = (
    "bi-tempered, 10 classes: in float32 the budget is that of 16 bits; 60 instructions a class in seven passes, and "
    "270 a row for the powers and logarithms between them"
)
NORMALISED = (
    "NFL and JAL up to 100 classes: 26 and 31 instructions a class, in float32, whose budget is that of 16 bits, 29 "
    "and 35: for an exponential, 1 - p and its root, the numbers made of these, three sums or four and the gradient; "
    "and 235 a row, in float32 260"
)
TWO_POWERS = {"MUFU.EX2": 2, "FADD": 4}
FOCAL = {"MUFU.EX2": 1, "MUFU.RSQ": 1}  # of gamma = 0.5, and of 0 by the same kernel
MULTI_REDUCTION = {
    "HEM": MultiReduction(1, 30, r"MarginLossI.*KnowingILb1ELb0E", 3, False, {"FADD": 2}, {}, MARGIN),
    LOOKS: MultiReduction(1, None, r"MarginLossI.*KnowingILb1ELb0E", 7, False, {}, {}, "", looks=True),
    "multi-margin": MultiReduction(1, 30, r"MarginLossI.*KnowingILb0ELb0E", 2, False, {"FADD": 1}, {}, MARGIN),
    "NGCE": MultiReduction(2, 45, r"PowerLossI.*ELb1E", 4, True, TWO_POWERS, {"MUFU.EX2": 3}, POWER),
    "SGCE": MultiReduction(2, None, r"PowerLossI.*ELb1E", 4, True, TWO_POWERS, {"MUFU.EX2": 2}, ""),
    "AMSE": MultiReduction(2, None, r"PowerLossI.*ELb1E", 4, True, TWO_POWERS, {"MUFU.EX2": 2}, ""),
    "bi-tempered": MultiReduction(1, 90, r"BiTemperedOfILi5ELb1E", 10, True, {"MUFU.RCP": 7}, {}, TEMPERED, 91, 57),
    "NFL": MultiReduction(2, 45, r"NormalizedLossI.*NFLAnd", 4, True, FOCAL, {}, NORMALISED),
    "JAL": MultiReduction(2, 45, r"NormalizedLossI.*NFLSumOfI.*SecondE2E", 5, True, FOCAL, {}, NORMALISED),
    "NNFL": MultiReduction(2, None, r"NormalizedLossI.*NFLSumOfI.*SecondE1E", 6, True, FOCAL, {}, ""),
    "NNCE": MultiReduction(2, None, r"NormalizedLossI.*NFLSumOfI.*SecondE1E", 6, True, FOCAL, {}, ""),
    "LDR-KL": MultiReduction(2, None, r"LDRKLOf", 5, True, {"MUFU.EX2": 2, "MUFU.RCP": 1}, {}, ""),
    # LogitNorm or LogitClip, and the loss inside, in one read.
    "LogitNorm of p_y": MultiReduction(
        2, None, r"RescaledOf", 4, True, {"MUFU.EX2": 1, "FADD": 3}, {"MUFU.RSQ": 1}, ""
    ),
}

# What hides behind memory: a kernel may take this part of the issue slots that a copy of its bytes leaves.
FULL = 0.7


@dataclass(frozen=True)
class Other:
    """A kernel that goes over the classes of a row in loops."""

    moved: dict[str, float]  # bytes of device memory for a logit, by dtype
    kernel: str  # how the names of its kernels begin
    per_class: dict[str, int]  # instructions that a lane needs for each of its classes, among others
    sums: int  # that the lanes of a row add up together, or largest numbers
    has_label: bool = True
    per_row: dict[str, int] | None = None
    views: int = 1
    # Where short rows stay in registers: how the name of those kernels begins, and what they need for each class.
    in_registers: str = ""
    per_class_held: dict[str, int] | None = None


RESCALED = {"bfloat16": 6.0, "float32": 8.0}
RESCALED_BACK = {"bfloat16": 8.0, "float32": 12.0}
NORM_CLASS, NORM_CLASS_BACK = {"STG.!64": 1, "LDG": 2}, {"STG": 1, "LDG": 4}
# LogitNorm takes a reciprocal where LogitClip divides, of a row that it clips; backward, both divide twice more.
NORMS, CLIPS = {"ISETP.GT.U32": 2}, {"FCHK": 1}
NORMS_BACK, CLIPS_BACK = {"ISETP.GT.U32": 1, "FCHK": 2}, {"FCHK": 3}
OTHERS = {
    "statistics": Other({"bfloat16": 2.0, "float32": 4.0}, "10statistics", {"MUFU.EX2": 1, "LDG.!64": 1}, 5),
    "LogitNorm": Other(RESCALED, "7rescale", NORM_CLASS, 1, False, per_row=NORMS),
    "LogitNorm backward": Other(RESCALED_BACK, "7rescale", NORM_CLASS_BACK, 1, False, per_row=NORMS_BACK),
    "LogitClip": Other(RESCALED, "7rescale", NORM_CLASS, 1, False, per_row=CLIPS),
    "LogitClip backward": Other(RESCALED_BACK, "7rescale", NORM_CLASS_BACK, 1, False, per_row=CLIPS_BACK),
    "ELR": Other(
        {"bfloat16": 14.0, "float32": 16.0},
        "8elr_rows",
        {"MUFU.EX2": 4, "STG": 2},
        4,
        in_registers=r"8elr_rowsI.*fLi8ELi13E",
        per_class_held={"MUFU.EX2": 1, "LDG": 2, "STG": 2},
    ),
    "GJS of two views": Other(
        {"float32": 8.0},
        "3gjsI",
        {"MUFU.EX2": 14, "STG": 2},
        6,
        views=2,
        in_registers="16gjs_in_registers",
        per_class_held={"MUFU.EX2": 2, "LDG": 2, "STG": 2},
    ),
    # Chunks of 8 classes take 9 exponentials; see trips_of_entropies().
    "Z-Error entropies": Other({"bfloat16": 2.0, "float32": 4.0}, "masked_lossIfLb1", {}, 4),
}


@dataclass(frozen=True)
class OfRows:
    """A kernel that gives every thread a row, float32 here: types are looked up for each number, at like costs."""

    kernel: str
    moved: float  # bytes of device memory for a row
    work: dict[str, int]
    trips: float = 1  # of a warp, for 32 rows


WORD = "LDG.!64.!U16.!U8.!S8"
JUDGED = {"LDG.64": 3, "MUFU.RCP64H": 2, "MUFU.RSQ64H": 1, "STG.U8": 1}  # by the moments of its group
LABELLED, UNLABELLED = {"DSETP": 10}, {"DSETP": 5}
BACKWARD = {WORD: 4, "LDG.U8": 1, "STG.!64.!U16": 1}
OF_ROWS = {
    # 1024 rows of two groups: each of the 8 warps brings 4 times 32 scores, then looks at those of a segment of 8.
    "Z-Error moments, binary": OfRows(
        "reduce_moments", 8, {WORD: 8, "STS.64": 4, "STS.!64": 4, "LDS.64": 8, "BAR": 2}, trips=8 / 32
    ),
    "Z-Error mask, binary": OfRows("mask_rows", 9, JUDGED | LABELLED | {WORD: 2}),
    "Z-Error loss, binary": OfRows("masked_lossIfLb0", 9, JUDGED | LABELLED | {WORD: 4, "MUFU.EX2": 1, "DADD": 2}),
    "Z-Error loss, squares": OfRows("masked_lossIfLb0", 9, JUDGED | UNLABELLED | {WORD: 4, "DADD": 2}),
    "Z-Error gradient, binary": OfRows("gradientIf", 13, BACKWARD | {"MUFU.EX2": 1}),
    "Z-Error gradient, squares": OfRows("gradientIf", 13, BACKWARD),
}

EVALUATED = "30 instructions a row choose the loss at run time and evaluate it"
CHOSEN = (
    "other losses of p_y than cross entropy: it takes 20 instructions a row (ae, phuber_ce) to 105 (efl_mae) to choose "
    "the loss at run time and evaluate it, to rounding, in every lane of a row"
)
CHOSEN_WITH_SUMS = "NCE with a second loss: the same, 30 to 70 instructions a row more than for NCE alone"
# Why softmax losses miss their budgets, by loss, dtype and whether there are more than 256 classes.
MISSES = {
    ("p_y", "bfloat16", True): (
        "p_y, 257 classes of 16 bits: 8 rows are the fewest that end at 16 bytes, twice as many do not fit, so that "
        "bringing and sending a tile costs 3 instructions a logit; p_y of 16 bits from 4099 classes on: 2 to 3 a "
        "logit for the way through shared memory, on which the next row is, and for exponentials relative to a warp's "
        "largest; 140 of a warp's instructions a row are sums over warps and blocks, and a tenth of the threads' "
        "places stay empty (on an H100 instructions do not limit these kernels: profile.md)"
    ),
    ("p_y", "float32", True): "p_y in float32 from 21841 classes on: the same",
    ("NCE", "bfloat16", False): f"NCE, 10 classes: {EVALUATED}",
    ("NCE", "float32", False): (
        "NCE in float32 up to 100 classes: its budget is that of 16 bits, while p_y alone is allowed 40 and 33; "
        + EVALUATED
    ),
}


def softmax_budget(loss: str, size: int, classes: int) -> int | None:
    """That of a softmax loss, with logits of so many bytes."""
    if loss in OF_SUMS:
        return 30 if re.match("nce", loss, re.IGNORECASE) else None
    if loss == "pixels p_y":
        return 26 if size == 2 else 40
    budget = ((26, 21, 15) if size == 2 else (40, 33, 28))[(classes > 32) + (classes > 256)]
    return budget * 4 // 3 if loss in ("focal", "js") and classes <= 100 else budget


def reason(loss: str, dtype: str, classes: int) -> str:
    """Why a case misses its budget."""
    if loss in MULTI_REDUCTION:
        return MULTI_REDUCTION[loss].miss
    if loss in OF_P_Y:
        return CHOSEN
    if loss in OF_SUMS and loss != "NCE":
        return CHOSEN_WITH_SUMS
    return MISSES.get((loss, dtype, classes > 256), f"{loss}, {dtype}, {classes} classes: no reason is known")
