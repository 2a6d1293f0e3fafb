"""Every loss on the GPU against float64: regimes of the kernels, dtypes, layouts, options, CUDA graph capture.

Exact are the plain PyTorch references in float64 on the same (rounded) logits, with ``--quick`` on the CPU. Everything
runs twice and must give the same bits. Short and free of test frameworks, so that compute-sanitizer can run it:
``--quick`` for a few losses, ``--minutes`` for as much as there is time for (in an order that mixes everything),
``--part 0/3`` for the first of three processes that share the work, ``--device cpu`` to try the script itself.
"""

from __future__ import annotations

import argparse
import collections
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_losses as fl

Function = Callable[..., Tensor]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Who works on a row (csrc/cuda/launch.cuh), by layout and number of classes. Odd numbers have rows that are misaligned.
REGIMES: dict[str, tuple[tuple[str, int], ...]] = {
    "staged": (("rows", 10), ("rows", 19), ("rows", 32)),
    "thread": (("rows in a wider matrix", 10), ("transposed", 10), ("channels_last", 10)),
    "lanes": (("rows", 33), ("rows", 100), ("rows in a wider matrix", 101)),
    "warp": (("rows", 1000), ("rows", 1001), ("rows in a wider matrix", 1001), ("channels_last", 1001)),
    "block": (("rows", 5003), ("rows in a wider matrix", 5003), ("channels_last", 5003)),
    "cluster": (("rows", 50_257), ("rows", 150_001)),  # the blocks of one, where the device has clusters
    "two reads": (("rows", 1_000_003),),  # rows that no cluster holds
    "pixels": (("images", 10), ("images", 100), ("transposed", 100), ("images", 1001), ("images", 5003)),
}
QUICK_LOSSES = ("cross_entropy", "mae", "hem", "nfl")
QUICK_CLASSES, QUICK_DTYPES = 60_000, (torch.float32, torch.bfloat16)
# So many rows that a warp of an H100 has three and more of them, or as many tiles, one after the other: only then what
# comes for the next takes the place of the last. (In bfloat16, 65536 rows of 100 classes are two tiles at most.)
MANY_ROWS = ((8192, 1000, torch.bfloat16), (65536, 100, torch.float32))
LOSSES_OF_MANY_ROWS = ("hem", "nfl", "bi_tempered")
Z_STATISTICS = (("logit", "cross_entropy"), ("prob", "gce"), ("loss", "cross_entropy"), ("loss", "hem"))
HEM_MARGIN = 0.2  # that of the function, which all cases have
# Relative to the largest entry; the gradient is rounded once to the dtype of the logits.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case(NamedTuple):
    regime: str
    loss: str
    function: Function
    reference: Function
    logits: Tensor
    target: Tensor
    options: dict[str, object]
    where: str


def make_logits(layout: str, num_classes: int, dtype: torch.dtype) -> Tensor:
    def randn(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, dtype=torch.float64)).to(dtype)

    if layout == "rows":
        return randn(67 if num_classes < 10_000 else 5, num_classes)
    if layout == "rows in a wider matrix":
        return randn(67, num_classes + 3)[:, 1:-2]
    if layout == "transposed":
        return randn(num_classes, 67).t()
    images = randn(2, num_classes, 5, 7)
    return images if layout == "images" else images.to(memory_format=torch.channels_last)


def rows_and_statistics(name: str, exact: bool) -> Function:
    """The loss, and behind it what each row looks like, by the plain formula or by the kernel that has both."""

    def run(logits: Tensor, target: Tensor, *, sample_weight: Tensor, **options: Any) -> Tensor:
        entry = fl.LOSSES[name]
        if exact:
            values = entry.reference(logits, target, sample_weight=sample_weight, **options)
            looks = fl.row_statistics(logits.detach(), target, options["ignore_index"])
        else:
            criterion = entry.module(**options)
            values, looks = criterion(logits, target, sample_weight=sample_weight, return_row_stats=True)
        looks = looks._replace(argmax=looks.argmax % 89 / 89)  # as small as the others, and neighbours differ
        return torch.cat([values.flatten(), *(field.nan_to_num().flatten().to(values.dtype) for field in looks)])

    return run


def row_cases(regime: str, name: str, layout: str, num_classes: int, dtype: torch.dtype) -> Iterator[Case]:
    entry = fl.LOSSES[name]
    logits = make_logits(layout, num_classes, dtype)
    shape = (logits.shape[0], *logits.shape[2:])
    target = torch.randint(num_classes, shape)
    where = f"{layout}, {num_classes} classes, {dtype}"

    def case(target: Tensor, **options: object) -> Case:
        return Case(regime, name, entry.function, entry.reference, logits, target, options, where)

    yield case(target)
    target = torch.where(torch.rand(shape) < 0.3, 1, target)
    weighted = {"ignore_index": 1, "weight": torch.rand(num_classes), "sample_weight": torch.rand(shape)}
    yield case(target, **weighted, logit_bias=torch.tensor(1.5))
    yield case(target.int(), **weighted, reduction="sum")
    yield case(target, **weighted, reduction="none")
    looks, exact_looks = rows_and_statistics(name, exact=False), rows_and_statistics(name, exact=True)
    by_row: dict[str, object] = {**weighted, "reduction": "none"}
    yield Case(regime, name, looks, exact_looks, logits, target, by_row, f"{where}, with row statistics")
    if name == "cross_entropy":
        yield case(target, **weighted, label_smoothing=0.1)
        yield case(logits.double().softmax(1).to(dtype), label_smoothing=0.1)


