"""The counting of instructions: kernels counted by hand, and the comparison with an earlier table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fused_losses as fl
from benchmarks import cubins, issue_cases, issue_losses, issue_report, known_numbers, sass

TABLE = issue_report.ROOT / "benchmarks" / "results" / "cuda_issue.md"


def listing(code: str) -> str:
    """Instructions, one a line, and labels as nvdisasm prints them."""
    lines, address = [".text.kernel:"], 0
    for line in code.split("\n"):
        if line.strip().startswith((".L", "$")):
            lines.append(line.strip())
        elif line.strip():
            lines.append(f"        /*{address:04x}*/                   {line.strip()} ;")
            address += 16
    return "\n".join(lines)


# A row a trip. 8 exponentials need four rounds of the inner loop, of 4 instructions; around them 1 before and 5 after,
# of which the test for ignored rows leads past nothing that has to be done. By hand: 1 + 4 * 4 + 5 = 22.
LOOP_IN_LOOP = """
    S2R R0, SR_TID.X
.L_x_0:
    LDG.E.128 R4, desc[UR4][R2.64]
.L_x_1:
    MUFU.EX2 R4, R4
    MUFU.EX2 R5, R5
    ISETP.GE.AND P0, PT, R1, R6, PT
    @!P0 BRA `(.L_x_1)
    ISETP.NE.AND P1, PT, R3, RZ, PT
    @!P1 BRA `(.L_x_2)
    STG.E.128 desc[UR4][R2.64], R4
.L_x_2:
    ISETP.GE.AND P0, PT, R0, R6, PT
    @!P0 BRA `(.L_x_0)
    EXIT
"""
# Two ways to the store: over the slow division (6 instructions) or not (2). By hand: 3 + 2 + 3 = 8.
TWO_WAYS = """
    MOV R1, c[0x0][0x28]
.L_x_0:
    LDG.E.128 R4, desc[UR4][R2.64]
    FSETP.GT.AND P0, PT, R4, RZ, PT
    @P0 BRA `(.L_x_1)
    MUFU.RCP R4, R4
    FFMA R4, R4, R5, R6
    FFMA R4, R4, R5, R6
    FFMA R4, R4, R5, R6
    FFMA R4, R4, R5, R6
    BRA `(.L_x_2)
.L_x_1:
    MUFU.RCP R4, R4
    FMUL R4, R4, R5
.L_x_2:
    STG.E.128 desc[UR4][R2.64], R4
    ISETP.GE.AND P0, PT, R0, R6, PT
    @!P0 BRA `(.L_x_0)
    EXIT
"""

# Rows of a tile, of which there may be none. Some calls want a store of 8 bytes of each, and for it two exponentials.
OPTIONAL = """
.L_x_0:
    LDGSTS.E.128 [R0], [R2.64]
    @!P2 BRA `(.L_x_4)
.L_x_1:
    LDS R4, [R0]
    @!P3 BRA `(.L_x_3)
    MUFU.EX2 R5, R4
    MUFU.EX2 R6, R4
    @P4 BRA `(.L_x_3)
    STG.E.64 desc[UR4][R2.64], R6
.L_x_3:
    MUFU.EX2 R4, R4
    ISETP.GE.AND P0, PT, R1, R6, PT
    @!P0 BRA `(.L_x_1)
