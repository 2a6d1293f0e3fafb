"""What resource_report counts in machine code, and that the kernels of rows have none of what it objects to."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import resource_report as report
from benchmarks import sass
from benchmarks.cubins import SOURCES
from benchmarks.resource_report import Instructions

HEAD = "\tcode for sm_90\n\t\tFunction : kernel\n"


def lines(*instructions: str) -> str:
    """As cuobjdump prints them."""
    return HEAD + "".join(
        f"        /*{16 * i:04x}*/                   {text} ;  /* 0x0000000c0a007986 */\n"
        for i, text in enumerate(instructions)
    )


FOUR_WORDS = [f"STG.E desc[UR36][R8.64{at}], R{11 + i}" for i, at in enumerate(("", "+0x4", "+0x8", "+0xc"))]
EIGHT_HALVES = [f"STG.E.U16 [R8.64+{2 * i:#x}], R{11 + i}" for i in range(8)]
CASES = {
    "sixteen bytes": (["STG.E.128 desc[UR36][R8.64], R12", "STG.E.128.STRONG.SM [R8.64+0x10], R12"], (0, 0, 0)),
    "four words": (FOUR_WORDS, (4, 4, 0)),
    "in another order, among others": (
        [*FOUR_WORDS[::-1], "STG.E desc[UR36][R12.64+0x1000], R3", "STG.E.64 desc[UR36][R8.64+0x10], R2"],
        (6, 4, 0),
    ),
    "eight half words": (EIGHT_HALVES, (8, 8, 0)),
    "words from two addresses": ([*FOUR_WORDS[:2], *[s.replace("R8", "R10") for s in FOUR_WORDS[2:]]], (4, 0, 0)),
    "words in two branches": ([*FOUR_WORDS[:2], "@P0 BRA 0x1230", *FOUR_WORDS[2:]], (4, 0, 0)),
    "two doubles": (["STG.E.64 desc[UR4][R2.64], R4", "STG.E.64 desc[UR4][R2.64+0x8], R6"], (2, 0, 0)),
    "shared memory": (["STS [R3], R4", "STS [R3+0x4], R4", "STS [R3+0x8], R4", "STS [R3+0xc], R4"], (0, 0, 0)),
    "votes": (["MATCH.ANY R5, R3", "SHFL.DOWN P0, R4, R3, R6, R7"], (0, 0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_instructions_are_counted(name: str) -> None:
    instructions, want = CASES[name]
    assert report.count_instructions(lines(*instructions)) == {"kernel": Instructions(*want)}


def test_every_kernel_has_its_own_counts() -> None:
    two = lines(*FOUR_WORDS) + lines("EXIT").replace("Function : kernel", "Function : other")
    assert report.count_instructions(two) == {"kernel": Instructions(4, 4, 0), "other": Instructions()}


def test_strict_objects_to_spills_split_stores_and_votes() -> None:
    good = report.Kernel("a.cu", "sm_90", "k", 64, 0, 0, 0, 0, narrow=17, split=0, votes=0)
    assert not good.fails
    for what in ("spill_stores", "split", "votes"):
        assert report.Kernel(**{**vars(good), what: 4}).fails


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(sass.find_tool("cuobjdump") is None, reason="needs cuobjdump")
def test_kernels_of_rows_store_sixteen_bytes_at_once_and_shuffle_without_votes() -> None:
    kernels = report.report([SOURCES / "register_direct.cu"], "90")
    assert len(kernels) == 30
    assert [(kernel.name, kernel.spill_stores, kernel.split, kernel.votes) for kernel in kernels if kernel.fails] == []
