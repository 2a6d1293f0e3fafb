"""The tests of a GPU on a machine without one: the CUDA kernels, run on the host, under everything that is above them.

    python tests/emulated_cuda.py NUMBER_OF_PROCESSES [--some] [--compiled] [arguments of pytest]

A library of csrc/ops and the kernels as ``tests/cpp/cuda_emulation`` runs them takes the place of the operators. Its
tensors are the CPU's. For tests the device is :class:`EmulatedCuda`; to the package, and nobody else, tensors of the
CPU say that they are on a GPU, so that it goes the ways it would go there. Tests that have a ``device`` are run, and
those of some files that have none; with ``--some`` those of half a minute that the C++ programs of the emulation do not
stand for. With ``--compiled`` they run on what nvcc makes of the kernels (``tests/cpp/cuda_compiled``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_VARIABLE = "FUSED_LOSSES_EMULATED_CUDA"  # the library's path
_SOME = (
    *("mixed.py::test_by_rows", "probabilities.py::test_dtypes_and_layouts", "row_statistics.py::test_rows"),
    *("logit_norm_in_one_read.py", "layouts.py::test_row_layouts", "edge_cases.py::test_extreme_logits"),
    "edge_cases.py::test_ignored_rows_are_exactly_zero",
)
_WITHOUT_DEVICE = {"autograd", "elr", "gjs", "logit_norm", "mixed", "reducers", "wrapped_autograd", "wrapped_losses"}
_LEFT_OUT = {
    "test_any_tensor": "compares the names of devices",
    "test_autocast_takes_half_logits_as_they_are": "asks torch for CUDA's autocast",
    "test_every_loss_is_that_of_the_dense_layer": "takes a matrix product that torch has on CUDA only",
    "test_a_loaded_memory_takes_the_place_of_an_update_on_its_way": "pins memory",
    "test_a_recomputation_does_not_remember_again": "pins memory",
    "test_mixup_in_compiled_and_transformed_code": "compiles what asks a tensor for its device",
    "test_what_changed_in_between_is_noticed": "changes a target of which CUDA keeps a copy",
}


class EmulatedCuda(str):
    """The CPU for torch; for tests that ask which device it is, CUDA."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"

    def __hash__(self) -> int:
        return hash("cuda")


def is_emulated() -> bool:
    """Whether these tests run on emulated kernels."""
    return _VARIABLE in os.environ


def is_for_emulation(item: pytest.Item) -> bool:
    """Whether it is a test of a device, and one that emulation can answer."""
    if not isinstance(item, pytest.Function) or item.originalname in _LEFT_OUT:
        return False
    if item.module.__name__.removeprefix("test_") in _WITHOUT_DEVICE:
        return item.originalname != "test_bad_input"  # there an assertion on the device
    return hasattr(item, "callspec") and "device" in item.callspec.params


def _asked_by_package() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return str(caller).partition(".")[0] == "fused_losses"


def install() -> None:
    """Puts the emulated kernels in the place of the package's, which has not been imported yet."""
    assert "fused_losses" not in sys.modules
    load = torch.ops.load_library

    def load_emulated(path: str) -> None:
        load(os.environ[_VARIABLE] if Path(path).name == "libfused_losses_ops.so" else path)  # type: ignore[no-untyped-call]

    torch.ops.load_library = load_emulated  # type: ignore[method-assign]
    base: Any = torch._C.TensorBase
    is_cpu, is_cuda = base.is_cpu.__get__, base.is_cuda.__get__
    # Of the class above TensorBase: what C++ asks does not come here.
    tensor: Any = torch.Tensor
    tensor.is_cpu = property(lambda self: is_cuda(self) if _asked_by_package() else is_cpu(self))
    tensor.is_cuda = property(lambda self: is_cpu(self) if _asked_by_package() else is_cuda(self))


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(Path(__file__).parent))  # not there by itself under PYTHONSAFEPATH
    from test_cpp import compile_targets, find_build_folder  # here: it imports the package

    processes, *rest = arguments
    chosen = [str(Path(__file__).parent)]
    if "--some" in rest:
        rest.remove("--some")
        chosen = [str(Path(__file__).parent / f"test_{name}") for name in _SOME]
    target = "fused_losses_emulated"
    if "--compiled" in rest:
        rest.remove("--compiled")
        target = "fused_losses_compiled"
    folder = find_build_folder()
    if folder is None:
        print("emulated CUDA: the package was not built here")
        return 1
    compile_targets(folder, target)
    library = folder / "tests" / "cpp" / f"lib{target}.so"
    command = [sys.executable, "-m", "pytest", "-n", processes, *chosen, *rest]
    return subprocess.run(command, env={**os.environ, _VARIABLE: str(library)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
