"""Rows, features and classes that processes share, for test_parallel.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

ROWS, FEATURES, CLASSES = 12, 5, 11
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64: sums in another order


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x, w, b = (
        torch.randn(s, generator=generator, dtype=dtype) for s in [(ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)]
    )
    target = torch.arange(ROWS) % CLASSES  # in every shard
    target[3] = -100
    sample_weight = torch.rand(ROWS, generator=generator, dtype=dtype) + 0.5
    return x, w, b, target, sample_weight


def bounds(rank, world_size):
    """Uneven shards: 5, 2, 2, 2 of four."""
    ends = [CLASSES - 2 * (world_size - 1 - r) for r in range(world_size)]
    return (ends[rank - 1] if rank else 0), ends[rank]


def step(head, tensors):
    """Loss and gradients of ``head(x, w, b)`` under an upstream gradient other than 1."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    loss = head(*tensors)
    (loss * torch.linspace(1.0, 3.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return [loss.detach(), *(t.grad for t in tensors)]


class Count:
    """Counts collectives and the bytes each rank hands to them."""

    def __enter__(self):
        self.calls, self.bytes, self.real = 0, 0, {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        for name in self.real:
            setattr(dist, name, self.counted(name))
        return self

    def counted(self, name):
        def function(*args, **kwargs):
            given = args[0 if name == "all_reduce" else 1]
            self.calls += 1
            self.bytes += given.numel() * given.element_size()
            return self.real[name](*args, **kwargs)

        return function

    def __exit__(self, *_):
        for name, real in self.real.items():
            setattr(dist, name, real)
