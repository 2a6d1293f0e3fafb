"""The process group of tests that run on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


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
