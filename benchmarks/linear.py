"""Memory and time of ``linear_loss``, and of losses over sharded classes: targets T13 to T17.

    python -m benchmarks.linear memory                # T13: what a step needs beyond inputs and gradients
    python -m benchmarks.linear time                  # T14: against a linear layer and loss, and torch's chunked one
    python -m benchmarks.linear satisfied             # T15: HEM with 90 % of the rows satisfied
    python -m benchmarks.linear traffic --ranks 4     # T16: bytes per row and step
    python -m benchmarks.linear million               # T17: 10^6 classes on 2 processes

Every step runs in a process of its own where memory is measured. ``--device cuda`` for the first three.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fused_losses as fl
from fused_losses.functional import linear_loss
from fused_losses.parallel import ClassParallel, sum_gradient

MIB = 1 << 20
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def make(rows: int, features: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator).to(device, dtype).requires_grad_()
    w = torch.empty(classes, features).normal_(0.0, 0.05, generator=generator).to(device, dtype).requires_grad_()
    return x, w, torch.randint(0, classes, (rows,), generator=generator).to(device)


def dense(name: str) -> Step:
    function = fl.LOSSES[name].function
    return lambda x, w, target: function(F.linear(x, w), target)


def chunked(name: str, **options: Any) -> Step:
    return lambda x, w, target: linear_loss(x, w, target, name, **options)


def torch_chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, target, options=options)


def once(step: Step, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    x.grad = w.grad = None
    loss = step(x, w, target)
    loss.backward()
    return loss.detach()


def peak_of(step: Step, shape: tuple[int, int, int], dtype: torch.dtype, device: str, queue: Any) -> None:
    """Puts the step's peak beyond inputs, in bytes, into the queue; gradients are in it."""
    x, w, target = make(*shape, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(step, x, w, target)
        queue.put(torch.cuda.max_memory_allocated() - before)
        return
    once(step, *make(64, shape[1], 64, dtype, device))  # code and thread pools are no memory of the step
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from what there is now
    before = _kibibytes("VmRSS")
    once(step, x, w, target)
    queue.put((_kibibytes("VmHWM") - before) << 10)


def _kibibytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


PROVIDERS: dict[str, Callable[[str], Step]] = {
    "linear + fused loss": dense,
    "linear_loss": chunked,
    "torch chunked": lambda name: torch_chunked,
}


def _measure_peak(
    provider: str, name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, q: Any
) -> None:
    torch.set_num_threads(1)
    peak_of(PROVIDERS[provider](name), shape, dtype, device, q)


def memory(device: str) -> None:
    context = torch.multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1024, 128, 10_000), (1024, 128, 50_000), (4096, 128, 50_000)):
            rows, features, classes = shape
            gradients = (rows + classes) * features * dtype.itemsize
            sums = classes * features * 4 if dtype is not torch.float32 else 0
            for provider, name in (("linear + fused loss", "cross_entropy"), ("linear_loss", "cross_entropy"),
                                   ("linear_loss", "hem"), ("torch chunked", "cross_entropy")):  # fmt: skip
                queue = context.SimpleQueue()
                process = context.Process(  # type: ignore[attr-defined]
                    target=_measure_peak, args=(provider, name, shape, dtype, device, queue)
                )
                process.start()
                extra = queue.get() - gradients
                process.join()
                print(
                    f"{dtype} {rows}x{features}x{classes} {provider} {name}: beyond gradients {extra / MIB:.0f} MiB, "
                    f"of which float32 sum {sums / MIB:.0f} MiB",
                    flush=True,
                )


