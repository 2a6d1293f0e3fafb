"""A job: one input, several providers and modes that take turns."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.calls import Buffers, Call, Copy
from benchmarks.cases import LOSSES, Case, LossFunction
from benchmarks.measure import Timed, Timing, launches, peak_extra_bytes, time_calls
from benchmarks.providers import PROVIDERS, WrongResult, check, exact, first_rows
from benchmarks.results import Row
from benchmarks.traffic import moved_bytes

# Value and gradient are checked on the first rows, as many as have this many logits, and at least one.
CHECKED_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Timed beside every case, under names that no provider has.
_COPY, _OUR_CE = ("copy", ""), ("our cross entropy", "")
MEMORY_MODES = ("fwd", "fwd_bwd", "fwd_bwd_scaled")


@dataclass(frozen=True)
class Job:
    """``seconds`` is the time for each provider and mode, ``tries`` how often all of them are timed."""

    case: Case
    providers: tuple[str, ...]
    modes: tuple[str, ...] = ("fwd_bwd",)
    threads: int = 1
    seconds: float = 0.2
    timer: str = "wall"
    tries: int = 1

    @property
    def key(self) -> str:
        """Tells jobs of a suite apart."""
        return f"{self.case.id} on {self.case.device}, {self.threads} threads, {self.timer}"


def run_job(job: Job, reject: Callable[[str, str], None]) -> Iterator[Row]:
    """Checks every provider, then times all that passed, in turns; of several tries that with the fastest copy counts.

    The copy is no part of what is compared: choosing by it favours nobody. ``reject`` is told the name of a provider
    that computes something else or raises, and what: it gets no row. An error of ours is raised.
    """
    case = job.case
    torch.set_num_threads(job.threads)
    same_inputs = case.spec.kind == "rows" and not case.by_class
    buffers = _buffers(replace(case, loss="cross_entropy") if same_inputs else case)
    logits, target = buffers.leaves[0].detach(), buffers.targets[0]
    # The compiler makes code for a shape: what is checked must have the shape that is timed.
    limit = logits.numel() if "compile" in job.providers else CHECKED_LOGITS[case.device]
    some = first_rows(case, logits, target, limit)
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
            except Exception as error:
                if name == "fused":
                    raise
                reject(name, failure(name, case, error))
            else:
                functions[name], first[name] = function, time.perf_counter() - began
    del want
    calls: dict[tuple[str, str], Timed] = {
        (name, mode): Call(function, mode, buffers, PROVIDERS[name].overwrites_logits)
        for name, function in functions.items()
        for mode in job.modes
    }
    yardsticks: dict[tuple[str, str], Timed] = {_COPY: Copy(buffers)}
    if case.spec.kind == "rows":
        yardsticks[_OUR_CE] = Call(LOSSES["cross_entropy"].fused, "fwd_bwd", buffers)
    runs = [time_calls(yardsticks | calls, job.seconds, job.timer) for _ in range(job.tries)]
    times = min(runs, key=lambda run: run[_COPY].median)
    copy_us, ce_us = times.pop(_COPY).median, times.pop(_OUR_CE).median if _OUR_CE in times else None
    for (name, mode), timing in times.items():
        row = _row(job, name, mode, timing, copy_us, calls[name, mode])
        yield replace(row, checked_rows=some[0].shape[0], first_s=first[name], ce_us=ce_us)


def failure(name: str, case: Case, error: Exception) -> str:
    """One line: compilers say a great deal."""
    said = " ".join(str(error).split())
    return f"{name} fails on {case.id}: {type(error).__name__}: {said[:200]}"


@functools.lru_cache(maxsize=1)
def _buffers(case: Case) -> Buffers:
    """The inputs, kept for the next job: a suite goes through its losses shape by shape."""
    return Buffers.of(case, *case.inputs())


def _row(job: Job, provider: str, mode: str, timing: Timing, copy_us: float, call: Timed) -> Row:
    case = job.case
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
        tries=job.tries,
        time_us=timing.median,
        low_us=timing.low,
        high_us=timing.high,
        copy_us=copy_us,
        floor_bytes=case.floor_bytes(mode),
        moved_bytes=_moved_bytes(provider, mode, call, case),
        checked_rows=0,
        first_s=0.0,
        peak_bytes=peak_extra_bytes(call, case.device) if mode in MEMORY_MODES else None,
        launches=launches(call) if case.device == "cuda" else None,
    )


def _moved_bytes(provider: str, mode: str, call: Timed, case: Case) -> int | None:
    described = PROVIDERS[provider].copies
    if described is not None:
        copies = described.get(mode)
        return None if copies is None else int(copies * case.logits_bytes)
    prepared = call.prepare(0)
    # HEM's mean is over active rows, which are known only after all of them.
    on_cpu = case.device == "cpu"
    at_once = provider == "fused" and not (case.dtype == "float16" and on_cpu) and case.loss != "hem" and "bwd" in mode
    moved = moved_bytes(lambda: call.run(0, prepared), at_once)
    # An upstream gradient other than 1: read and written once more. CUDA expects it from the second step on.
    return moved + 2 * case.logits_bytes if at_once and on_cpu and mode.endswith("scaled") else moved
