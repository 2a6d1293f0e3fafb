"""The lists of jobs that ``python -m benchmarks`` runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.cases import CLASS_COUNTS, LOSSES_WITHOUT_CLASSES, ROW_LOSSES, WRAPPED_LOSSES, Case
from benchmarks.jobs import Job
from benchmarks.providers import PLAIN

# The main ones have most competitors; the others have plain PyTorch.
MAIN_MODES = ("fwd", "fwd_train", "fwd_bwd", "fwd_bwd_scaled")
MAIN_LOSSES = ("cross_entropy", "mae_auto", "hem", "nce_mae")
MAIN_SHAPES = ((4096, 1000), (65536, 10), (256, 10))
WRAPPED_SHAPES = ((4096, 1000), (65536, 10))
PIXELS, PIXELS_LAST = (4, 150, 256, 256), (2, 150, 256, 256)  # the second for channels_last
LARGE_SHAPES: tuple[tuple[int, ...], ...] = ((2048, 10_000), PIXELS_LAST)  # too slow for every mode of the compiler
SWEPT_CLASSES = (2, 10, 100, 1000, 10_000, 100_000, 1_000_000)


def sweep(device: str, dtype: str, logits: int, seconds: float, timer: str) -> Iterator[Job]:
    """Every loss from 2 to a million classes with about ``logits`` logits in all; plain PyTorch for the main losses."""
    for num_classes in SWEPT_CLASSES:
        shape = (max(2, logits // num_classes), num_classes)
        for loss in ROW_LOSSES:
            peers = PLAIN if loss in MAIN_LOSSES else ()
            yield Job(Case(loss, shape, dtype, device), ("fused", *peers), seconds=seconds, timer=timer)


def cpu_summary() -> Iterator[Job]:
    """What `make bench` measures: within five minutes on two cores, most of it on one thread."""
    both = ("fused", "torch")
    for threads in (1, 2):
        for shape in ((32, 10), (256, 10), (4096, 1000), (65536, 10), (2048, 10_000)):
            if threads == 1 and shape in MAIN_SHAPES:
                continue  # the loop below has it, with more providers
            yield Job(Case("cross_entropy", shape), both, MAIN_MODES, threads)
        yield Job(Case("cross_entropy", PIXELS), both, ("fwd_bwd",), threads)
        yield Job(Case("cross_entropy", PIXELS_LAST, layout="channels_last"), both, ("fwd_bwd",), threads)
    for shape in MAIN_SHAPES:
        for loss in ROW_LOSSES:
            compiled = ("compile",) if loss in MAIN_LOSSES and shape != (256, 10) else ()
            modes = MAIN_MODES if loss == "cross_entropy" else ("fwd_bwd",)
            yield Job(Case(loss, shape), ("fused", *PLAIN, *compiled), modes, seconds=0.1)
    for shape in ((4096, 1000), (65536, 10)):
        for loss in ("cross_entropy", "mae_auto"):
            yield Job(Case(loss, shape, "bfloat16"), ("fused", "reference", "torch", "autocast"))
    for shape in WRAPPED_SHAPES:
        for loss in WRAPPED_LOSSES:
            yield Job(Case(loss, shape), ("fused", "reference"), seconds=0.1)
    for loss in LOSSES_WITHOUT_CLASSES:
        yield Job(Case(loss, (65536,)), ("fused", "reference"))
    yield from sweep("cpu", "float32", 1 << 20, 0.05, "wall")


def cpu_compile() -> Iterator[Job]:
    """torch.compile of every loss at every shape: half an hour, half of it the compiler's; `--minutes` cuts it short.

    Code for one shape and one number of threads, which is the strongest opponent: code for any shape was up to three
    times slower at 65536x10. So every shape and number of threads is compiled anew. Large shapes of most losses come
    last, two threads are for some losses. A forward without gradient would take another compilation.
    """

    def jobs(losses: Iterable[str], *shapes: tuple[int, ...], threads: int = 1) -> Iterator[Job]:
        for shape in shapes:
            modes = ("fwd_bwd",) if shape in LARGE_SHAPES else ("fwd_bwd", "fwd_bwd_scaled")
            yield from (Job(Case(loss, shape), ("fused", "compile"), modes, threads) for loss in losses)

    yield from jobs(ROW_LOSSES, *MAIN_SHAPES)
    yield from jobs(WRAPPED_LOSSES, *WRAPPED_SHAPES)
    yield from jobs(LOSSES_WITHOUT_CLASSES, (65536,))
    yield from jobs(MAIN_LOSSES, *LARGE_SHAPES)
    yield from jobs(MAIN_LOSSES, *MAIN_SHAPES, *LARGE_SHAPES, threads=2)
    yield from jobs([loss for loss in ROW_LOSSES if loss not in MAIN_LOSSES], *LARGE_SHAPES)


def cpu_full() -> Iterator[Job]:
    """Every loss at every number of classes and dtype, with the compiler; an hour and more."""
    yield from cpu_summary()
    for num_classes in CLASS_COUNTS:
        shape = (max(8, (1 << 22) // num_classes), num_classes)
        for dtype in ("float32", "bfloat16", "float16"):
            for loss in ROW_LOSSES:
                providers = ("fused", *PLAIN, "autocast", "compile")
                yield Job(Case(loss, shape, dtype), providers, MAIN_MODES, seconds=0.5)


def cuda() -> Iterator[Job]:
    """Targets first; device time where the GPU is busy, wall time for small batches."""
    peers = (*PLAIN, "autocast", "liger", "quack")
    modes = ("fwd", "bwd", "fwd_bwd", "fwd_bwd_scaled")

    def job(loss: str, shape: tuple[int, ...], providers: tuple[str, ...], *modes: str, dtype: str = "bfloat16") -> Job:
        case = Case(loss, shape, dtype, "cuda")
        return Job(case, ("fused", *providers), modes or ("fwd_bwd",), seconds=0.05, timer="device")

    for num_classes in CLASS_COUNTS:
        shape = ((1 << 26) // num_classes, num_classes)
        yield job("cross_entropy", shape, peers, *modes)
    for shape in ((65536, 1000), (65536, 1001), (65536, 10)):
        yield job("cross_entropy", shape, peers, *modes, dtype="float32")
        for loss in ROW_LOSSES:
            yield job(loss, shape, PLAIN)
        for loss in WRAPPED_LOSSES:
            yield job(loss, shape, ("reference",))
    for pixels in ((8, 150, 512, 512), (8, 19, 512, 1024)):
        for layout in ("contiguous", "channels_last"):
            case = Case("cross_entropy", pixels, "bfloat16", "cuda", layout)
            yield Job(case, ("fused", "torch", "autocast"), ("fwd", "fwd_bwd"), seconds=0.05, timer="device")
    for loss in ROW_LOSSES:
        yield Job(Case(loss, (256, 10), "float32", "cuda"), ("fused", *PLAIN), timer="wall")
    for loss in LOSSES_WITHOUT_CLASSES:
        yield job(loss, (65536,), ("reference",), dtype="float32")
    yield job("z_error_cross_entropy", (65536, 10), ("reference",), dtype="float32")
    yield from sweep("cuda", "bfloat16", 1 << 27, 0.02, "device")


def cuda_compile() -> Iterator[Job]:
    """torch.compile of the main losses, whose compiler takes longer than all that is timed."""
    for shape in ((65536, 1000), (65536, 10), (65536, 1001)):
        for loss in MAIN_LOSSES:
            case = Case(loss, shape, "bfloat16", "cuda")
            yield Job(case, ("fused", "compile"), ("fwd_bwd", "fwd_bwd_scaled"), seconds=0.05, timer="device")
    for num_classes in CLASS_COUNTS:
        case = Case("cross_entropy", ((1 << 26) // num_classes, num_classes), "bfloat16", "cuda")
        yield Job(case, ("fused", "compile"), seconds=0.05, timer="device")


def cuda_main() -> Iterator[Job]:
    """A few minutes for what says most: cross entropy over a copy, every other loss over that."""

    def job(loss: str, shape: tuple[int, ...], *modes: str) -> Job:
        case = Case(loss, shape, "bfloat16", "cuda")
        return Job(case, ("fused",), modes or ("fwd_bwd",), seconds=0.05, timer="device")

    shapes = {num_classes: ((1 << 26) // num_classes, num_classes) for num_classes in CLASS_COUNTS}
    for shape in shapes.values():
        yield job("cross_entropy", shape, "fwd", "fwd_bwd", "fwd_bwd_scaled")
    yield job("cross_entropy", (8, 150, 512, 512), "fwd", "fwd_bwd")
    yield job("hem", shapes[100])  # from bits, in tiles
    for num_classes in (1000, 10, 1001):
        of_rows = (*ROW_LOSSES, *WRAPPED_LOSSES)
        yield from (job(loss, shapes[num_classes]) for loss in of_rows if loss != "cross_entropy")
    yield from (job(loss, (65536,)) for loss in LOSSES_WITHOUT_CLASSES)


SUITES = {
    "summary": cpu_summary,
    "compile": cpu_compile,
    "full": cpu_full,
    "cuda": cuda,
    "cuda_main": cuda_main,
    "cuda_compile": cuda_compile,
}
