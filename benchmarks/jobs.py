"""A job: one input, several providers and modes that take turns. And the lists of jobs that make a suite."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.calls import Buffers, Call, Copy
from benchmarks.cases import CLASS_COUNTS, FLAT_LOSSES, ROW_LOSSES, Case, LossFunction
from benchmarks.measure import Timed, Timing, host_microseconds, launches, peak_extra_bytes, time_calls
from benchmarks.providers import PROVIDERS, WrongResult, check, exact, first_rows
from benchmarks.results import Row
from benchmarks.traffic import moved_bytes

# Value and gradient are checked on the first rows, as many as have this many logits, and at least one.
CHECKED_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}
MEMORY_MODES = ("fwd", "fwd_bwd", "fwd_bwd_scaled")


@dataclass(frozen=True)
class Job:
    """``seconds`` is the time for each provider and mode."""

    case: Case
    providers: tuple[str, ...]
    modes: tuple[str, ...] = ("fwd_bwd",)
    threads: int = 1
    seconds: float = 0.2
    timer: str = "wall"

    @property
    def key(self) -> str:
        """Tells jobs of a suite apart."""
        return f"{self.case.id} on {self.case.device}, {self.threads} threads, {self.timer}"


def run_job(job: Job, reject: Callable[[str, str], None]) -> Iterator[Row]:
    """Checks every provider, then times all that passed, in turns.

    ``reject`` is told the name of a provider that computes something else, and what: it gets no row.
    """
    case = job.case
    torch.set_num_threads(job.threads)
    same_inputs = case.spec.kind == "rows" and not case.by_class
    buffers = _buffers(replace(case, loss="cross_entropy") if same_inputs else case)
    logits, target = buffers.leaves[0].detach(), buffers.targets[0]
    some = first_rows(case, logits, target, CHECKED_LOGITS[case.device])
    want = exact(case, *some)
    functions: dict[str, LossFunction] = {}
    first: dict[str, float] = {}
    for name in job.providers:
        function = PROVIDERS[name].make(case)
        if function is not None:
            began = time.perf_counter()
            try:
                check(name, case, function, *some, want)
            except WrongResult as error:
                reject(name, str(error))
            else:
                functions[name], first[name] = function, time.perf_counter() - began
    del want
    calls: dict[tuple[str, str], Timed] = {
        (name, mode): Call(function, mode, buffers, PROVIDERS[name].overwrites_logits)
        for name, function in functions.items()
        for mode in job.modes
    }
    times = time_calls({("copy", ""): Copy(buffers), **calls}, job.seconds, job.timer, job.threads)
    copy_us = times.pop(("copy", "")).median
    for (name, mode), timing in times.items():
        row = _row(job, name, mode, timing, copy_us, calls[name, mode])
        yield replace(row, checked_rows=some[0].shape[0], first_s=first[name])


@functools.lru_cache(maxsize=1)
def _buffers(case: Case) -> Buffers:
    """The inputs, kept for the next job: a suite goes through its losses shape by shape."""
    return Buffers.of(case, *case.inputs())


def _row(job: Job, provider: str, mode: str, timing: Timing, copy_us: float, call: Timed) -> Row:
    case = job.case
    on_gpu = case.device == "cuda"
    return Row(
        loss=case.loss,
        provider=provider,
        mode=mode,
        shape=case.shape,
        dtype=case.dtype,
        device=case.device,
        layout=case.layout,
        threads=job.threads,
        timer=job.timer,
        time_us=timing.median,
        low_us=timing.low,
        high_us=timing.high,
        samples=timing.samples,
        copy_us=copy_us,
        floor_bytes=case.floor_bytes(mode),
        moved_bytes=_moved_bytes(provider, mode, call, case),
        checked_rows=0,
        first_s=0.0,
        peak_bytes=peak_extra_bytes(call, case.device) if mode in MEMORY_MODES else None,
        launches=launches(call) if on_gpu else None,
        host_us=host_microseconds(call) if on_gpu else None,
    )


def _moved_bytes(provider: str, mode: str, call: Timed, case: Case) -> int | None:
    described = PROVIDERS[provider].copies
    if described is not None:
        copies = described.get(mode)
        return None if copies is None else int(copies * case.logits_bytes)
    prepared = call.prepare(0)
    return moved_bytes(lambda: call.run(0, prepared), fused_unit=provider == "fused" and not mode.endswith("scaled"))


PLAIN = ("reference", "snippet", "torch")
MAIN_MODES = ("fwd", "fwd_train", "fwd_bwd", "fwd_bwd_scaled")
HEADLINE = ("cross_entropy", "mae_auto", "hem", "nce_mae")
COMPARED = ((4096, 1000), (65536, 10), (256, 10))
PIXELS = (4, 150, 256, 256)
SWEPT_CLASSES = (2, 10, 100, 1000, 10_000, 100_000, 1_000_000)


def sweep(device: str, dtype: str, logits: int, seconds: float, timer: str) -> Iterator[Job]:
    """Every loss from 2 to a million classes with about the same number of logits; plain PyTorch for some."""
    for num_classes in SWEPT_CLASSES:
        shape = (max(2, logits // num_classes), num_classes)
        for loss in ROW_LOSSES:
            peers = PLAIN if loss in HEADLINE else ()
            yield Job(Case(loss, shape, dtype, device), ("fused", *peers), seconds=seconds, timer=timer)


def cpu_summary() -> Iterator[Job]:
    """What `make bench` measures: within five minutes on two cores, most of it on one thread."""
    both = ("fused", "torch")
    for threads in (1, 2):
        for shape in ((32, 10), (256, 10), (4096, 1000), (65536, 10), (2048, 10_000)):
            if threads == 1 and shape in COMPARED:
                continue  # below, with more providers
            yield Job(Case("cross_entropy", shape), both, MAIN_MODES, threads)
        for layout in ("contiguous", "channels_last"):
            yield Job(Case("cross_entropy", PIXELS, layout=layout), both, ("fwd_bwd",), threads)
    for shape in COMPARED:
        for loss in ROW_LOSSES:
            compiled = ("compile",) if loss in HEADLINE and shape != (256, 10) else ()
            modes = MAIN_MODES if loss == "cross_entropy" else ("fwd_bwd",)
            yield Job(Case(loss, shape), ("fused", *PLAIN, *compiled), modes, seconds=0.1)
    for shape in ((4096, 1000), (65536, 10)):
        for loss in ("cross_entropy", "mae_auto"):
            yield Job(Case(loss, shape, "bfloat16"), ("fused", "reference", "torch", "autocast"))
    for loss in FLAT_LOSSES:
        yield Job(Case(loss, (65536,)), ("fused", "reference"))
    yield from sweep("cpu", "float32", 1 << 20, 0.03, "wall")


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
    peers = (*PLAIN, "autocast", "compile", "liger", "quack")
    modes = ("fwd", "bwd", "fwd_bwd", "fwd_bwd_scaled")

    def job(loss: str, shape: tuple[int, ...], providers: tuple[str, ...], *modes: str, dtype: str = "bfloat16") -> Job:
        return Job(Case(loss, shape, dtype, "cuda"), ("fused", *providers), modes or ("fwd_bwd",), 1, 0.05, "device")

    for num_classes in CLASS_COUNTS:
        shape = ((1 << 26) // num_classes, num_classes)
        yield job("cross_entropy", shape, peers, *modes)
    for shape in ((65536, 1000), (65536, 1001), (65536, 10)):
        yield job("cross_entropy", shape, peers, *modes, dtype="float32")
        for loss in ROW_LOSSES:
            yield job(loss, shape, (*PLAIN, "compile") if loss in HEADLINE else PLAIN)
    for pixels in ((8, 150, 512, 512), (8, 19, 512, 1024)):
        for layout in ("contiguous", "channels_last"):
            case = Case("cross_entropy", pixels, "bfloat16", "cuda", layout)
            yield Job(case, ("fused", "torch", "autocast"), ("fwd", "fwd_bwd"), 1, 0.05, "device")
    for loss in ROW_LOSSES:
        yield Job(Case(loss, (256, 10), "float32", "cuda"), ("fused", *PLAIN), timer="wall")
    for loss in FLAT_LOSSES:
        yield job(loss, (65536,), ("reference",), dtype="float32")
    yield job("z_error_cross_entropy", (65536, 10), ("reference",), dtype="float32")
    yield from sweep("cuda", "bfloat16", 1 << 27, 0.02, "device")


SUITES = {"summary": cpu_summary, "full": cpu_full, "cuda": cuda}
