"""What only a GPU shows: captured graphs, streams, several devices, offsets beyond 32 bits, determinism."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_losses as fl
from fused_losses import functional

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.any_cpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = list(fl.LOSSES)
Step = Callable[[], tuple[Tensor, ...]]


def problem(rows: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> tuple[Tensor, Tensor]:
    logits = (torch.randn(rows, classes, device=device) * 3).to(dtype).requires_grad_()
    return logits, torch.randint(0, classes, (rows,), device=device)


def module_of(name: str) -> Callable[..., Tensor]:
    return fl.ZErrorCrossEntropyLoss() if name == "z_error" else fl.LOSSES[name].module()


def loss_and_gradient(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, target)
    return value, torch.autograd.grad(value.sum(), logits)[0]


def capture(step: Step) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of one call of ``step`` and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("classes", [10, 100, 1001, 30_000])
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_sees_new_logits_targets_and_bias(name: str, classes: int) -> None:
    torch.manual_seed(0)
    logits, target = problem(70, classes)
    loss = fl.LOSSES[name].module(logit_bias=torch.zeros(())).cuda()
    graph, results = capture(lambda: loss_and_gradient(loss, logits, target))
    for bias in (0.0, 1.5):
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
            target.copy_(torch.randint_like(target, classes))
            loss.logit_bias.fill_(bias)
        graph.replay()
        replayed = [result.clone() for result in results]
        for one, other in zip(replayed, loss_and_gradient(loss, logits, target), strict=True):
            assert torch.equal(one, other)


def with_shares(loss: fl.GCELoss, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    shares = torch.nn.functional.one_hot(target, logits.shape[1]) * 0.75 + 0.25 / logits.shape[1]
    return (loss(logits, shares),)


def with_two_labels(loss: fl.GCELoss, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (functional.mixed(loss, logits, target, target.flip(0), 0.3),)


def with_statistics(loss: fl.GCELoss, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    value, rows = loss(logits, target, return_row_stats=True)
    return value, *rows


MORE = {"shares": with_shares, "two labels": with_two_labels, "statistics": with_statistics}


@pytest.mark.parametrize("classes", [10, 100, 1001, 30_000])
@pytest.mark.parametrize(
    ("more", "name"),
    [
        *itertools.product(MORE, ["cross_entropy", "gce", "nce_agce"]),
        *itertools.product(["statistics"], ["nfl", "bi_tempered"]),
    ],
)
def test_a_captured_step_of_more_than_one_label(more: str, name: str, classes: int) -> None:
    """It can be captured, so nothing waits for the device, and gives what the CPU gives."""
    torch.manual_seed(0)
    logits, target = problem(70, classes)
    loss = fl.LOSSES[name].module(weight=torch.rand(classes) + 0.5).cuda()

    def step() -> tuple[Tensor, ...]:
        found = MORE[more](loss, logits, target)
        return *found, torch.autograd.grad(found[0], logits)[0]

    graph, results = capture(step)
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        target.copy_(torch.randint_like(target, classes))
    graph.replay()
    on_cpu = logits.detach().cpu().requires_grad_()
    found = MORE[more](loss.cpu(), on_cpu, target.cpu())
    expected = (*found, torch.autograd.grad(found[0], on_cpu)[0])
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
@pytest.mark.parametrize("rows", [500, 20_000])
def test_a_captured_step_sees_a_new_threshold(rows: int, statistic: str) -> None:
    torch.manual_seed(0)
    logits, target = problem(rows, 10)
    loss = fl.ZErrorCrossEntropyLoss(torch.tensor(3.0), statistic, "gce").cuda()
    graph, results = capture(lambda: loss_and_gradient(loss, logits, target))
    kept = []
    for threshold in (3.0, 0.5):
        loss.threshold.fill_(threshold)
        graph.replay()
        replayed = [result.clone() for result in results]
        for one, other in zip(replayed, loss_and_gradient(loss, logits, target), strict=True):
            assert torch.equal(one, other)
        kept.append(int((replayed[1] != 0).any(1).sum()))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("name", [*NAMES, "z_error"])
def test_streams_do_not_disturb_each_other(name: str) -> None:
    torch.manual_seed(0)
    loss = module_of(name)
    problems = [problem(4096, 100) for _ in range(4)]
    expected = [loss_and_gradient(loss, *one) for one in problems]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in problems], []
    for _ in range(5):
        for stream, one in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(loss_and_gradient(loss, *one))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        assert all(map(torch.equal, got, expected[i % len(problems)]))


@pytest.mark.parametrize("name", [*NAMES, "z_error"])
def test_a_call_keeps_no_memory(name: str) -> None:
    """Not even the first one in a stream: it may run inside the memory pool of a graph."""
    loss = module_of(name)
    logits, target = problem(5000, 100)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.cuda.stream(torch.cuda.Stream()):
        loss_and_gradient(loss, logits, target)
        loss(logits.detach(), target)
    torch.cuda.synchronize()
    # The thread of autograd that made the gradient may still be about to drop it; it may wait for Python's lock, too.
    deadline = time.monotonic() + 10
    while torch.cuda.memory_allocated() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 1001, 30_000])
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_takes_another_upstream_gradient(name: str, classes: int, dtype: torch.dtype) -> None:
    """Its forward expects the one that was the last when it was captured, and leaves the gradient to the bit."""
    torch.manual_seed(0)
    logits, target = problem(70, classes, dtype)
    loss, upstream = module_of(name), torch.tensor(0.25, device="cuda")
    graph, (grad,) = capture(lambda: torch.autograd.grad(loss(logits, target), logits, upstream))
    for factor in (0.25, 1.0, 3.0):
        upstream.fill_(factor)
        graph.replay()
        want = [torch.autograd.grad(loss(logits, target), logits, upstream)[0] for _ in range(3)]
        assert all(torch.equal(grad, other) for other in want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NCELoss", "HEMLoss", "ZErrorCrossEntropyLoss"])
def test_the_first_call_may_be_that_of_a_compiled_graph(name: str) -> None:
    """torch.compile with CUDA graphs runs the first call inside a graph's memory pool: in a process of its own."""
    code = f"""
import torch, fused_losses
logits = torch.randn(5000, 100, device="cuda", requires_grad=True)
target = torch.randint(0, 100, (5000,), device="cuda")
loss = fused_losses.{name}().cuda()
compiled = torch.compile(loss, mode="reduce-overhead")
for _ in range(4):
    torch.compiler.cudagraph_mark_step_begin()
    value = compiled(logits, target)
    got = value.item(), torch.autograd.grad(value, logits)[0].clone()
want = loss(logits, target)
torch.testing.assert_close(got[0], want.item(), rtol=1e-6, atol=0)
torch.testing.assert_close(got[1], torch.autograd.grad(want, logits)[0], rtol=1e-5, atol=1e-9)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_the_device_is_that_of_the_logits(name: str) -> None:
    torch.manual_seed(0)
    loss = fl.LOSSES[name].module()
    logits, target = problem(300, 50)
    elsewhere = logits.detach().to("cuda:1").requires_grad_()
    with torch.cuda.device(0):
        got = loss_and_gradient(loss, elsewhere, target.to("cuda:1"))
    assert {result.device.index for result in got} == {1} and torch.cuda.current_device() == 0
    for one, other in zip(got, loss_and_gradient(loss, logits, target), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.xdist_group("large memory")  # one after the other
@pytest.mark.parametrize("layout", ["rows", "images"])
@pytest.mark.parametrize("name", ["cross_entropy", "nce_agce", "hem", "bi_tempered"])
def test_more_than_2_to_the_31_logits(name: str, layout: str) -> None:
    """The last rows of a large problem are those of a small one."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    torch.manual_seed(0)
    shape = (2**31 // 1000 + 100, 1000) if layout == "rows" else (2**31 // (1000 * 2500) + 2, 1000, 50, 50)
    logits = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    assert logits.numel() > 2**31
    target = torch.randint(0, 1000, shape[:1] + shape[2:], device="cuda")
    loss = fl.LOSSES[name].module(reduction="none")
    last, last_target = logits[-1:].clone().requires_grad_(), target[-1:].clone()
    expected = loss_and_gradient(loss, last, last_target)
    value, gradient = loss_and_gradient(loss, logits.requires_grad_(), target)
    torch.testing.assert_close(value[-1:], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[-1:], expected[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_deterministic(name: str, dtype: torch.dtype) -> None:
    """Under torch's deterministic algorithms, which also fill fresh memory with NaN: the same bits every time."""
    torch.manual_seed(0)
    loss = fl.LOSSES[name].module()
    problems = [problem(rows, classes, dtype) for rows, classes in ((5000, 10), (3000, 100), (700, 1001), (40, 20_000))]
    torch.use_deterministic_algorithms(True)
    try:
        for one in problems:
            first, second = loss_and_gradient(loss, *one), loss_and_gradient(loss, *one)
            assert all(map(torch.equal, first, second)) and all(result.isfinite().all() for result in first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_class_statistics_are_deterministic() -> None:
    moments = torch.ops.fused_losses.class_moments
    torch.manual_seed(0)
    for classes in (1, 10, 1000, 100_000):
        score, target = torch.randn(200_000, device="cuda"), torch.randint(0, classes, (200_000,), device="cuda")
        first, second = (moments(score, target, classes) for _ in range(2))
        assert torch.equal(first, second)
        torch.testing.assert_close(first.cpu(), moments(score.cpu(), target.cpu(), classes), rtol=1e-11, atol=1e-11)


def test_functions_follow_the_current_stream() -> None:
    """What is enqueued after a slow kernel in the same stream waits for it."""
    stream = torch.cuda.Stream()
    logits, target = torch.zeros(1000, 10, device="cuda"), torch.zeros(1000, dtype=torch.long, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        logits.fill_(1.0)[:, 0] = 5.0
        loss = functional.cross_entropy(logits, target)
    stream.synchronize()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
