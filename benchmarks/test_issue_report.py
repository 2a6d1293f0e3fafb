"""The counting of instructions: two kernels counted by hand, and the comparison with an earlier table."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import issue_report, sass


def listing(code: str) -> str:
    """Instructions, one a line, and labels as nvdisasm prints them."""
    lines, address = [".text.kernel:"], 0
    for line in code.split("\n"):
        if line.strip().startswith(".L"):
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
    plan = issue_report.Plan("columns", 0, 8, 19, 0, 0, 0, 256, 1, 1)
    levels, logits = issue_report.trips(issue_report.Case("pixels p_y", "bfloat16", 150), plan)
    assert [times for _, _, times in levels] == [2, 6] and logits == 300
    (finishing, _, _), (others, _, _) = levels
    assert finishing == others | {"DADD": 2, "MUFU.RCP": 1}


def test_counts_the_cheaper_way() -> None:
    (kernel,) = sass.parse(listing(TWO_WAYS))
    path = sass.cheapest_trip(kernel, {"STG": 1, "MUFU.RCP": 1})
    assert len(path) == 8
    assert len(sass.cheapest_trip(kernel, {"STG": 1, "FFMA": 4})) == 12
    with pytest.raises(ValueError, match="no loop of kernel does"):
        sass.cheapest_trip(kernel, {"MUFU.EX2": 1})


def counted(case: issue_report.Case, total: float) -> issue_report.Count:
    plan = issue_report.Plan("direct", 0, 32, 32, 0, 0, 0, 128, 1, 1)
    return issue_report.Count(case, plan, total, {"ALU": total})


def test_fails_for_what_has_grown() -> None:
    case, other = issue_report.Case("p_y", "bfloat16", 1000), issue_report.Case("NCE", "float32", 10)
    table = issue_report.read_table(issue_report.markdown([counted(case, 13.0), counted(other, 40.0)]))
    assert table == {case: 13.0, other: 40.0}
    assert issue_report.grown([counted(case, 14.2), counted(other, 30.0)], table) == []
    (message,) = issue_report.grown([counted(case, 14.4), counted(other, 44.0)], table)
    assert message == "p_y bfloat16, 1000 classes: 14.4 instead of 13.0"
    assert len(issue_report.grown([counted(issue_report.Case("p_y", "float32", 7), 1.0)], table)) == 1


def test_says_why_a_budget_is_missed() -> None:
    page = issue_report.markdown([counted(issue_report.Case("p_y", "bfloat16", 257), 15.6)])
    assert "0 of 1 within budget." in page and "Missed:\n257 classes of 16 bits: 8 rows are" in page
    assert "no reason is known" in issue_report.markdown([counted(issue_report.Case("p_y", "float32", 7), 50.0)])
    assert "no reason is known" not in (issue_report.ROOT / "benchmarks" / "results" / "cuda_issue.md").read_text()


def test_opcodes_with_and_without_parts() -> None:
    assert sass.amount("STS.U16", "STS") and not sass.amount("STS.U16", "STS.!64.!U16")
    assert sass.amount("STS", "STS.!64.!U16") and sass.amount("HMNMX2.BF16_V2", "VHMNMX|HMNMX2")


def test_slots_of_a_copy() -> None:
    """4.3 TB/s leave 31 instructions for a logit of 16 bits, read and written, as long as its target is not counted."""
    case = issue_report.Case("p_y", "bfloat16", 10**9)
    assert counted(case, 31.1).fill("H200") == pytest.approx(1, abs=0.01)
    assert counted(case, 44.6).fill("H100") == pytest.approx(1, abs=0.01)


@pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.find_tool("nvdisasm") is None, reason="nvcc and nvdisasm are needed"
)
@pytest.mark.parametrize("kernels", ["softmax", pytest.param("all", marks=pytest.mark.long)])
def test_no_kernel_has_grown(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = str(issue_report.ROOT / "benchmarks" / "results" / "cuda_issue.md")
    library = issue_report.ROOT / "fused_losses" / "libfused_losses_ops.so"
    built = ["--library", str(library)] if issue_report.has_kernels(library) else []
    quick = ["--quick"] if kernels == "softmax" else []
    monkeypatch.setattr("sys.argv", ["issue_report", "--check", table, *built, *quick])
    assert issue_report.main() == 0
