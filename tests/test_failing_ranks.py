"""What one rank gets wrong ends the call on all ranks: none waits for a rank that has raised."""

from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_group import gloo_group, run_ranks
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fused_losses as fl
from fused_losses import _agreement, _chunks, _ops, _shard_formula, _shard_margin, _shards
from fused_losses.functional import linear_loss, z_error_cross_entropy

pytestmark = [
    pytest.mark.any_cpu,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
]

CLASSES = 3
FINE = {"logits": torch.arange(12.0).reshape(4, CLASSES).cos(), "target": torch.tensor([0, 1, 2, 1])}

# Every loss that communicates, with what its call takes beside logits and target.
LOSSES = {
    "mean": lambda g: fl.GlobalMean(fl.GCELoss(), g),
    "mean of active rows": lambda g: fl.GlobalMean(fl.HEMLoss(), g),
    "Z-Error": lambda g: fl.ZErrorCrossEntropyLoss(process_group=g),
    "Z-Error, sum": lambda g: fl.ZErrorCrossEntropyLoss(statistic="prob", base="gce", reduction="sum", process_group=g),
    "Z-Error, running": lambda g: fl.ZErrorCrossEntropyLoss(num_classes=CLASSES, running=True, process_group=g),
    "Z-Error function": lambda g: lambda *a: z_error_cross_entropy(*a[:2], sample_weight=a[2], process_group=g),
    "Z-Error binary": lambda g: binary(fl.ZErrorBCEWithLogitsLoss(process_group=g)),
    "Z-Error binary, sum": lambda g: binary(fl.ZErrorBCEWithLogitsLoss(reduction="sum", process_group=g)),
    "Z-Error squares": lambda g: squares(fl.ZMSELoss(process_group=g)),
    "small": lambda g: fl.SmallLoss("gce", 0.5, process_group=g),
    "small, none": lambda g: fl.SmallLoss("gce", 0.5, running=True, reduction="none", process_group=g),
    "clipped": lambda g: fl.ClippedLoss("gce", 0.5, process_group=g),
    "antidote": lambda g: fl.Antidote("gce", 0.5, process_group=g),
    "super": lambda g: fl.SuperLoss("gce", running=True, process_group=g),
    "super, given tau": lambda g: fl.SuperLoss("gce", tau=0.5, process_group=g),
    "wrapper around": lambda g: fl.LogitNorm(fl.SuperLoss("gce", running=True, process_group=g)),
    "wrapper within": lambda g: fl.SmallLoss(fl.LogitClip("gce", 2.0), 0.5, process_group=g),
    "both ask": lambda g: fl.SuperLoss(fl.SmallLoss("gce", 0.5, process_group=g), running=True, process_group=g),
    "around ELR": lambda g: remembering(fl.SuperLoss(fl.ELRLoss(4, CLASSES), running=True, process_group=g)),
    "linear": lambda g: linear(fl.GlobalMean(fl.GCELoss(), g)),
    "linear, mean of a sum": lambda g: linear(fl.GlobalMean(fl.GCELoss(reduction="sum"), g), reduction="mean"),
    "linear, classes sharded": lambda g: over_a_mesh(g),
    "linear, Z-Error": lambda g: linear(fl.ZErrorCrossEntropyLoss(process_group=g)),
}
# What one rank gets wrong.
BAD = {
    "target out of range": {"target": torch.tensor([0, 1, CLASSES, 1])},
    "rows of target": {"target": torch.tensor([0, 1])},
    "no tensor": {"target": [0, 1, 2, 1]},
    "dtype": {"logits": torch.zeros(4, CLASSES, dtype=torch.int64)},
    "a scalar": {"logits": torch.tensor(1.0)},
    "no logits": {"logits": None},
    "sparse": {"logits": FINE["logits"].to_sparse()},
    "rows of sample_weight": {"sample_weight": torch.ones(3)},
}


def binary(loss):
    def run(logits, target, weight):  # half a label for class 1; what is no class is no label
        return loss(first(logits), target / 2 if isinstance(target, torch.Tensor) else target, weight)

    return run


def squares(loss):
    def run(logits, target, weight):
        return loss(first(logits), target.float() if isinstance(target, torch.Tensor) else target, weight)

    return run