def many_rows_case(name: str, rows: int, num_classes: int, dtype: torch.dtype) -> Iterator[Case]:
    """The mean with row statistics; weights make its kernel begin beside the one that adds them up."""
    logits, target = (3 * torch.randn(rows, num_classes)).to(dtype), torch.randint(num_classes, (rows,))
    looks, exact_looks = rows_and_statistics(name, exact=False), rows_and_statistics(name, exact=True)
    options: dict[str, object] = {"ignore_index": 1, "sample_weight": torch.rand(rows)}
    where = f"{rows} rows, {num_classes} classes, {dtype}, with row statistics"
    yield Case("many rows", name, looks, exact_looks, logits, target, options, where)


def z_error_cases(dtype: torch.dtype) -> Iterator[Case]:
    """One block and many, few classes and many; statistics of every kind."""

    def case(name: str, *tensors: Tensor, **options: object) -> Case:
        function, reference = getattr(fl.functional, name), getattr(fl.reference, name)
        where = f"{tuple(tensors[0].shape)}, {dtype}"
        return Case("z_error", name, function, reference, tensors[0], tensors[1], options, where)

    for rows in (500, 20_000):
        x = torch.randn(rows, dtype=torch.float64).to(dtype)
        y = x + torch.randn(rows).to(dtype)
        for statistic in ("target", "loss", "residual"):
            yield case("z_mse_loss", x, y, statistic=statistic, threshold=1.5)
        label = (torch.rand(rows) < 0.3).to(dtype)
        yield case("z_error_bce_with_logits", x, label, threshold=(1.0, 2.0), space="logit")
        yield case("z_error_bce_with_logits", x, label, space="prob", reduction="sum")
        for classes in (10, 300):  # of more than 256, several blocks have the statistics
            logits, target = (2 * torch.randn(rows, classes)).to(dtype), torch.randint(classes, (rows,))
            for statistic, base in Z_STATISTICS:
                yield case("z_error_cross_entropy", logits, target, statistic=statistic, base=base)
    rows = 1 + (1 << 26) // (1000 * dtype.itemsize)  # so large that a mask is made before the loss (_is_worth_a_mask)
    logits, target = (2 * torch.randn(rows, 1000)).to(dtype), torch.randint(1000, (rows,))
    yield case("z_error_cross_entropy", logits, target, statistic="logit")


def copy_to(device: str, x: Tensor) -> Tensor:
    """A copy with the strides and the storage offset of `x` (`Tensor.to` would make a slice contiguous).

    What lies between its rows is NaN: kernels may read it (an access of 16 bytes may begin and end beside a row), so
    that initcheck asks for something to be there, but no result may depend on it.
    """
    numbers = x.untyped_storage().nbytes() // x.element_size()
    storage = torch.full((numbers,), math.nan, dtype=x.dtype, device=device)
    return storage.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(x)


