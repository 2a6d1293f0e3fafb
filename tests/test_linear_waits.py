"""linear_loss waits for no number of the device, and gives the same bits again."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
from test_linear import CLASSES, FEATURES, ROWS, problem
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses as fl
from fused_losses._chunks import ChunkOptions, Layer, stand_in, sweep
from fused_losses._shards import Shard
from fused_losses.functional import linear_loss

pytestmark = pytest.mark.any_cpu  # the kernels' callers


@pytest.mark.parametrize("shard", [None, Shard(None, 0, 2 * CLASSES, CLASSES)], ids=["all classes", "half of them"])
def test_nothing_waits_for_a_gpu(shard, monkeypatch, request):
    """On tensors without numbers, which are not on the CPU: whatever asks for a number fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no such device
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    layer = Layer(*(t.detach().to("meta") for t in problem()[0]))
    target = torch.zeros(ROWS, dtype=torch.int64, device="meta")
    kinds = ("gce", "nce", "ngce", "nfl", "anl_fl", "hem", "multi_margin") if shard else fl.LOSSES
    for name in kinds:
        options = ChunkOptions(torch.float32, torch.float32, 3000, None, shard)
        args = fl.LOSSES[name].arguments(stand_in(layer, options), target, logit_bias=0.5)
        made = sweep(layer, args, options, [True] * 3)
        assert made.values.shape == (ROWS,) and made.grad_weight.shape == (CLASSES, FEATURES)
    with pytest.raises((RuntimeError, NotImplementedError)):
        sweep(layer, args, options._replace(skip_rows=True), [True] * 3)


def test_what_is_frozen_takes_no_memory():
    layer, (_, target, _) = Layer(*(t.detach() for t in problem()[0])), problem()
    options = ChunkOptions(torch.float32, torch.float32, 3000, None)
    args = fl.LOSSES["gce"].arguments(stand_in(layer, options), target, reduction="none")
    for wanted in ([True, False, False], [False, True, False], [False, False, True], [False] * 3):
        _, *gradients = sweep(layer, args, options, wanted)
        assert [gradient.numel() > 0 for gradient in gradients] == wanted


class NoNumbers(TorchDispatchMode):
    """Fails where a number, or how many there are, has to reach Python."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not re.search("local_scalar_dense|nonzero|masked_select|equal|unique", function.name()), function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nothing_around_the_sweep_waits(reduction):
    tensors, target, sample_weight = problem()
    for name in fl.LOSSES:
        with NoNumbers():
            options = {"linear_bias": tensors[2], "reduction": reduction, "sample_weight": sample_weight}
            linear_loss(tensors[0], tensors[1], target, name, **options).sum().backward()
    with pytest.raises(AssertionError, match="scalar"), NoNumbers():
        tensors[0].sum().item()


@pytest.mark.parametrize("name", ["gce", "hem", "nfl"])
def test_the_same_bits_again(name):
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((600, 64), (1000, 64), (1000,))]
    target = torch.arange(600)

    def once():
        loss = linear_loss(*tensors[:2], target, name, linear_bias=tensors[2], chunk_bytes=1 << 20)
        return loss.detach(), *torch.autograd.grad(loss, tensors)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
