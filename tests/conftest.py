"""Devices and tolerances that all tests share."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import emulated_cuda
import pytest
import torch
from torch import Tensor

# torch.compile's cache on disk does not tell instruction sets or builds of this library apart: under AVX2 it would take
# a graph vectorised for AVX-512, and be wrong. So every process has a cache of its own.
_compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
if emulated_cuda.is_emulated():
    emulated_cuda.install()
    DEVICES = [emulated_cuda.EmulatedCuda("cpu")]

# Largest difference from a float64 computation, relative to 1 + |value| for losses and to the largest gradient for
# gradients (p_y - 1 cancels in rows whose gradient is small, in any implementation).
# float64: rounding of a few dozen operations. float32: the exponential of a logit of 15 carries a relative error of
# 15 * 6e-8, which aue multiplies by a slope of 20. Half precisions: the loss is computed in float32 from exactly
# converted logits; the gradient is rounded once when stored, by at most 2^-11 and 2^-8, and float16 loses what is
# below 6e-8.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
GRAD_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
GRAD_FLOOR = {torch.float64: 0.0, torch.float32: 1e-12, torch.float16: 1.2e-7, torch.bfloat16: 1e-12}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return cast("str", request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch: small networks are not worth more, and sums are then made in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On emulated kernels, leaves out tests that have nothing to do with a device."""
    if emulated_cuda.is_emulated():
        config.hook.pytest_deselected(items=[item for item in items if not emulated_cuda.is_for_emulation(item)])
        items[:] = filter(emulated_cuda.is_for_emulation, items)


def loss_and_grad(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """A loss and its gradient in the logits, which keep their memory and strides."""
    x = logits.detach().requires_grad_()
    loss = function(x, target, **options)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


def one_in(number: int, *axes: Iterable[Any]) -> list[Any]:
    """Parameters of a test: every combination of the axes' values, of which one in so many runs by default.

    The others are marked ``long``. Each value of every axis is among those that run if two axes have ``number`` values
    or more, and each pair of values if three have.
    """
    parameters = []
    for numbered in itertools.product(*(enumerate(axis) for axis in axes)):
        places, values = zip(*numbered, strict=True)
        marks = () if sum(places) % number == 0 else pytest.mark.long
        name = "-".join(str(getattr(value, "__name__", value)) for value in values)
        parameters.append(pytest.param(*values, marks=marks, id=name))
    return parameters
