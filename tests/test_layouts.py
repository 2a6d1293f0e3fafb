"""Logits and targets in any layout in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_edge_cases import DTYPES, NAMES, REDUCTIONS, assert_matches_reference, loss_and_grad
from test_values import make_problem

import fused_losses as fl

# Each makes logits of shape (4, 5, 6, 7), rows (4, 6, 7), from a contiguous tensor of any shape it asks for.
DENSE = {
    "nchw": lambda new: new(4, 5, 6, 7),
    "channels_last": lambda new: new(4, 5, 6, 7).contiguous(memory_format=torch.channels_last),
    "class first": lambda new: new(5, 4, 6, 7).transpose(0, 1),
    "image transposed": lambda new: new(4, 5, 7, 6).transpose(2, 3),
    "batch last": lambda new: new(5, 6, 7, 4).permute(3, 0, 1, 2),
    "classes between": lambda new: new(4, 6, 5, 7).permute(0, 2, 1, 3),
    "unaligned": lambda new: new(1 + 4 * 5 * 6 * 7).view(-1)[1:].view(4, 5, 6, 7),
}
SPARSE = {
    "crop": lambda new: new(4, 5, 9, 11)[:, :, 2:8, 3:10],
    "channels_last crop": lambda new: new(4, 9, 11, 5).permute(0, 3, 1, 2)[:, :, 2:8, 3:10],
    "sliced batch": lambda new: new(8, 5, 6, 7)[::2],
    "sliced classes": lambda new: new(4, 11, 6, 7)[:, 1::2],
    "every second pixel": lambda new: new(4, 5, 12, 14)[:, :, ::2, 1::2],
    "expanded batch": lambda new: new(1, 5, 6, 7).expand(4, 5, 6, 7),
    "expanded classes": lambda new: new(4, 1, 6, 7).expand(4, 5, 6, 7),
    "expanded pixels": lambda new: new(4, 5, 1, 1).expand(4, 5, 6, 7),
    "expanded number": lambda new: new(1, 1, 1, 1).expand(4, 5, 6, 7),
}


# Cross entropy takes the kernel that all functions of log p_y share through every layout and dtype; the others of them
# take a few. Losses with kernels of their own take every layout, with one dtype in turn.
LAYOUTS = [
    (name, layout, dtype)
    for i, name in enumerate(NAMES)
    for k, layout in enumerate([*DENSE, *SPARSE])
    for d, dtype in enumerate(DTYPES)
    if name == "cross_entropy" or (i + k) % 6 == 0 or (fl.LOSSES[name].sums != () and (i + k + d) % 3 == 0)
]


@pytest.mark.parametrize(("name", "layout", "dtype"), LAYOUTS)
def test_image_layouts(name, layout, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return (torch.randn(shape, generator=generator) * 3).to(dtype).to(device)

    logits = (DENSE | SPARSE)[layout](new)
    before = logits.clone()
    target = torch.randint(0, 5, (4, 6, 7), generator=generator).to(device)
    target[0, 0, :2] = -100
    sample_weight = torch.rand(4, 1, 1, generator=generator).to(device).expand(4, 6, 7)
    transposed = target.transpose(0, 2).contiguous().transpose(0, 2)
    for reduction, labels in [("none", target), ("mean", target), ("none", transposed), ("sum", transposed)]:
        grad = assert_matches_reference(name, logits, labels, reduction=reduction, sample_weight=sample_weight)
        if layout in DENSE:
            assert grad.stride() == logits.stride()
        assert torch.equal(logits, before)


# Gradients of more than 8 MiB: images whose rows are whole vectors in memory, and some whose rows are not; a number of
# pixels that ends in the middle of a tile. More classes than a tile of 256 pixels takes.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 21, 320, 336), (2, 21, 321, 335), (1, 600, 81, 96)], ids=str)
def test_large_images(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
    target[0, 5] = -100
    assert_matches_reference("cross_entropy", logits, target, reduction="sum")


@pytest.mark.any_cpu  # the C++ programs have padded and strided rows on every instruction set
@pytest.mark.parametrize("name", NAMES)
def test_row_layouts(name, device):
    logits, target, _, _ = make_problem((12, 9), torch.float32, device)
    wide = torch.randn(24, 19, device=device)
    for view in (logits.t().contiguous().t(), wide[::2, 5:14], wide[1::2, ::2][:, :9], logits[:1].expand(12, 9)):
        for labels in (target, target.repeat_interleave(2)[::2], target[3:4].expand(12)):
            for reduction in REDUCTIONS:
                grad = assert_matches_reference(name, view, labels, reduction=reduction)
                assert grad.stride() == torch.empty_like(view).stride()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_in_any_layout(reduction, device):
    logits = torch.randn(4, 5, 6, 7, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.softmax(torch.randn(4, 5, 9, 7, device=device), 1)[:, :, 1:7]
    ours = loss_and_grad(fl.functional.cross_entropy, logits, target, reduction=reduction)
    torchs = loss_and_grad(torch.nn.functional.cross_entropy, logits, target, reduction=reduction)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.any_cpu
@pytest.mark.parametrize(("dtype", "classes"), [(torch.bfloat16, 71), (torch.float32, 1001)], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "nfl", "multi_margin", "hem"])
def test_saved_logits_lie_elsewhere(name, dtype, classes, device):
    """The copy that a hook gives to backward has other strides and another alignment than what forward read."""

    def moved(saved):
        return torch.cat([saved.new_zeros(1), saved.flatten()])[1:].view(saved.shape)

    memory = torch.randn(7, classes + 2, device=device).to(dtype)
    target = torch.randint(0, classes, (7,), device=device)
    function = getattr(fl.functional, name if name == "cross_entropy" else f"{name}_loss")
    upstream = torch.linspace(1, 2, 7, device=device)
    parts = memory[:, :classes], memory.view(-1)[1 : 7 * classes + 1].view(7, classes)
    for logits, copy in itertools.product((*parts, parts[0].contiguous()), (torch.clone, moved)):
        expected = loss_and_grad(function, logits, target, upstream, reduction="none")
        with torch.autograd.graph.saved_tensors_hooks(copy, lambda saved: saved):
            found = loss_and_grad(function, logits, target, upstream, reduction="none")
        torch.testing.assert_close(found, expected)
