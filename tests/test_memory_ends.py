"""Kernels read and write no byte beside their tensors: those lie beside memory that nobody may touch.

Only where tensors are the host's, those of the emulated CUDA kernels among them. What fails here ends the process.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap

import pytest
import torch

import fused_losses as fl

if not hasattr(mmap, "PROT_READ"):  # Windows
    pytest.skip("no mprotect here", allow_module_level=True)

# Some end and begin where an access of 16 bytes does, others do not.
SHAPES = [(12, 5), (40, 10), (5, 37), (4, 130), (7, 3), (3, 261), (3, 19, 2, 2), (8, 24)]
_PAGE = mmap.PAGESIZE


@pytest.fixture
def fenced(device):
    """fenced(tensor, at_end) copies it to where memory ends, or begins."""
    if torch.device(device).type != "cpu":
        pytest.skip("memory of a GPU cannot be fenced")
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def copy(tensor, at_end):
        tensor = tensor.contiguous()
        pages = max(1, math.ceil(tensor.nbytes / _PAGE))
        memory = mmap.mmap(-1, (pages + 2) * _PAGE)
        start = _PAGE + (pages * _PAGE - tensor.nbytes if at_end else 0)
        made = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        address = made.data_ptr() - start
        for fence in (address, address + (pages + 1) * _PAGE):
            assert protect(fence, _PAGE, 0) == 0
        return made.copy_(tensor)

    return copy


def tensors_of(shape, dtype, target_dtype):
    generator = torch.Generator().manual_seed(0)
    rows = (shape[0], *shape[2:])
    target = torch.randint(shape[1], rows, generator=generator)
    target.view(-1)[-1] = -100
    return {
        "logits": torch.randn(shape, generator=generator).to(dtype),
        "target": target.to(target_dtype),
        "weight": torch.rand(shape[1], generator=generator),
        "sample_weight": torch.rand(rows, generator=generator),
        "upstream": torch.rand(rows, generator=generator).to(torch.promote_types(dtype, torch.float32)),
        "share": torch.rand(shape, generator=generator),
        "other_target": torch.randint(shape[1], rows, generator=generator).to(target_dtype),
        "lam": torch.rand(rows, generator=generator),
    }


def run(call, logits, upstream):
    """A loss without and with a gradient, that twice."""
    loss = call(logits)
    x = logits.detach().requires_grad_()
    loss = call(x)
    above = upstream if loss.dim() else upstream.view(-1)[0]
    return [loss.detach(), *(torch.autograd.grad(loss, x, above, retain_graph=True)[0] for _ in range(2))]


def calls(name, given):
    """What is asked of a loss of those tensors."""
    function = fl.LOSSES[name].function
    weights = {key: given[key] for key in ("weight", "sample_weight")}
    for options, reduction in itertools.product(({}, weights), ("none", "mean")):
        options = options | {"reduction": reduction}
        yield lambda x, o=options: function(x, given["target"], **o)
        if fl.LOSSES[name].takes_probabilities:
            yield lambda x, o=options: function(x, given["share"], **o)
            yield lambda x, o=options: fl.functional.mixed(
                name, x, given["target"], given["other_target"], given["lam"], **o
            )
            yield lambda x, o=options: fl.LogitClip(name, 1.0, **{k: v for k, v in o.items() if k != "sample_weight"})(
                x, given["target"], o.get("sample_weight")
            )
    module = fl.LOSSES[name].module()
    yield lambda x: module(x, given["target"], return_row_stats=True)[0]


@pytest.mark.any_cpu  # the C++ programs look at every instruction set
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("name", fl.LOSSES)
def test_row_losses(name, at_end, fenced):
    for k, shape in list(enumerate(SHAPES))[:: 1 if at_end else 3]:
        dtype = (torch.float32, torch.bfloat16, torch.float64, torch.float16)[k % 4]
        target_dtype = (torch.int64, torch.int32, torch.int16)[k % 3]
        given = tensors_of(shape, dtype, target_dtype)
        beside = {key: fenced(tensor, at_end) for key, tensor in given.items()}
        for ours, usual in zip(calls(name, beside), calls(name, given), strict=True):
            actual, want = (run(call, of["logits"], of["upstream"]) for call, of in ((ours, beside), (usual, given)))
            # Roughly: other addresses may take another kernel, and what has been read beside a tensor is no number.
            torch.testing.assert_close(actual, want, rtol=1e-2, atol=1e-3)
