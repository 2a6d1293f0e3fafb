"""A head of a million classes, divided among processes: each has its share of the weight and no logits as a whole.

    torchrun --nproc-per-node 2 examples/class_parallel.py
    python examples/class_parallel.py                       # the same on two processes of its own

trains a few steps on made-up images, on the CPU. Every process computes the same backbone from the same batch, has the
gradients of its own classes, and prints nothing but on rank 0: loss, time and the largest memory of a process. On GPUs
initialise "nccl" and move tensors to the device of the rank; the rest stays. Half a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

import fused_losses as fl
from fused_losses.functional import linear_loss
from fused_losses.parallel import ClassParallel, sum_gradient


def train(classes: int, features: int = 128, steps: int = 3) -> list[float]:
    """The loss of every step, the same on all ranks of the default process group."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first, end = classes * rank // ranks, classes * (rank + 1) // ranks
    torch.manual_seed(0)  # the same backbone and batches on all ranks
    backbone = nn.Sequential(nn.Linear(32, features), nn.ReLU())
    head = nn.Parameter(torch.zeros(end - first, features))  # this rank's classes
    images, labels = torch.randn(64, 32), torch.randint(0, classes, (64,))
    criterion = ClassParallel(fl.GCELoss(logit_bias="auto"), None, first, classes)
    optimizer = torch.optim.SGD([*backbone.parameters(), head], lr=1.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = linear_loss(sum_gradient(backbone(images)), head, labels, criterion)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank: int, ranks: int, rendezvous: str, classes: int) -> None:
    """One process: joins the others, trains and reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    begin = time.perf_counter()
    losses = train(classes)
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"{classes} classes on {ranks} processes: loss {' -> '.join(f'{loss:.4f}' for loss in losses)}")
        print(f"{time.perf_counter() - begin:.1f} s, at most {peak.item()} MiB a process")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with command-line arguments (``sys.argv`` by default)."""
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1001 classes: a second")
    classes = 1_001 if parser.parse_args(argv).quick else 1_000_000
    if "RANK" in os.environ:  # torchrun has started this
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", classes)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (2, f"file://{folder}/rendezvous", classes), nprocs=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