def over_a_mesh(group):
    """Rows over all ranks, and classes over one: two groups of which either may wait."""
    mesh = dist.init_device_mesh("cpu", (group.size(), 1), mesh_dim_names=("rows", "classes"))
    loss = fl.LinearLoss(CLASSES, CLASSES, fl.GlobalMean(fl.GCELoss(), mesh["rows"].get_group()))
    loss.linear = parallelize_module(loss.linear, mesh["classes"], ColwiseParallel())
    return loss


def remembering(loss):
    return lambda logits, target, weight: loss(logits, target, torch.arange(4), weight)


def first(logits):
    return logits[:, 0] if isinstance(logits, torch.Tensor) and logits.dim() > 1 else logits


def linear(loss, **options):
    return lambda features, target, weight: linear_loss(
        features, torch.ones(CLASSES, CLASSES), target, loss, sample_weight=weight, **options
    )


# Where one rank runs out of memory within linear_loss over classes that ranks share: a function, and at which of its
# calls. There are as many chunks as rows; the gradients of "none" take the chunks again.
AMID_CHUNKS = {
    "before the first": (_chunks, "_nothing_yet", 1),
    "logits": (_chunks, "_logits", 2),
    "numbers of the rows": (_shards, "_merge", 2),
    "formula": (_shard_formula, "_sums_of_terms", 2),
    "gradient": (_chunks, "_add_gradients", 3),
    "logits in backward": (_chunks, "_logits", 6),
}
OF_MARGINS = {  # in place of those of the same names
    "numbers of the rows": (_shard_margin, "errors_of", 2),
    "formula": (_shard_margin, "value_of", 3),
}


# The same between two exchanges of a call.
BETWEEN = {
    "Z-Error": (_ops, "z_error_class_loss", 1),
    "Z-Error binary": (_ops, "z_error_loss", 1),
    "small": (fl.SmallLoss, "_weigh", 1),
}