def loss_and_gradient(function: Function, logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    loss = function(logits.requires_grad_(), target, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


def on(device: str, case: Case) -> tuple[Tensor, Tensor]:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    return loss_and_gradient(case.function, copy_to(device, case.logits), case.target.to(device), **options)


def exact(case: Case, device: str) -> tuple[Tensor, Tensor]:
    def doubled(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, torch.float64 if x.is_floating_point() else x.dtype)

    target = doubled(case.target)
    assert isinstance(target, Tensor)
    options = {name: doubled(value) for name, value in case.options.items()}
    loss, gradient = loss_and_gradient(case.reference, case.logits.detach().to(device).double(), target, **options)
    return loss.cpu(), gradient.cpu()


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, beyond what the dtype cannot tell from zero, over the largest entry."""
    steps = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # between numbers near zero
    off = (got.cpu().double() - want).abs() - steps
    return float(off.max().clamp_min(0) / want.abs().max().clamp_min(1e-6))


def cancelled(case: Case, device: str, loss: Tensor) -> float:
    """How much larger than a mean or sum its terms are. That of a loss without a lower bound may be near 0."""
    if loss.dim() > 0:
        return 1.0
    rows = exact(case._replace(options=case.options | {"reduction": "none"}), device)[0]
    return float(rows.abs().sum() / rows.sum().abs())


def share_in_doubt(case: Case) -> float:
    """Of the classes that HEM keeps, those that rounding may bring to the other side of its threshold, in any row."""
    if "hem" not in (case.loss, case.options.get("base")):
        return 0.0
    z, target = case.logits.detach().double(), case.target.long().unsqueeze(1)
    margin = HEM_MARGIN - torch.as_tensor(case.options.get("logit_bias", 0.0))
    errors = (z - z.gather(1, target) + margin).clamp_min(0).scatter(1, target, 0.0)
    threshold = errors.mean(1, keepdim=True)
    step = 8 * torch.finfo(torch.promote_types(case.logits.dtype, torch.float32)).eps
    in_doubt = ((errors - threshold).abs() <= step * errors.amax(1, keepdim=True)) & (errors > 0)
    kept = (errors >= threshold) & (errors > 0)
    return float((in_doubt.sum(1).double() / kept.sum(1).clamp_min(1)).max())


def complaint(case: Case, device: str, exact_device: str = "cpu") -> str | None:
    """What is wrong, if anything."""
    want, got, again = exact(case, exact_device), on(device, case), on(device, case)
    tolerance = TOLERANCE[case.logits.dtype]
    where = f"({case.where}; {', '.join(case.options)})"
    for what, limit, one, other in zip(("loss", "gradient"), (min(tolerance, 3e-5), tolerance), got, want, strict=True):
        off = error(one, other)
        if off > limit and what == "loss":
            limit *= cancelled(case, exact_device, want[0])
        if off > limit:
            limit += share_in_doubt(case)
        if not off <= limit:
            return f"{case.loss}: {what} is off by {off:.2e} {where}"
    return None if all(map(torch.equal, got, again)) else f"{case.loss}: two runs differ {where}"


def check_capture() -> None:
    """A captured forward and backward sees new logits and a new bias."""
    logits = torch.randn(64, 1001, device="cuda", requires_grad=True)
    target = torch.randint(1001, (64,), device="cuda")
    bias = torch.zeros((), device="cuda")

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


def check_empty(device: str) -> None:
    for rows, ignore in ((0, -100), (5, 1)):
        logits = torch.full((rows, 3), math.nan, device=device, requires_grad=True)
        target = torch.ones(rows, dtype=torch.long, device=device)
        loss = fl.functional.cross_entropy(logits, target, ignore_index=ignore)
        grad = torch.autograd.grad(loss, logits)[0]
        if loss.item() != 0 or bool(grad.ne(0).any()):
            raise SystemExit(f"nothing to average must give loss 0 and gradient 0, got {loss} and {grad}")


def problems(quick: bool) -> list[Callable[[], Iterator[Case]]]:
    """Makers of cases: many rows and Z-Error, then the rest in an order that mixes losses, regimes and dtypes.

    Racecheck has had time for some fifty cases.
    """
    losses = QUICK_LOSSES if quick else tuple(fl.LOSSES)
    dtypes = QUICK_DTYPES if quick else DTYPES
    many = [partial(many_rows_case, name, *shape) for name in LOSSES_OF_MANY_ROWS for shape in MANY_ROWS]
    found: list[Callable[[], Iterator[Case]]] = [partial(z_error_cases, dtype) for dtype in dtypes[1:]]
    for dtype in dtypes:
        for regime, shapes in REGIMES.items():
            for layout, classes in shapes:
                if not quick or classes <= QUICK_CLASSES:
                    found += [partial(row_cases, regime, name, layout, classes, dtype) for name in losses]
    random.Random(0).shuffle(found)
    return [*many, partial(z_error_cases, dtypes[0]), *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few losses and dtypes; for compute-sanitizer")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th problem, from the I-th on")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    part, parts = map(int, options.part.split("/"))
    began, todo = time.perf_counter(), problems(options.quick)[part::parts]
    counts: collections.Counter[tuple[str, torch.dtype]] = collections.Counter()
    losses: set[str] = set()
    complaints: list[str] = []
    check_empty(options.device)
    done = 0
    for number, case in ((number, case) for number, make in enumerate(todo, 1) for case in make()):
        done = number
        found = complaint(case, options.device, "cpu" if options.quick else options.device)
        if found is not None:
            complaints.append(found)
            print(f"WRONG: {found}", flush=True)
        counts[case.regime, case.logits.dtype] += 1
        losses.add(case.loss)
        if time.perf_counter() - began > 60 * options.minutes:
            break
    # Capturing needs the caching allocator, which is switched off under compute-sanitizer.
    if options.device == "cuda" and not options.quick:
        check_capture()
    dtypes = [dtype for dtype in DTYPES if any(dtype == d for _, d in counts)]
    print(f"{'cases':<10}" + "".join(f"{str(dtype).removeprefix('torch.'):>10}" for dtype in dtypes))
    for regime in (*REGIMES, "many rows", "z_error"):
        print(f"{regime:<10}" + "".join(f"{counts[regime, dtype]:10}" for dtype in dtypes))
    print(f"{done} of {len(todo)} problems, {len(losses)} losses, {time.perf_counter() - began:.0f} s")
    print(f"{sum(counts.values()) - len(complaints)} calls agree with float64, {len(complaints)} do not")
    if complaints:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
