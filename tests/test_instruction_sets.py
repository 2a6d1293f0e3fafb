"""The instruction set that was asked for is the one in use; see instruction_sets.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from instruction_sets import files, others, share


def test_torch_uses_the_instruction_set_that_was_asked_for() -> None:
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    if asked is None:
        pytest.skip("ATEN_CPU_CAPABILITY is not set")
    assert torch.backends.cpu.get_cpu_capability() == asked.upper()


@pytest.mark.any_cpu
def test_every_older_instruction_set_is_run() -> None:
    assert others("AVX512") == ("default", "avx2")
    assert others("AVX2") == ("default",)
    assert others("DEFAULT") == others("SVE256") == ()


@pytest.mark.any_cpu
def test_files_that_judge_no_kernel_are_left_out() -> None:
    names = {Path(path).name for path in files()}
    assert {"test_values.py", "test_z_error.py", "test_instruction_sets.py"} <= names
    assert not names & {"test_transforms.py", "test_parallel.py"}


@pytest.mark.any_cpu
def test_two_older_instruction_sets_share_the_files() -> None:
    paths = ["test_a.py", "test_b.py", "test_instruction_sets.py", "test_c.py"]
    assert share(["default"], paths)["default"] == ["test_instruction_sets.py", "test_a.py", "test_b.py", "test_c.py"]
    assert share(["default", "avx2"], paths) == {
        "default": ["test_instruction_sets.py", "test_a.py", "test_c.py"],
        "avx2": ["test_instruction_sets.py", "test_b.py"],
    }
