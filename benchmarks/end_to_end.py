"""What share of a training step the loss is: a small convolutional network on the CPU, a ResNet-50 on a GPU.

Steps (forward, loss, backward, SGD) with plain PyTorch's loss and with ours take turns; the loss alone (its forward
and backward on logits of the same shape) is timed in the same loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.calls import Repeated
from benchmarks.cases import Case, LossFunction
from benchmarks.measure import Timed, peak_extra_bytes, time_calls
from benchmarks.models import resnet50, small_cnn
from benchmarks.providers import PROVIDERS, fused

LOSSES = ("cross_entropy", "mae_auto", "hem")


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor, loss: LossFunction
) -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        value = loss(model(images), target)
    value.backward()
    optimizer.step()


def loss_alone(logits: Tensor, target: Tensor, loss: LossFunction) -> Any:
    """The loss and its gradient in the logits."""
    with torch.autocast("cuda", torch.bfloat16, enabled=logits.is_cuda):
        value = loss(logits, target)
    return torch.autograd.grad(value, logits)


def plain(case: Case) -> LossFunction:
    """The shortest spelling in PyTorch."""
    made = (PROVIDERS[name].make(case) for name in ("torch", "snippet", "reference"))
    return next(function for function in made if function is not None)


def measure_steps(
    make_model: Callable[[int], nn.Module],
    batch: int,
    size: int,
    num_classes: int,
    device: str,
    seconds: float,
    timer: str,
) -> list[dict[str, Any]]:
    """One row for every loss and provider."""
    torch.manual_seed(0)
    model = make_model(num_classes).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(num_classes, (batch,), device=device)
    dtype = "bfloat16" if device == "cuda" else "float32"
    logits = (3 * torch.randn(batch, num_classes, device=device)).to(getattr(torch, dtype)).requires_grad_()
    calls: dict[tuple[str, str, str], Timed] = {}
    for name in LOSSES:
        case = Case(name, (batch, num_classes), dtype, device)
        for provider, loss in (("plain", plain(case)), ("fused", fused(case))):
            step = functools.partial(training_step, model, optimizer, images, target, loss)
            calls[name, provider, "step"] = Repeated(step)
            calls[name, provider, "loss"] = Repeated(functools.partial(loss_alone, logits, target, loss))
    times = time_calls(calls, seconds, timer)
    rows = []
    for name, provider, what in calls:
        if what == "step":
            whole, alone = times[name, provider, "step"], times[name, provider, "loss"]
            rows.append(
                {
                    "model": make_model.__name__,
                    "batch": batch,
                    "classes": num_classes,
                    "dtype": dtype,
                    "device": device,
                    "threads": torch.get_num_threads(),
                    "loss": name,
                    "provider": provider,
                    "step_us": whole.median,
                    "step_low_us": whole.low,
                    "step_high_us": whole.high,
                    "loss_us": alone.median,
                    "loss_share": alone.median / whole.median,
                    "images_per_s": 1e6 * batch / whole.median,
                    "loss_peak_bytes": peak_extra_bytes(calls[name, provider, "loss"], device),
                    "step_peak_bytes": peak_extra_bytes(calls[name, provider, "step"], device),
                }
            )
    return rows


def measure(device: str, timer: str) -> list[dict[str, Any]]:
    """The CPU's small network at 10 and 1000 classes; on a GPU ResNet-50 at batches of 256 to 1024."""
    if device == "cpu":
        torch.set_num_threads(1)
        return [row for classes in (10, 1000) for row in measure_steps(small_cnn, 256, 32, classes, device, 1.0, timer)]
    rows = []
    for batch in (256, 512, 1024):
        rows += measure_steps(resnet50, batch, 224, 1000, device, 2.0, timer)
        torch.cuda.empty_cache()
    return rows