.L_x_4:
    ISETP.GE.AND P0, PT, R0, R6, PT
    @!P0 BRA `(.L_x_0)
    EXIT
"""


def test_leaves_out_what_only_some_calls_ask_for() -> None:
    (kernel,) = sass.parse(listing(OPTIONAL))
    work = {"LDGSTS": 1, "MUFU.EX2": 3}
    with_it = sass.cheapest_trip(kernel, work)
    assert len(with_it) == 2 + (2 + 3 + 3) + 2 and "STG.E.64 desc[UR4][R2.64], R6" not in with_it
    assert len(sass.cheapest_trip(kernel, work, never="STG.64")) == 2 + 3 * (2 + 3) + 2
    assert not sass.optional_part(kernel, "ATOM")


def test_counts_a_loop_within_a_loop() -> None:
    (kernel,) = sass.parse(listing(LOOP_IN_LOOP))
    path = sass.cheapest_trip(kernel, {"MUFU.EX2": 8, "STG.128": 1, "LDG.128": 1})
    assert len(path) == 22
    assert sass.per_class(path) == {"LSU": 2, "MUFU": 8, "ALU": 6, "branch": 6}
    assert len(sass.cheapest_trip(kernel, {"MUFU.EX2": 2}, outermost=False)) == 4


# A pass over two chunks of two classes, of which the second may be left out, then the stores. By hand, of 4 classes:
# 1 + 3 + 3 + 4 = 11; of 2: 1 + 3 + 4 = 8.
CHUNKS = """
    MOV R1, c[0x0][0x28]
.L_x_0:
    LDG.E.64 R4, desc[UR4][R2.64]
    FADD R6, R4, R6
    FADD R7, R5, R7
    @!P0 BRA `(.L_x_1)
    FADD R6, R4, R6
    FADD R7, R5, R7
    NOP
.L_x_1:
    STS.U16 [R9], R6
    STS.U16 [R9+0x2], R7
    ISETP.GE.AND P0, PT, R0, R6, PT
    @!P0 BRA `(.L_x_0)
    EXIT
"""


def test_counts_chunks_that_may_be_left_out() -> None:
    (kernel,) = sass.parse(listing(CHUNKS))
    assert len(sass.cheapest_trip(kernel, {"FADD": 4, "STS.U16": 2})) == 11
    assert len(sass.cheapest_trip(kernel, {"FADD": 2, "STS.U16": 2})) == 8
    with pytest.raises(ValueError, match="no loop of kernel does"):
        sass.cheapest_trip(kernel, {"FADD": 5})


def test_counts_pixels_that_warps_share() -> None:
    """Of 8 warps one finishes each of the two columns of a lane; all have the rest of the work."""
    plan = issue_cases.Plan("columns", 0, 8, 19, 0, 0, 0, 256, 1, 1, 0)
    levels, logits = issue_cases.trips(issue_cases.Case("pixels p_y", "bfloat16", 150), plan)
    assert [times for _, _, times in levels] == [2, 6] and logits == 300
    (finishing, _, _), (others, _, _) = levels
    assert finishing == others | {"DADD": 2, "MUFU.RCP": 1}


@pytest.mark.parametrize("lanes, cluster, reductions", [(32, 1, 1), (128, 1, 2), (192, 4, 3)])
def test_sums_of_blocks_and_clusters_are_counted(lanes: int, cluster: int, reductions: int) -> None:
    """Two sums of a row, in 5 steps over a warp, then over the warps of a block, then over its cluster's blocks."""
    plan = issue_cases.Plan("direct", 0, lanes, 32, 0, 0, 0, 128, cluster, 1, 0)
    ((row, outermost, times),), logits = issue_cases.trips(issue_cases.Case("p_y", "bfloat16", 4096), plan)
    assert row["SHFL"] == 2 * 5 * reductions
    assert (outermost, times, logits) == (True, lanes / 32 * cluster, 128)


def test_a_tile_counts_its_rows_and_what_is_beside_them() -> None:
    """128 rows of 10 classes: 4 trips of 32 rows; what is beside them is a trip of a tile less one of rows."""
    plan = issue_cases.Plan("tile", 0, 1, 10, 5, 128, 2560, 128, 1, 1, 0)
    (whole, row, rows), logits = issue_cases.trips(issue_cases.Case("p_y", "bfloat16", 10), plan)
    assert (whole[1:], row[1:], rows[1:], logits) == ((True, 1), (False, -1), (False, 4), 40)
    assert whole[0] == row[0] | {"LDGSTS": 5, "STG.128": 5, "CCTL": 1}


# A choice among four losses by halving, R3 says which; a predicate is asked for later than it was found. By hand, the
# first takes 5 + 3 + 3 = 11, the second 5 + 1 + 3 = 9, the third 5 + 4 + 3 = 12, the last 5 + 2 + 3 = 10.
CHOICE = """
    S2R R0, SR_TID.X
.L_x_0:
    LDC R3, c[0x0][0x2b8]
    ISETP.GT.AND P1, PT, R3, 0x1, PT
    @P2 BRA `(.L_x_5)
