"""A selection of the tests on the CPU kernels that this processor would not choose by itself.

The C++ tests run the kernels of every instruction set; here the whole way from Python does, in a process of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent

# Values and gradients of every loss, and what is special: masked classes, infinities, ignored rows.
SELECTION = (
    "(test_matches_float64_reference and (float32 or bfloat16)) or hand_worked or extreme_logits or "
    "large_images or non_finite or masks_a_class or probability_zero or ignored_rows or "
    "small_number_of_classes or many_classes"
)
# From the value of ATEN_CPU_CAPABILITY to the name torch reports.
CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
OWN = torch.backends.cpu.get_cpu_capability()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="one instruction set only")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of(capability: str) -> None:
    expected = CAPABILITIES[capability]
    if expected == OWN:
        pytest.skip("the other tests run these kernels")
    if list(CAPABILITIES.values()).index(expected) > list(CAPABILITIES.values()).index(OWN):
        pytest.skip(f"this process is limited to {OWN}")
    script = (
        "import sys, pytest, torch\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {expected!r}\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    files = [str(FOLDER / "test_values.py"), str(FOLDER / "test_edge_cases.py")]
    result = subprocess.run(
        [sys.executable, "-c", script, "-q", "-x", "-p", "no:cacheprovider", "-k", SELECTION, *files],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " failed" not in result.stdout
