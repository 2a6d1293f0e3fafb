"""Losses around losses on a GPU: what the CPU says, inside a captured graph, and a memory that stays on the host."""

from __future__ import annotations

import copy

import pytest
import torch
from wrapped_losses import CASES, CLASSES, batch, value_and_grad

import fused_losses as fl
from fused_losses.integrations.mmengine import FusedLoss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.any_cpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu_without_waiting(name):
    case = CASES[name]
    module, (logits, target) = case.make(), batch()
    right = value_and_grad(case, module, logits, target)
    on_gpu = copy.deepcopy(module).cuda(), logits.cuda(), target.cuda()
    found = value_and_grad(case, *on_gpu)
    for value, expected in zip(found, right, strict=True):
        torch.testing.assert_close(value.cpu(), expected)
    if case.takes_index or name == "gjs":  # they are given tensors on the CPU here
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grad(case, *on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_on_the_host_is_one_on_the_device(dtype):
    host, device = (fl.ELRLoss(20, CLASSES, memory=where, memory_dtype=dtype).cuda() for where in ("host", "device"))
    assert host.memory.is_pinned() and device.memory.is_cuda
    for seed in range(6):
        logits, target = (tensor.cuda() for tensor in batch(torch.float32, seed=seed))
        index = torch.randint(20, (len(target),), generator=torch.Generator().manual_seed(seed))
        logits.requires_grad_()
        losses = host(logits, target, index), device(logits, target, index.cuda() if seed % 2 else index)
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
    assert torch.equal(host.state_dict()["memory"], device.memory.cpu())


def test_a_number_to_divide_by_is_not_copied_to_the_device():
    loss, (logits, target) = FusedLoss("gce"), batch(torch.float32)
    logits, target = logits.cuda(), target.cuda()
    right = loss(logits, target, reduction_override="sum") / 3.0
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss(logits, target, avg_factor=3.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, right)
