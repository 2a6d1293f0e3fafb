"""Memory and time of ``linear_loss``, and of losses over sharded classes: targets T13 to T17.

    python -m benchmarks.linear memory                # T13: what a step needs beyond inputs and gradients
    python -m benchmarks.linear time                  # T14: against a linear layer and loss, and torch's chunked one
    python -m benchmarks.linear sweep --out FILE      # both against the number of classes, with pictures
    python -m benchmarks.linear satisfied             # T15: HEM with 90 % of the rows satisfied
    python -m benchmarks.linear traffic --ranks 4     # T16: bytes per row and step
    python -m benchmarks.linear million               # T17: 10^6 classes on 2 processes

Every step runs in a process of its own where memory of the CPU is measured. ``--device cuda`` for the first three.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fused_losses as fl
from benchmarks.machine import describe
from fused_losses.functional import linear_loss
from fused_losses.parallel import ClassParallel, sum_gradient

MIB = 1 << 20
GPU_SHAPES = ((4096, 512, 32_000), (8192, 768, 128_256))
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
ROWS: list[dict[str, Any]] = []


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


def liger(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(x, w, target)
    return loss


def cut_cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    loss: Tensor = linear_cross_entropy(x, w, target)
    return loss


def once(step: Step, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    x.grad = w.grad = None
    loss = step(x, w, target)
    loss.backward()
    return loss.detach()


def peak_of(step: Step, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> int:
    """The step's peak beyond inputs, in bytes; gradients are in it."""
    x, w, target = make(*shape, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(step, x, w, target)
        return torch.cuda.max_memory_allocated() - before
    once(step, *make(64, shape[1], 64, dtype, device))  # code and thread pools are no memory of the step
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from what there is now
    before = _kibibytes("VmRSS")
    once(step, x, w, target)
    return (_kibibytes("VmHWM") - before) << 10


def _kibibytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


PROVIDERS: dict[str, Callable[[str], Step]] = {
    "linear + fused loss": dense,
    "linear_loss": chunked,
    "torch chunked": lambda name: torch_chunked,
    "Liger": lambda name: liger,
    "cut-cross-entropy": lambda name: cut_cross_entropy,
}


def peers(device: str) -> list[str]:
    """Those of cross entropy that are installed."""
    found = ["torch chunked"] if hasattr(F, "linear_cross_entropy") else []
    for name, module in (("Liger", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")):
        if device == "cuda" and importlib.util.find_spec(module) is not None:
            found.append(name)
    return found


def _measure_peak(provider: str, name: str, shape: tuple[int, int, int], dtype: torch.dtype, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(peak_of(PROVIDERS[provider](name), shape, dtype, "cpu"))


def _extra(provider: str, name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> int:
    """Bytes beyond inputs and gradients; on a CPU in a process of their own, on a GPU the allocator counts."""
    if device == "cuda":
        peak = peak_of(PROVIDERS[provider](name), shape, dtype, device)
    else:
        context = torch.multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=_measure_peak, args=(provider, name, shape, dtype, queue))
        process.start()
        peak = queue.get()
        process.join()
    rows, features, classes = shape
    return peak - (rows + classes) * features * dtype.itemsize


def say(what: str, shape: tuple[int, ...], provider: str, loss: str, dtype: torch.dtype, **numbers: float) -> None:
    """Prints a result and keeps it for the file."""
    row = {"what": what, "shape": shape, "provider": provider, "loss": loss, "dtype": str(dtype)[6:], **numbers}
    ROWS.append(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def say_memory(provider: str, name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    sums = shape[2] * shape[1] * 4 if dtype is not torch.float32 else 0
    extra = _extra(provider, name, shape, dtype, device)
    say("memory", shape, provider, name, dtype, extra_mib=round(extra / MIB, 1), float32_sum_mib=round(sums / MIB, 1))


def memory(device: str) -> None:
    on_cpu = ((1024, 128, 10_000), (1024, 128, 50_000), (4096, 128, 50_000))
    for dtype in (torch.float32, torch.bfloat16):
        for shape in on_cpu if device == "cpu" else GPU_SHAPES:
            say_memory("linear_loss", "hem", shape, dtype, device)
            for provider in ("linear + fused loss", "linear_loss", *peers(device)):
                say_memory(provider, "cross_entropy", shape, dtype, device)


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


def say_times(steps: dict[str, Step], tensors: tuple[Tensor, Tensor, Tensor], name: str, repeats: int) -> None:
    x, w, _ = tensors
    found = compare(steps, tensors, repeats)
    for provider, each in found.items():
        ratio = each / found["linear_loss"]
        say("time", (*x.shape, w.shape[0]), provider, name, x.dtype, ms=round(1e3 * each, 1), over_ours=round(ratio, 2))


def gemms(tensors: tuple[Tensor, Tensor, Tensor], repeats: int) -> None:
    """The three GEMMs that no implementation can do without, of all rows at once."""
    x, w, _ = (t.detach() for t in tensors)
    logits, grad_x, grad_w = x @ w.t(), torch.empty_like(x), torch.empty_like(w)
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.t(), x, out=grad_w)
        if x.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    say("time", (*x.shape, w.shape[0]), "three GEMMs", "none", x.dtype, ms=round(1e3 * statistics.median(taken[1:]), 1))


def sweep(device: str, repeats: int, out: Path) -> None:
    """Memory and time against the number of classes, and their two pictures."""
    for classes in (2_500, 5_000, 10_000, 20_000, 50_000):
        names = ["linear + fused loss", "linear_loss", *peers(device)]
        # torch's takes minutes of two cores for more classes.
        providers = {name: PROVIDERS[name] for name in names if classes < 50_000 or name != "torch chunked"}
        for provider in providers:
            say_memory(provider, "cross_entropy", (1024, 128, classes), torch.float32, device)
        tensors = make(1024, 128, classes, torch.float32, device)
        say_times({name: of("cross_entropy") for name, of in providers.items()}, tensors, "cross_entropy", repeats)
        gemms(tensors, repeats)
    picture("memory", "extra_mib", "MiB beyond inputs and gradients", out.with_name(f"{out.stem}_memory.png"))
    picture("time", "ms", "ms, forward and backward", out.with_name(f"{out.stem}_time.png"))


def picture(what: str, number: str, label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for provider in dict.fromkeys(row["provider"] for row in ROWS):
        points = [(row["shape"][-1], row[number]) for row in ROWS if (row["what"], row["provider"]) == (what, provider)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=provider)
    axes.set(
        xscale="log",
        yscale="linear" if what == "memory" else "log",
        xlabel="classes",
        ylabel=label,
        title="cross entropy, N = 1024, D = 128, float32",
    )
    classes = sorted({row["shape"][-1] for row in ROWS})
    axes.set_xticks(classes, [f"{c:,}" for c in classes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend()
    figure.savefig(path, dpi=100)


def times(device: str, repeats: int, losses: list[str]) -> None:
    shapes = ((2048, 256, 20_000),) if device == "cpu" else GPU_SHAPES
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for shape in shapes:
        tensors = make(*shape, dtype, device)
        gemms(tensors, repeats)
        for name in losses:
            steps: dict[str, Step] = {"linear + fused loss": dense(name), "linear_loss": chunked(name)}
            if name == "cross_entropy":
                steps |= {peer: PROVIDERS[peer](name) for peer in peers(device)}
            say_times(steps, tensors, name, repeats)


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
    print(f"{share:.0%} of the rows satisfied")
    for provider, each in found.items():
        ratio = each / found["skip_rows=True"]
        say(
            "satisfied", (rows, features, classes), provider, "hem", w.dtype, ms=round(1e3 * each), over=round(ratio, 2)
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
    for name in ("cross_entropy", "gce", "nfl", "nce_mae", "ngce"):
        module: Any = fl.LOSSES[name].module
        loss = ClassParallel(module(), None, 1000 * rank, classes)
        logits = torch.randn(rows, 1000, requires_grad=True)
        target = torch.arange(rows) % classes
        loss(logits, target)  # ranks agree about some things in the first call only
        sent.clear()
        loss(logits, target).backward()
        if rank == 0:
            print(f"{ranks} ranks, {name}: {len(sent)} collectives, {sum(sent) / rows:.2f} bytes per row", flush=True)
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
    parser.add_argument("what", choices=["memory", "time", "sweep", "satisfied", "traffic", "million"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--losses", nargs="+", default=["cross_entropy", "agce", "hem"], help="for time")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for results and machine; sweep's pictures go beside it")
    given = parser.parse_args()
    if given.what == "sweep" and given.out is None:
        parser.error("sweep needs --out")
    for name in ("threads", "repeats", "ranks"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    torch.set_num_threads(given.threads)
    about = describe(given.device)
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "memory":
            memory(given.device)
        elif given.what == "time":
            times(given.device, given.repeats, given.losses)
        elif given.what == "sweep":
            sweep(given.device, given.repeats, given.out)
        elif given.what == "satisfied":
            satisfied(given.device, given.repeats)
        else:
            work = _traffic if given.what == "traffic" else _million
            torch.multiprocessing.spawn(work, (given.ranks, folder), nprocs=given.ranks)  # type: ignore[attr-defined]
    if given.out is not None:
        about["command"] = about["command"].replace("benchmarks", "benchmarks.linear", 1)
        kept = json.loads(given.out.read_text()) if given.out.exists() else []
        given.out.write_text(json.dumps([*kept, {"machine": about, "rows": ROWS}], indent=1) + "\n")


if __name__ == "__main__":
    main()
