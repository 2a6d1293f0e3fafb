"""Timing of calls that take turns, and what else is known of a call: memory, launches, host time.

Everything that is compared runs in one loop, one call after the other, so that whatever slows the machine slows all.
The order is drawn anew for every round: a call that leaves the caches full of unwritten memory slows the one behind it
(measured: by an eighth), which must not always be the same.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP_SHARE, WARM_UP_SECONDS = 0.2, 0.01  # of the time given to a measurement, and at least so long
MIN_ROUNDS, MAX_ROUNDS = 7, 300
SAMPLE_SECONDS = 3e-4  # shorter calls are timed in bundles of about this
MAX_BUNDLE = 64
# Longer than Python takes to enqueue a forward and backward.
SPIN_CYCLES, SPIN_SECONDS = 2_000_000, 1e-3


class Timed(Protocol):
    """What can be timed: see :class:`benchmarks.calls.Call`."""

    def prepare(self, i: int) -> Any: ...

    def run(self, i: int, prepared: Any) -> Any: ...


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Microseconds: median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Timing(median * 1e6, low * 1e6, high * 1e6)


def _host_sample(
    call: Timed, start: int, bundle: int, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    prepared = [call.prepare(start + k) for k in range(bundle)]
    synchronize()
    begin = clock()
    for k in range(bundle):
        call.run(start + k, prepared[k])
    synchronize()
    return (clock() - begin) / bundle


def _device_sample(call: Timed, start: int) -> float:
    """GPU time of one call. A spinning kernel lets the CPU enqueue it first: no gap between launches is in it."""
    prepared = call.prepare(start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    begin.record()
    result = call.run(start, prepared)
    end.record()
    end.synchronize()
    del result
    return float(begin.elapsed_time(end)) / 1e3


def time_calls(calls: Mapping[Key, Timed], seconds: float, timer: str = "wall") -> dict[Key, Timing]:
    """Times all ``calls`` in turns for about ``seconds`` each.

    ``timer`` "wall" is elapsed time (on CUDA with the wait for the result), "device" is GPU time, "cpu" the processor
    time of this process: for one thread on a machine with other work, whose time slices are not in it.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    clock = time.process_time if timer == "cpu" else time.perf_counter
    bundles: dict[Key, int] = {}
    once: dict[Key, float] = {}
    for name, call in calls.items():  # warm-up by time; its last calls say how many fit in a sample
        began, number = time.perf_counter(), 0
        while number < 1 or time.perf_counter() - began < max(WARM_UP_SHARE * seconds, WARM_UP_SECONDS):
            once[name] = _host_sample(call, number, 1, synchronize, clock)
            number += 1
        fitting = int(SAMPLE_SECONDS / max(once[name], 1e-7))
        bundles[name] = min(MAX_BUNDLE, max(1, fitting)) if timer != "device" else 1
    spin = SPIN_SECONDS if timer == "device" else 0.0
    round_seconds = sum(once[name] * bundles[name] + spin for name in calls)
    rounds = int(seconds * len(calls) / max(round_seconds, 1e-6))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, rounds))
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    number = 0
    turns, shuffle = list(calls.items()), random.Random(0).shuffle
    with _no_collection():
        for _ in range(rounds):
            shuffle(turns)
            for name, call in turns:
                if timer == "device":
                    samples[name].append(_device_sample(call, number))
                else:
                    samples[name].append(_host_sample(call, number, bundles[name], synchronize, clock))
                number += bundles[name]
    return {name: Timing.of(values) for name, values in samples.items()}


@contextmanager
def _no_collection() -> Any:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_extra_bytes(call: Timed, device: str) -> int:
    """Largest sum of tensors alive during the call beyond those before it, results included.

    CUDA: the caching allocator's count. CPU: the sum of allocations and releases that torch's profiler records; scratch
    that a kernel keeps on its stack or takes from malloc itself is not in it.
    """
    prepared = call.prepare(0)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call.run(0, prepared)
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call.run(0, prepared)
    del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def launches(call: Timed) -> int:
    """Kernels, copies and memory sets that one call puts on the GPU."""
    prepared = call.prepare(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call.run(0, prepared)
        torch.cuda.synchronize()
    return sum(str(e.device_type).endswith("CUDA") for e in profiler.events() or [])


@contextmanager
def quiet_stderr() -> Any:
    """Swallows what C++ code prints to stderr: the profiler announces itself there."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