.L_x_5:
    ISETP.NE.AND P0, PT, R3, RZ, PT
    @P1 BRA `(.L_x_1)
    @P0 BRA `(.L_x_3)
    FADD R1, R1, R1
    BRA `(.L_x_3)
.L_x_1:
    ISETP.NE.AND P1, PT, R3, 0x2, PT
    @P1 BRA `(.L_x_3)
    FADD R1, R1, R1
    FADD R1, R1, R1
.L_x_3:
    STG.E.128 desc[UR4][R2.64], R4
    LDC R3, c[0x0][0x210]
    @!P3 BRA `(.L_x_0)
    EXIT
"""


def test_follows_the_number_of_a_loss() -> None:
    (kernel,) = sass.parse(listing(CHOICE))
    of_loss = [known_numbers.knowing(kernel, {"c[0x0][0x2b8]": i}) for i in range(4)]
    assert [len(sass.cheapest_trip(one, {"STG.128": 1})) for one in of_loss] == [11, 9, 12, 10]
    assert len(sass.cheapest_trip(kernel, {"STG.128": 1})) == 9


def test_registers_of_64_bits_are_two() -> None:
    numbers = {"c[0x0][0x2b8]": 7, "c[0x0][0x4aa]": 1}
    assert known_numbers.facts_after(["LDC R4, c[0x0][0x2b8]"], numbers, set()) == {("R4", 7)}
    for overwritten in ("LDC.64 R3, c[0x0][0x210]", "LDG.E.128 R2, desc[UR4][R2.64]", "DADD R3, R6, R8", "MOV R4, R5"):
        assert not known_numbers.facts_after([overwritten], numbers, {("R4", 7)})
    assert known_numbers.facts_after(["MOV R3, R4"], numbers, {("R4", 7)})
    flag = ["ULDC.U8 UR4, c[0x0][0x4aa]", "ISETP.NE.AND P0, PT, RZ, UR4, PT", "UMOV UR4, URZ"]
    assert known_numbers.facts_after(flag, numbers, set()) == {("P0", 1)}


# Counted by hand for sm_90, each branch decided as a warp would: labels of 64 bits that count, no bias, no weights,
# aligned rows, no sums but the loss's. Instructions of a tile or a row, and how many logits / 32 that is.
BY_HAND = {
    # A tile of 128 rows: four for each lane, of 193 instructions (labels 28, reading and the largest 49, exponentials
    # 35, the loss 41, the gradient 40), and 147 around them: 68 to ask for the next tile, 16 before its rows, 63 to
    # write it.
    ("p_y", "bfloat16", 10): (919, 40.0),
    # A row of float32, of a mean without sample weights: 26 for its place, its mask and the divisor, 30, 29 and 30 for
    # three numbers read by two strides and by their types, 15 for the slope and its division, 20 to write it.
    ("Z-Error gradient, squares", "float32", 1): (150, 1.0),
}


@pytest.mark.parametrize("loss, dtype, classes", BY_HAND)
def test_the_table_says_what_was_counted_by_hand(loss: str, dtype: str, classes: int) -> None:
    table = issue_report.read_table(TABLE.read_text())
    instructions, logits = BY_HAND[loss, dtype, classes]
    assert table[issue_cases.Case(loss, dtype, classes)] == pytest.approx(instructions / logits, rel=0.01)


def test_counts_the_cheaper_way() -> None:
    (kernel,) = sass.parse(listing(TWO_WAYS))
    path = sass.cheapest_trip(kernel, {"STG": 1, "MUFU.RCP": 1})
    assert len(path) == 8
    assert len(sass.cheapest_trip(kernel, {"STG": 1, "FFMA": 4})) == 12
    with pytest.raises(ValueError, match="no loop of kernel does"):
        sass.cheapest_trip(kernel, {"MUFU.EX2": 1})


def counted(case: issue_cases.Case, total: float) -> issue_report.Count:
    plan = issue_cases.Plan("direct", 0, 32, 32, 0, 0, 0, 128, 1, 1, 0)
    return issue_report.Count(case, plan, total, {"ALU": total})


def test_fails_for_what_has_grown() -> None:
    case, other = issue_cases.Case("p_y", "bfloat16", 1000), issue_cases.Case("NCE", "float32", 10)
    table = issue_report.read_table(issue_report.markdown([counted(case, 13.0), counted(other, 40.0)]))
    assert table == {case: 13.0, other: 40.0}
    assert issue_report.grown([counted(case, 14.2), counted(other, 30.0)], table) == []
    (message,) = issue_report.grown([counted(case, 14.4), counted(other, 44.0)], table)
    assert message == "p_y bfloat16, 1000 classes: 14.4 instead of 13.0"
    assert len(issue_report.grown([counted(issue_cases.Case("p_y", "float32", 7), 1.0)], table)) == 1


def test_says_why_a_budget_is_missed() -> None:
    page = issue_report.markdown([counted(issue_cases.Case("p_y", "bfloat16", 257), 15.6)])
    assert page.index("**0 of 1 stated budgets are met.**") < page.index("- p_y: bfloat16 257: 15.6 of 15")
    assert "- p_y, 257 classes of 16 bits: 8 rows are" in page
    assert "no reason is known" in issue_report.markdown([counted(issue_cases.Case("p_y", "float32", 7), 50.0)])
    assert "no reason is known" not in TABLE.read_text() and "Not counted" not in TABLE.read_text()


def test_says_what_is_slow_without_a_budget() -> None:
    """Statistics of 16 bits read 2.8 bytes a logit: 70 % of an H200's slots are 15.2 instructions."""
    case = issue_cases.Case("statistics", "bfloat16", 10)
    page = issue_report.markdown([counted(case, 15.3)], ["bi-tempered: there is no kernel"])
    assert "1 without a stated budget, 0 hide" in page and "- statistics: bfloat16 10: 15.3" in page
    assert "- bi-tempered: there is no kernel" in page
    assert "1 without a stated budget, 1 hide" in issue_report.markdown([counted(case, 15.1)])


def test_every_loss_has_a_row() -> None:
    """By itself, or in the row of the loss as which it runs (losses/run_as.h)."""
    counted_losses = {case.loss for case in issue_cases.cases(quick=False)}
    named = {issue_losses.NAMES.get(loss, loss.lower().replace("-", "_")) for loss in counted_losses}
    same_kernel = {"nfl_mae": "nfl", "nfl_rce": "nfl", "anl_ce": "nnce", "anl_fl": "nnfl"}
    same_kernel |= {"jal_ce": "jal", "jal_fl": "jal"}
    assert {same_kernel.get(loss, loss) for loss in fl.LOSSES} <= named


def test_opcodes_with_and_without_parts() -> None:
    assert sass.amount("STS.U16", "STS") and not sass.amount("STS.U16", "STS.!64.!U16")
    assert sass.amount("STS", "STS.!64.!U16") and sass.amount("HMNMX2.BF16_V2", "VHMNMX|HMNMX2")


def test_slots_of_a_copy() -> None:
    """4.3 TB/s leave 31 instructions for a logit of 16 bits, read and written, as long as its target is not counted."""
    case = issue_cases.Case("p_y", "bfloat16", 10**9)
    assert counted(case, 31.1).fill("H200") == pytest.approx(1, abs=0.01)
    assert counted(case, 44.6).fill("H100") == pytest.approx(1, abs=0.01)


@pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.find_tool("nvdisasm") is None, reason="nvcc and nvdisasm are needed"
)
@pytest.mark.parametrize("kernels", ["softmax", pytest.param("all", marks=pytest.mark.long)])
def test_no_kernel_has_grown(kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = issue_report.ROOT / "fused_losses" / "libfused_losses_ops.so"
    built = ["--library", str(library)] if cubins.in_library(library, tmp_path) else []
    quick = ["--quick"] if kernels == "softmax" else []
    monkeypatch.setattr("sys.argv", ["issue_report", "--check", str(TABLE), *built, *quick])
    assert issue_report.main() == 0
