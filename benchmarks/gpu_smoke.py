"""Every loss on the GPU against the CPU kernels: dtypes, class counts, layouts, options, CUDA graph capture.

Short and free of test frameworks, so that compute-sanitizer can run it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fused_losses as fl

GPU = "cuda"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Below: one thread per row (10), a warp (100, 1001), a block (5003), odd counts with misaligned rows.
CLASS_COUNTS = (10, 100, 1001, 5003)
# Shared by the blocks of a cluster, where the device has such; the last has rows that no cluster holds.
LARGE_CLASS_COUNTS = (50_257, 150_001, 1_000_003)
# Relative to the largest entry; the gradient is rounded once to the dtype of the logits.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case(NamedTuple):
    logits: Tensor
    target: Tensor
    options: dict[str, object]


def loss_functions() -> dict[str, Callable[..., Tensor]]:
    """Functions of all losses by their stem."""
    stems = fl.loss_names()
    return {s: getattr(fl.functional, s, None) or getattr(fl.functional, f"{s}_loss") for s in stems}


def make_logits(layout: str, num_classes: int, dtype: torch.dtype) -> Tensor:
    def randn(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, dtype=torch.float64)).to(dtype)

    if layout == "rows":
        return randn(67 if num_classes <= max(CLASS_COUNTS) else 5, num_classes)
    if layout == "rows in a wider matrix":
        return randn(67, num_classes + 3)[:, 1:-2]
    if layout == "transposed":
        return randn(num_classes, 67).t()
    images = randn(2, num_classes, 5, 7)
    return images if layout == "images" else images.to(memory_format=torch.channels_last)


LAYOUTS = ("rows", "rows in a wider matrix", "transposed", "images", "channels_last")


def cases(name: str, layout: str, num_classes: int, dtype: torch.dtype) -> Iterator[Case]:
    logits = make_logits(layout, num_classes, dtype)
    shape = (logits.shape[0], *logits.shape[2:])
    target = torch.randint(num_classes, shape)
    yield Case(logits, target, {})
    target = torch.where(torch.rand(shape) < 0.3, 1, target)
    sample_weight = torch.rand(shape)
    bias = torch.tensor(1.5)
    weighted = {"ignore_index": 1, "weight": torch.rand(num_classes), "sample_weight": sample_weight}
    yield Case(logits, target, {**weighted, "logit_bias": bias})
    yield Case(logits, target.int(), {**weighted, "reduction": "sum"})
    yield Case(logits, target, {**weighted, "reduction": "none"})
    if name == "cross_entropy":
        yield Case(logits, target, {**weighted, "label_smoothing": 0.1})
        yield Case(logits, logits.double().softmax(1).to(dtype), {"label_smoothing": 0.1})


def copy_to(device: str, x: Tensor) -> Tensor:
    """A copy with the strides and the storage offset of `x` (`Tensor.to` would make a slice contiguous).

    What lies between its rows is NaN: kernels may read it (begin_copy() in csrc/cuda/resident_row.cuh says where), so
    that initcheck asks for something to be there, but no result may depend on it.
    """
    numbers = x.untyped_storage().nbytes() // x.element_size()
    storage = torch.full((numbers,), float("nan"), dtype=x.dtype, device=device)
    return storage.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(x)


def loss_and_gradient(function: Callable[..., Tensor], case: Case, device: str) -> tuple[Tensor, Tensor]:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    logits = copy_to(device, case.logits).requires_grad_()
    loss = function(logits, case.target.to(device), **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=device, dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


def error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    scale = want.abs().max().clamp_min(1e-6)
    return ((got.cpu().double() - want).abs().max() / scale).item()


def compare(name: str, function: Callable[..., Tensor], case: Case, where: str) -> None:
    want_loss, want_grad = loss_and_gradient(function, case, "cpu")
    loss, grad = loss_and_gradient(function, case, GPU)
    again = loss_and_gradient(function, case, GPU)
    errors = {"loss": error(loss, want_loss), "gradient": error(grad, want_grad)}
    limit = {"loss": min(TOLERANCE[case.logits.dtype], 3e-5), "gradient": TOLERANCE[case.logits.dtype]}
    options = ", ".join(case.options)
    for what, value in errors.items():
        if not value <= limit[what]:
            raise SystemExit(f"{name}: {what} on the GPU is off by {value:.2e} ({where}; {options})")
    if not (torch.equal(loss, again[0]) and torch.equal(grad, again[1])):
        raise SystemExit(f"{name}: two runs on the GPU differ ({where}; {options})")


def check_capture() -> None:
    """A captured forward and backward sees new logits and a new bias."""
    logits = torch.randn(64, 1001, device=GPU, requires_grad=True)
    target = torch.randint(1001, (64,), device=GPU)
    bias = torch.zeros((), device=GPU)

    def step() -> tuple[Tensor, Tensor]:
        loss = fl.functional.mae_loss(logits, target, logit_bias=bias)
        return loss, torch.autograd.grad(loss, logits)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    with torch.no_grad():
        logits.normal_()
        bias.fill_(2.5)
    graph.replay()
    want_loss, want_grad = step()
    if not (torch.equal(loss, want_loss) and torch.equal(grad, want_grad)):
        raise SystemExit("a replayed CUDA graph does not see new logits or a new logit_bias")


def check_empty() -> None:
    for rows, ignore in ((0, -100), (5, 1)):
        logits = torch.full((rows, 3), float("nan"), device=GPU, requires_grad=True)
        loss = fl.functional.cross_entropy(logits, torch.ones(rows, dtype=torch.long, device=GPU), ignore_index=ignore)
        grad = torch.autograd.grad(loss, logits)[0]
        if loss.item() != 0 or bool(grad.ne(0).any()):
            raise SystemExit(f"nothing to average must give loss 0 and gradient 0, got {loss} and {grad}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few losses, shapes and dtypes; for compute-sanitizer")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    functions = loss_functions()
    if quick:
        functions = {name: functions[name] for name in ("cross_entropy", "mae", "hem", "nfl")}
    class_counts = (10, 101, 1031) if quick else CLASS_COUNTS
    dtypes = (torch.float32, torch.bfloat16) if quick else DTYPES
    problems = [*itertools.product(LAYOUTS, class_counts, dtypes)]
    problems += itertools.product(["rows"], LARGE_CLASS_COUNTS[: 1 if quick else None], (torch.float32, torch.bfloat16))
    checked = 0
    for name, function in functions.items():
        for layout, num_classes, dtype in problems:
            for case in cases(name, layout, num_classes, dtype):
                compare(name, function, case, f"{layout}, {num_classes} classes, {dtype}")
                checked += 1
    check_empty()
    if not quick:  # capturing needs the caching allocator, which is switched off under compute-sanitizer
        check_capture()
    print(f"{checked} calls agree with the CPU kernels")


if __name__ == "__main__":
    main()