def seconds(step: Step, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of one step; with one thread on a CPU, seconds of that CPU, which other processes do not lengthen as much."""
    clock = time.process_time if tensors[0].is_cpu and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    once(step, *tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return clock() - begin


def compare(steps: dict[str, Step], tensors: tuple[Tensor, Tensor, Tensor], repeats: int) -> dict[str, float]:
    """Medians of steps that take turns, so that what else the machine does meets all alike."""
    for step in steps.values():
        seconds(step, tensors)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            found[name].append(seconds(step, tensors))
    return {name: statistics.median(times) for name, times in found.items()}


def times(device: str, repeats: int) -> None:
    shapes = [(2048, 256, 20_000)] if device == "cpu" else [(4096, 512, 32_000), (8192, 768, 128_256)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for shape in shapes:
        tensors = make(*shape, dtype, device)
        for name in ("cross_entropy", "agce", "hem"):
            steps: dict[str, Step] = {"linear + fused loss": dense(name), "linear_loss": chunked(name)}
            if name == "cross_entropy":
                steps["torch chunked"] = torch_chunked
            found = compare(steps, tensors, repeats)
            ours = found["linear_loss"]
            print(
                f"{'x'.join(map(str, shape))} {dtype} {name}: "
                + ", ".join(f"{n} {1e3 * t:.0f} ms ({t / ours:.2f})" for n, t in found.items()),
                flush=True,
            )


def satisfied(device: str, repeats: int) -> None:
    """Prototypes of classes as weights: rows near theirs satisfy the margin, nine of ten."""
    rows, features, classes = 2048, 256, 20_000
    generator = torch.Generator().manual_seed(0)
    w = F.normalize(torch.randn(classes, features, generator=generator)).to(device).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    near = w.detach()[target].clone()
    near[::10] = torch.randn(near[::10].shape, generator=generator).to(device)
    tensors = (near.requires_grad_(), w, target)
    steps = {f"skip_rows={skip}": chunked("hem", skip_rows=skip) for skip in (False, True)}
    steps["linear + fused loss"] = dense("hem")
    found = compare(steps, tensors, repeats)
    with torch.no_grad():
        share = (linear_loss(*tensors, "hem", reduction="none") == 0).float().mean().item()
    print(
        f"{share:.0%} of the rows satisfied: " + ", ".join(f"{n} {1e3 * t:.0f} ms" for n, t in found.items()),
        f"without / with skipping {found['skip_rows=False'] / found['skip_rows=True']:.2f}",
    )


def _join(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)


def _traffic(rank: int, ranks: int, folder: str) -> None:
    _join(rank, ranks, folder)
    rows, classes = 512, 1000 * ranks
    sent: list[int] = []

    def count(name: str, of: int) -> None:
        real = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            sent.append(args[of].numel() * args[of].element_size())
            return real(*args, **kwargs)

        setattr(dist, name, counted)

    count("all_reduce", 0)
    count("all_gather", 1)
    for name in ("cross_entropy", "gce", "nce_mae", "ngce"):
        module: Any = fl.LOSSES[name].module
        loss = ClassParallel(module(), None, 1000 * rank, classes)
        logits = torch.randn(rows, 1000, requires_grad=True)
        loss(logits, torch.arange(rows) % classes).backward()
        if rank == 0:
            rest = sum(sent[1:]) / rows
            print(
                f"{ranks} ranks, {name}: {len(sent)} collectives, {sent[0]} bytes and {rest:.2f} bytes per row",
                flush=True,
            )
        sent.clear()
    dist.destroy_process_group()


def _million(rank: int, ranks: int, folder: str) -> None:
    _join(rank, ranks, folder)
    classes, rows, features = 1_000_000, 1024, 128
    here = classes // ranks
    x, w, _ = make(rows, features, here, torch.float32, "cpu")
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
    loss = ClassParallel(fl.GCELoss(logit_bias="auto"), None, here * rank, classes)
    begin = time.perf_counter()
    value = linear_loss(sum_gradient(x), w, target, loss, chunk_bytes=512 * MIB)
    value.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"rank {rank}: loss {value.item():.6f}, {time.perf_counter() - begin:.1f} s, peak {peak} MiB", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "satisfied", "traffic", "million"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "memory":
            memory(given.device)
        elif given.what == "time":
            times(given.device, given.repeats)
        elif given.what == "satisfied":
            satisfied(given.device, given.repeats)
        else:
            work = _traffic if given.what == "traffic" else _million
            torch.multiprocessing.spawn(work, (given.ranks, folder), nprocs=given.ranks)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
