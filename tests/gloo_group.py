"""The process group of tests that run on several processes."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the process that all ranks are forked from: it takes seconds, most of what such a test does.
PRELOADED = ["fused_losses", "pytest", "torch._dynamo", "torch.distributed.fsdp"]


def run_ranks(worker: Callable[..., None], world_size: int, folder: Path, *args: Any) -> None:
    """Runs ``worker(rank, world_size, folder, *args)`` on so many processes; ``worker`` is a function of a module."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    arguments = (world_size, str(folder), *args)
    torch.multiprocessing.start_processes(worker, arguments, nprocs=world_size, start_method="forkserver")


@contextmanager
def gloo_group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    """Processes meet in ``folder``. One that waits for another gives up before a test's patience ends."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=180),
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """A group of this process alone. What was wrapped inside is to be gone by the end.

    A DistributedDataParallel that outlives the group frees it while it holds Python's lock, for which the group's
    threads may wait.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()