def sharded_step(name, reduction, rank, world_size):
    """Forward and backward in four chunks."""
    first, end = (CLASSES * r // world_size for r in (rank, rank + 1))
    loss = fl.parallel.ClassParallel(fl.LOSSES[name].module(reduction=reduction), None, first, CLASSES)
    weight = torch.ones(end - first, CLASSES, requires_grad=True)
    linear_loss(FINE["logits"], weight, FINE["target"], loss, chunk_bytes=1).sum().backward()


@contextmanager
def out_of_memory(module, function, at):
    calls, original = [], getattr(module, function)

    def fail(*args):
        calls.append(args)
        if len(calls) == at:
            raise MemoryError("no room")
        return original(*args)

    setattr(module, function, fail)
    try:
        yield
    finally:
        setattr(module, function, original)


def check_chunks(rank, world_size, bad_rank, name, place):
    reduction = "none" if place == "logits in backward" else "sum"
    places = AMID_CHUNKS | OF_MARGINS if name == "hem" else AMID_CHUNKS
    fails = out_of_memory(*places[place]) if rank == bad_rank else nullcontext()
    expected = (MemoryError, "^no room$") if rank == bad_rank else (RuntimeError, f"Rank {bad_rank} raised MemoryError")
    with fails, pytest.raises(expected[0], match=expected[1]):
        sharded_step(name, reduction, rank, world_size)
    sharded_step(name, reduction, rank, world_size)  # nothing is left over of it


def check_between(rank, bad_rank, name):
    loss = LOSSES[name](dist.group.WORLD)
    with out_of_memory(*BETWEEN[name]) if rank == bad_rank else nullcontext():
        error = error_of(loss, {})
    expected = "^no room$" if rank == bad_rank else f"Rank {bad_rank} raised MemoryError"
    assert re.search(expected, str(error)), (name, error)
    call(loss)  # nothing is left over of it


def call(loss, **given):
    return loss(*({"sample_weight": None, **FINE, **given}[name] for name in ("logits", "target", "sample_weight")))


def test_targets_of_ranks_are_told_apart():
    """Also where the differences are multiples of each other's places."""
    given = [
        [0, 0, 0, 0],
        [2, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 2, 0, 0],
        [0, 0, 0, 1],
        [4, 0, 0, 0],
        [0, 1, 0, 1],
    ]
    found = {int(_agreement._checksum(torch.tensor(target))) for target in given}
    assert len(found) == len(given)


def error_of(loss, given):
    try:
        call(loss, **given)
    except Exception as error:
        return error
    return None


def check(rank, world_size, name, make, bad_rank, bad, given):
    loss = make(dist.group.WORLD)
    call(loss)
    error = error_of(loss, given if rank == bad_rank else {})
    told = f"{type(error).__name__}: {error}"
    if name == "Z-Error squares" and bad == "target out of range":  # any number is fine there
        assert error is None
    elif rank == bad_rank:
        assert error is not None and "another rank" not in told, (name, bad, told)
    else:
        assert re.search(rf"another rank\. Rank {bad_rank} raised \w+Error: ", told), (name, bad, told)
    call(loss)  # nothing is left over of it


def check_within_a_transform(rank, bad_rank):
    """Where new tensors would be wrapped, too, and could not be sent."""
    for name in ("mean", "Z-Error", "small"):
        loss = LOSSES[name](dist.group.WORLD)
        given = {**FINE, "target": FINE["target"] + 99} if rank == bad_rank else FINE
        with pytest.raises(IndexError if rank == bad_rank else RuntimeError) as error:
            torch.func.grad(lambda logits: loss(logits, given["target"]))(FINE["logits"])
        assert ("another rank" in str(error.value)) == (rank != bad_rank), error.value
    sharded = fl.parallel.ClassParallel(fl.GCELoss(), None, CLASSES * rank, CLASSES * dist.get_world_size())
    with pytest.raises(NotImplementedError, match="no form for the transforms"):
        torch.func.grad(lambda logits: sharded(logits, FINE["target"]))(FINE["logits"])


def check_dtypes(rank, bad_rank):
    """What follows the first exchange is made of numbers as wide as the losses."""
    for name in ("small", "small, none", "antidote", "super"):
        loss = LOSSES[name](dist.group.WORLD)
        error = error_of(loss, {"logits": FINE["logits"].double()} if rank == bad_rank else {})
        assert re.search("must be float64 on all ranks .* or on none", str(error)), (name, error)
        call(loss)  # nothing is left over of it


def worker(rank: int, world_size: int, folder: str) -> None:
    with gloo_group(rank, world_size, folder):
        turn = 0
        check_within_a_transform(rank, 1)
        check_dtypes(rank, 1)
        for name, make in LOSSES.items():
            for bad, given in BAD.items():
                turn += 1
                check(rank, world_size, name, make, turn % world_size, bad, given)
        for name in ("gce", "nfl", "hem"):  # the latter with more than one collective for each chunk
            for place in AMID_CHUNKS:
                turn += 1
                check_chunks(rank, world_size, turn % world_size, name, place)
        for name in BETWEEN:
            turn += 1
            check_between(rank, turn % world_size, name)
        assert not _agreement._open.agreements
        Path(folder, f"done{rank}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_all_ranks_are_told(world_size: int, tmp_path: Path) -> None:
    run_ranks(worker, world_size, tmp_path)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(world_size))


@pytest.mark.long
@pytest.mark.parametrize("name", ["mean", "Z-Error, running", "small", "super"])
def test_compiled_code_communicates(name: str, tmp_path: Path) -> None:
    with gloo_group(0, 1, str(tmp_path)):
        loss = LOSSES[name](dist.group.WORLD)
        expected = call(loss)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(call(compiled), expected)


def compiled_worker(rank: int, world_size: int, folder: str) -> None:
    """In compiled code nobody is told: the others wait as long as the group lets them."""
    with gloo_group(rank, world_size, folder):
        group = dist.new_group(timeout=timedelta(seconds=5))
        loss = torch.compile(fl.GlobalMean(fl.GCELoss(), group), backend="aot_eager", fullgraph=True)
        call(loss)
        error = error_of(loss, BAD["rows of target"] if rank == 0 else {})
        assert ("another rank" not in str(error)) and (rank == 0 or "Timed out" in str(error)), error
        dist.barrier()  # in another group: rank 0 stays until rank 1 has given up


@pytest.mark.long
def test_compiled_code_waits_for_the_timeout(tmp_path: Path) -> None:
    run_ranks(compiled_worker, 2, tmp_path)
