"""Operators called with what no caller in this package gives them: an error, no access beyond a tensor's memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # errors

OPS = torch.ops.fused_losses
LOGITS, TARGET = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 2, 0])
ARGS = fl.LOSSES["gce"].arguments(LOGITS, TARGET)
LOSS, STATS, DENOMINATOR = OPS.row_loss_with_stats(*ARGS)
CONSTANTS = OPS.row_loss_constants(*ARGS.constants)
ONE, ROW = torch.ones(()), torch.ones(4)
MEMORY, PLACE = torch.full((5, 3), 0.3), torch.arange(4)
MISALIGNED = torch.frombuffer(bytearray(52), dtype=torch.float32, offset=1, count=12).view(4, 3)


def constants_with(value: int) -> torch.Tensor:
    """Those of the loss with every byte replaced but for its number."""
    return torch.cat([CONSTANTS[:4], torch.full_like(CONSTANTS[4:], value)])


def backward(stats: torch.Tensor = STATS, denominator: torch.Tensor = DENOMINATOR) -> torch.Tensor:
    return OPS.row_loss_backward(ONE, stats, denominator, *ARGS)


GRADIENTS = {
    "shape": torch.empty(2, 3),
    "dims": torch.empty(12),
    "dtype": torch.empty(4, 3, dtype=torch.float16),
    "one number": torch.empty(()),
    "stride 0": torch.empty(1, 3).expand(4, 3),
    "misaligned": MISALIGNED,
}
INTO_GRADIENT = {
    "forward": lambda grad: OPS.row_loss_with_grad_(grad, *ARGS),
    "backward": lambda grad: OPS.row_loss_backward_(ONE, torch.empty(0), torch.empty(0), grad, *ARGS),
    "mixed backward": lambda grad: OPS.mixed_loss_backward_(ONE, ONE, grad, TARGET, None, 0.5, *ARGS),
}
SAVED = {
    "stats of fewer rows": ({"stats": STATS[:, :2]}, "stats must be those"),
    "fewer numbers": ({"stats": STATS[:1]}, "stats must be those"),
    "a number for stats": ({"stats": ONE}, "stats must be those"),
    "stats of another dtype": ({"stats": STATS.half()}, "stats must be those"),
    "no denominator": ({"denominator": torch.empty(0)}, "denominator must be the one"),
    "denominator of another dtype": ({"denominator": DENOMINATOR.half()}, "denominator must be the one"),
}


@pytest.mark.parametrize("into", INTO_GRADIENT)
@pytest.mark.parametrize("wrong", GRADIENTS)
def test_given_gradients_are_like_the_logits(into, wrong):
    with pytest.raises(RuntimeError, match="gce: grad_logits must"):
        INTO_GRADIENT[into](GRADIENTS[wrong])


@pytest.mark.parametrize("wrong", SAVED)
def test_backward_takes_what_forward_saved(wrong):
    changed, message = SAVED[wrong]
    with pytest.raises(RuntimeError, match=f"gce: {message}.* that forward has saved"):
        backward(**changed)
    in_columns = STATS.T.contiguous().T
    assert torch.equal(backward(in_columns), backward())


@pytest.mark.parametrize("wrong", [ONE.double(), torch.ones(2), torch.ones(0)], ids=["dtype", "two", "none"])
def test_backward_of_two_labels_takes_the_upstream_gradient_that_forward_saved(wrong):
    with pytest.raises(RuntimeError, match="gce: upstream must be the one that forward has saved"):
        OPS.mixed_loss_backward_(ONE, wrong, torch.empty(4, 3), TARGET, None, 0.5, *ARGS)


@pytest.mark.parametrize(
    "constants",
    [
        *map(constants_with, (7, 255)),
        CONSTANTS[:1].expand(CONSTANTS.shape),
        CONSTANTS.unsqueeze(0),
        CONSTANTS[1:],
        torch.empty(0, dtype=torch.uint8),
        CONSTANTS.to(torch.int8),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_packed_constants_are_those_of_a_call(constants):
    for call in (
        lambda: OPS.row_loss.packed(LOGITS, TARGET, constants),
        lambda: OPS.row_loss_with_grad.packed(LOGITS, TARGET, constants),
        lambda: OPS.z_error_kept_target(LOGITS, TARGET, None, constants),
    ):
        with pytest.raises(RuntimeError, match=r"constants must come from (row_loss|z_error)_constants"):
            call()


def z_backward(mask: torch.Tensor, denominator: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return OPS.z_error_loss_backward(ONE, denominator, mask, "mse_loss", ROW, ROW, None, None, reduction)


def z_class_loss(logit_bias: torch.Tensor) -> torch.Tensor:
    rule = (None, None, [2.0], "class_cross_entropy", "both", 2, True, False)
    more = (3, None, None, logit_bias, 0.0, 0.0, False, -100, "mean")
    return OPS.z_error_class_loss(ROW, LOGITS, TARGET, *more, *rule)[0]


def elr(order: torch.Tensor) -> torch.Tensor:
    return OPS.elr_rows_(LOGITS, TARGET, PLACE, order, MEMORY.clone(), None, None, 0.7, 3.0, -100, True, False)[0]


def rescale(on_device: torch.Tensor) -> torch.Tensor:
    return OPS.rescale_logits(LOGITS, None, on_device, 1.0, False, -100)[0]


def rescale_backward(norms: torch.Tensor) -> torch.Tensor:
    return OPS.rescale_logits_backward(LOGITS, norms, LOGITS, None, None, 1.0, False, -100)


def gjs(target: torch.Tensor) -> torch.Tensor:
    return OPS.gjs_rows_([LOGITS, LOGITS], target, [0.5, 0.25, 0.25], [])


OTHERS = {
    "mask of fewer rows": (lambda: z_backward(ROW[:2] > 0, ONE), RuntimeError, "mask must be the one"),
    "mask of numbers": (lambda: z_backward(ROW, ONE), RuntimeError, "mask must be the one"),
    "no denominator": (lambda: z_backward(ROW > 0, torch.empty(0)), RuntimeError, "denominator must be the one"),
    "no bias": (lambda: z_class_loss(torch.empty(0)), ValueError, "logit_bias must be a number or 0-dim"),
    "complex bias": (lambda: z_class_loss(torch.tensor(1j)), RuntimeError, "logit_bias must be float64"),
    "kept target of an image": (
        lambda: OPS.z_error_kept_target(
            LOGITS, torch.zeros(4, 3).long(), None, OPS.z_error_constants(2.0, "logit", "both", 2, True, -100, 0.1)
        ),
        ValueError,
        r"target must have shape \(N,\)",
    ),
    "order beyond the rows": (lambda: elr(torch.tensor([0, 1, 2, 4])), IndexError, "order must be in .0, 4.*got 4"),
    "negative order": (lambda: elr(torch.tensor([0, -1, 2, 3])), IndexError, "order must be in .0, 4.*got -1"),
    "no temperature": (lambda: rescale(torch.empty(0)), RuntimeError, "on_device must be a 0-dim"),
    "repeated norms": (lambda: rescale_backward(ONE.expand(4)), RuntimeError, "norms must be what forward made"),
    "a label that is ignored elsewhere": (
        lambda: gjs(torch.tensor([0, -100, 2, 1])), IndexError, r"every target must be in \[0, 3\), got -100"
    ),
    "probabilities for a second label": (
        lambda: OPS.mixed_loss(LOGITS.softmax(1), None, 0.5, *ARGS), RuntimeError, "other_target must hold class"
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", OTHERS)
def test_other_arguments(wrong):
    call, kind, message = OTHERS[wrong]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", ["gce", "hem"])
@pytest.mark.parametrize("label", [3, -1, 10**9])
def test_labels_that_change_before_backward_are_checked_again(name, label):
    """torch does not see what NumPy writes into memory that a tensor shares."""
    labels = np.array([0, 1, 2, 0])
    logits = LOGITS.clone().requires_grad_()
    # With weights, rows save numbers for backward; without, a small call saves nothing.
    loss = fl.LOSSES[name].function(logits, torch.from_numpy(labels), weight=torch.ones(3), reduction="none")
    labels[2] = label
    with pytest.raises(IndexError, match=rf"Target {label} is out of bounds \(row 2\)"):
        loss.sum().backward()


WITHOUT_MEMORY = """
import resource, sys, torch, fused_losses as fl
torch.set_num_threads(int(sys.argv[1]))
fl.functional.gce_loss(torch.zeros(2048, 64), torch.zeros(2048, dtype=torch.int64))  # threads are there
logits, target = torch.zeros(1, 1).expand(2, 100_000_000), torch.zeros(2, dtype=torch.int64)
taken = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (150 << 20), resource.RLIM_INFINITY))
for loss in (fl.functional.gce_loss, fl.functional.multi_margin_loss):
    try:
        print(loss(logits, target))
    except MemoryError:
        print("MemoryError")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory_for_scratch_is_an_error_on_any_thread(threads):
    command = [sys.executable, "-c", WITHOUT_MEMORY, str(threads)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["MemoryError"] * 2
