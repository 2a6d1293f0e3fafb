"""Z-Error losses in training: running statistics, derivatives of every kind, opcheck, torch.compile, CUDA launches."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import one_in
from torch.autograd import DeviceType
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses as fl
from fused_losses import functional
from fused_losses._arguments import ZErrorRule

OPS = torch.ops.fused_losses

# ---- Running statistics ----------------------------------------------------------------------------------------------


def test_running_statistics_start_with_the_first_batch(device):
    torch.manual_seed(0)
    logits, target = torch.randn(64, 4, device=device), torch.randint(0, 4, (64,), device=device)
    running, plain = fl.ZErrorCrossEntropyLoss(1.2, running=True), fl.ZErrorCrossEntropyLoss(1.2)
    assert torch.equal(running(logits, target), plain(logits, target))
    expected = fl.class_statistics(logits, target, 4)
    torch.testing.assert_close(running.running_statistics.mean, expected.mean)
    torch.testing.assert_close(running.running_statistics.std, expected.std)


def test_running_statistics_are_a_fading_merge(device):
    """Two batches: the first one's rows weigh 1 - momentum. Class 2 is in the first only and keeps what it has."""
    torch.manual_seed(0)
    first, second = torch.randn(30, 3, device=device), torch.randn(20, 3, device=device) + 1
    y1, y2 = torch.arange(30, device=device) % 3, torch.arange(20, device=device) % 2
    module = fl.ZErrorCrossEntropyLoss(running=True, momentum=0.25)
    module(first, y1)
    module(second, y2)
    x1, x2 = (z.double().gather(1, y.unsqueeze(1)).squeeze(1) for z, y in ((first, y1), (second, y2)))
    for c in (0, 1):
        x = torch.cat([x1[y1 == c], x2[y2 == c]])
        weight = torch.cat([torch.full((10,), 0.75), torch.ones(10)]).to(x)
        mean = (weight * x).sum() / weight.sum()
        # The spread of each part fades around its own mean; the spread of the means is added.
        m2 = (weight * (x - mean) ** 2).sum()
        torch.testing.assert_close(module.running_statistics.count[c], weight.sum())
        torch.testing.assert_close(module.running_statistics.mean[c], mean)
        torch.testing.assert_close(module.running_statistics.std[c], (m2 / (weight.sum() - 1)).sqrt())
    torch.testing.assert_close(module.running_statistics.mean[2], x1[y1 == 2].mean())
    torch.testing.assert_close(module.running_statistics.count[2], x1.new_tensor(10.0))


def test_momentum_zero_forgets_nothing():
    torch.manual_seed(0)
    logits, target = torch.randn(300, 3), torch.randint(0, 3, (300,))
    module = fl.ZErrorCrossEntropyLoss(running=True, momentum=0.0)
    for part in range(0, 300, 50):
        module(logits[part : part + 50], target[part : part + 50])
    torch.testing.assert_close(module.running_statistics.std, fl.class_statistics(logits, target, 3).std)


def test_running_statistics_find_what_a_small_batch_cannot():
    """Three rows a class never exceed z = 1.155."""
    torch.manual_seed(0)
    small, running = fl.ZErrorCrossEntropyLoss(), fl.ZErrorCrossEntropyLoss(running=True)
    target = torch.arange(4).repeat(3)
    for _ in range(40):
        running(F.one_hot(target, 4) * 4.0 + torch.randn(12, 4) * 0.3, target)
    logits = F.one_hot(target, 4) * 4.0
    logits[2] = torch.tensor([4.0, 0.0, -4.0, 0.0])
    assert small(logits, target, return_mask=True).mask.all()
    assert running(logits, target, return_mask=True).mask.logical_not().nonzero().flatten().tolist() == [2]


def test_running_statistics_in_eval_and_state_dict(device):
    torch.manual_seed(0)
    logits, target = torch.randn(64, 4, device=device), torch.randint(0, 4, (64,), device=device)
    module = fl.ZErrorCrossEntropyLoss(1.2, running=True)
    module(logits, target)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = module(logits * 3, target, return_mask=True)
    assert torch.equal(module.state_dict()["running_moments"], before["running_moments"])
    restored = fl.ZErrorCrossEntropyLoss(1.2, running=True).to(device)
    restored.load_state_dict(before)
    restored.eval()
    assert torch.equal(restored(logits * 3, target, return_mask=True).mask, other.mask)
    assert module.half().running_moments.dtype == torch.float64
    fresh = fl.ZErrorCrossEntropyLoss(running=True).eval()
    assert fresh(logits, target) == fl.ZErrorCrossEntropyLoss()(logits, target)  # judged by the batch itself
    with pytest.raises(ValueError, match="running statistics are those of 4 classes, got a batch with 3"):
        module.train()(logits[:, :3], target.clamp(max=2))
    for of_tasks in (fl.ZErrorBCEWithLogitsLoss(running=True, num_tasks=4), fl.ZMSELoss(per_task=True, num_tasks=4)):
        with pytest.raises(ValueError, match="of 4 tasks, got a batch with 3"):
            of_tasks(logits[:, :3].float().cpu(), torch.ones(len(logits), 3))
    with pytest.raises(AttributeError, match="running_statistics"):
        _ = fl.ZMSELoss().running_statistics


def test_running_statistics_of_the_other_losses(device):
    torch.manual_seed(0)
    x, y = torch.randn(2, 80, device=device)
    for module, target in ((fl.ZMSELoss(running=True), y), (fl.ZErrorBCEWithLogitsLoss(running=True), y > 0)):
        module.to(device)
        for _ in range(2):
            assert module(x, target).isfinite()
        assert module.running_statistics.count.sum().item() == pytest.approx(80 * 1.9)


# ---- Derivatives -----------------------------------------------------------------------------------------------------


def test_gradcheck():
    """Finite differences see the mask move with the statistics only if a row crosses the threshold: none is close."""
    torch.manual_seed(2)
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    y = torch.randn(12, dtype=torch.float64)
    for f in (
        lambda x: functional.z_mse_loss(x, y, threshold=1.1),
        lambda x: functional.z_mse_loss(x, y, threshold=1.1, statistic="residual", reduction="none"),
        lambda x: functional.z_error_bce_with_logits(x, y > 0, threshold=1.1, pos_weight=torch.tensor(2.0).double()),
        lambda x: functional.z_error_cross_entropy(x.view(6, 2), (y > 0)[:6].long(), threshold=0.9, base="gce"),
    ):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_other_inputs_are_differentiable():
    torch.manual_seed(2)
    x, y = torch.randn(2, 12, dtype=torch.float64)
    w, p = torch.rand(12, dtype=torch.float64, requires_grad=True), torch.tensor([1.5], dtype=torch.float64)
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: functional.z_mse_loss(x, y, threshold=1.1, sample_weight=w), w)
    assert torch.autograd.gradcheck(
        lambda p: functional.z_error_bce_with_logits(x, y > 0, threshold=1.1, pos_weight=p), p
    )
    t = y.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: functional.z_mse_loss(x, t, threshold=1.1), t)


def test_function_transforms():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, dtype=torch.float64)
    logits, target = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 3, (30,))
    for f, z in (
        (lambda z: functional.z_mse_loss(z, y, threshold=1.2), x),
        (lambda z: functional.z_error_bce_with_logits(z, y > 0, threshold=1.2), x),
        (lambda z: functional.z_error_cross_entropy(z, target, threshold=1.2), logits),
    ):
        leaf = z.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(f)(z), torch.autograd.grad(f(leaf), leaf)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no batching rule: torch loops and says so
            torch.testing.assert_close(torch.func.vmap(f)(torch.stack([z, z * 2])), torch.stack([f(z), f(z * 2)]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_stride_zero_and_scaled_upstream(reduction, device):
    x = torch.randn(50, device=device, requires_grad=True)
    loss = functional.z_error_bce_with_logits(x, x.detach() > 0, threshold=1.0, reduction=reduction)
    (ones,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, x, torch.full_like(loss, 8.0))
    torch.testing.assert_close(scaled, ones * 8)


def test_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            loss = functional.z_error_bce_with_logits(leaf, y > 0, threshold=1.2)
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.any_cpu  # of the registration: an operator against itself
def test_opcheck():
    torch.manual_seed(0)
    x, y = torch.randn(2, 12)
    w, target = torch.rand(12), torch.arange(12) % 3
    moments = OPS.class_moments(x, target, 3)
    rule = ZErrorRule(moments, None, [1.1], "class", "both", 2, False, True)
    score = torch.randn(12, 3)
    for arguments in ((x, target, -100, *rule), (score, target, -100, *rule._replace(with_scores=False))):
        assert set(opcheck(OPS.z_error_mask.default, arguments).values()) == {"SUCCESS"}
    for class_score, statistic in ((x, "class_prob"), (score, "class"), (score, "class_softmax")):
        for given, reduction in ((moments, "none"), (None, "mean")):
            rows = (x, class_score, target, 3, w[:3], w, None, 0.0, 0.0, given is None, -100, reduction)
            arguments = (*rows, *rule._replace(moments=given, statistic=statistic))
            assert set(opcheck(OPS.z_error_class_loss.default, arguments).values()) == {"SUCCESS"}
    for statistic, target in (("mse_loss", y), ("bce_logit", (y > 0).float())):
        groups = 1 if statistic == "mse_loss" else 2
        moments = OPS.class_moments(x, target, groups, statistic)
        for reduction in ("none", "mean"):
            arguments = (x, target, None, w, reduction, *rule._replace(moments=moments, statistic=statistic))
            assert set(opcheck(OPS.z_error_loss.default, arguments).values()) == {"SUCCESS"}
            loss, denominator, mask, _ = OPS.z_error_loss(*arguments)
            backward = (torch.ones_like(loss), denominator, mask, statistic, x, target, None, w, reduction)
            assert set(opcheck(OPS.z_error_loss_backward.default, backward).values()) == {"SUCCESS"}


COMPILED = {
    "mse": lambda running: fl.ZMSELoss(1.2, running=running),
    "bce": lambda running: fl.ZErrorBCEWithLogitsLoss((1.2, 1.3), running=running),
    "logit": lambda running: fl.ZErrorCrossEntropyLoss(torch.tensor(1.2), running=running),
    "loss": lambda running: fl.ZErrorCrossEntropyLoss(1.2, "loss", fl.GCELoss(q=0.4), running=running),
    "prob": lambda running: fl.ZErrorCrossEntropyLoss(1.2, "prob", "mae", running=running),
}


@pytest.mark.parametrize(("name", "running"), one_in(2, COMPILED, [True, False]))
@pytest.mark.slow
@pytest.mark.any_cpu
def test_compile_fullgraph(name, running):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, other = COMPILED[name](running), COMPILED[name](running)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    classes = isinstance(module, fl.ZErrorCrossEntropyLoss)
    for rows in (40, 50, 60):
        x = torch.randn(rows, 4, requires_grad=True) if classes else torch.randn(rows, requires_grad=True)
        y = torch.randint(0, 4, (rows,)) if classes else torch.arange(rows) % 2.0
        results = [f(x, y, return_mask=True) for f in (compiled, module)]
        assert torch.equal(results[0].mask, results[1].mask)
        torch.testing.assert_close(results[0].loss, results[1].loss)
        grads = [torch.autograd.grad(result.loss, x)[0] for result in results]
        torch.testing.assert_close(*grads)


# ---- CUDA -----------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names of this package's operators that ran, each of which is one launch on CUDA."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_losses":
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
@pytest.mark.parametrize(
    "base",
    [
        fl.CrossEntropyLoss(),
        fl.CrossEntropyLoss(torch.rand(3), label_smoothing=0.1, logit_bias=1.0),
        fl.NCEMAELoss(weight=torch.rand(3)),
        fl.HEMLoss(0.1, weight=torch.rand(3)),
        fl.BiTemperedLoss(),
    ],
    ids=["plain", "smoothed", "nce_mae", "hem", "bi_tempered"],
)
def test_three_operators_with_the_gradient(base, statistic):
    logits, target = torch.randn(60, 3, requires_grad=True), torch.arange(60) % 3
    module = fl.ZErrorCrossEntropyLoss(1.2, statistic, base)
    with Operators() as operators:
        torch.autograd.grad(module(logits, target), logits)
    assert operators.names == ["row_loss_with_stats", "z_error_class_loss", "row_loss_backward"]


class Stop(torch.autograd.Function):
    """Lets no gradient through: not even zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


WITH_CONSTANTS = {
    "mse": lambda x, y: functional.z_mse_loss(x, (y % 2)[:, None].expand_as(x).float(), return_mask=True),
    "bce": lambda x, y: functional.z_error_bce_with_logits(x, (y % 2)[:, None].expand_as(x).float(), return_mask=True),
    "classes": lambda x, y: functional.z_error_cross_entropy(x, y, reduction="none", return_mask=True),
    "row statistics": lambda x, y: fl.GCELoss()(x, y, return_row_stats=True),
    "linear": lambda x, y: (functional.linear_loss(x, torch.ones(4, x.shape[1]), y),),
}


@pytest.mark.any_cpu
@pytest.mark.parametrize("name", WITH_CONSTANTS)
def test_results_without_gradient_cost_no_zeros(name):
    """Each would be a launch."""
    x, y = torch.randn(3000, 4, requires_grad=True), torch.arange(3000) % 4  # no small call
    loss = WITH_CONSTANTS[name](x, y)[0]
    upstream = torch.ones_like(loss)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(loss, x, upstream)
    names = {event.name for event in profile.events()}
    assert any("Backward" in name for name in names) and not any("zero" in name or "fill" in name for name in names)
    stopped = Stop.apply(WITH_CONSTANTS[name](x, y)[0])
    assert torch.autograd.grad(stopped, x, upstream, allow_unused=True) == (None,)


def steps_on_cuda():
    """A training step of every kind of loss, by name."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 5000, device="cuda")
    logits, target = torch.randn(5000, 10, device="cuda"), torch.randint(0, 10, (5000,), device="cuda")
    x.requires_grad_()
    logits.requires_grad_()
    labels = (y > 0).float()
    running = fl.ZErrorCrossEntropyLoss(running=True)
    weight = torch.rand(10, device="cuda")

    def over(base, statistic):
        module = fl.ZErrorCrossEntropyLoss(statistic=statistic, base=base)
        return logits, lambda: module(logits, target)

    return {
        "mse": (x, lambda: functional.z_mse_loss(x, y)),
        "bce": (x, lambda: functional.z_error_bce_with_logits(x, labels, threshold=(1.0, 2.0))),
        "logit": (logits, lambda: functional.z_error_cross_entropy(logits, target)),
        "loss": (logits, lambda: functional.z_error_cross_entropy(logits, target, statistic="loss", base="gce")),
        "prob": (logits, lambda: functional.z_error_cross_entropy(logits, target, statistic="prob")),
        "hem": (logits, lambda: functional.z_error_cross_entropy(logits, target, statistic="loss", base="hem")),
        "prob over another": over(fl.NCEMAELoss(weight=weight), "prob"),
        "weighted": over(fl.HEMLoss(0.1, weight=weight), "loss"),
        "weighted and smoothed": over(fl.CrossEntropyLoss(weight, label_smoothing=0.1), "loss"),
        "running": (logits, lambda: running(logits, target)),
    }


def kernels_among(events):
    """Names of the kernels that ran on the GPU: calls of the runtime on the host, which have events of their own and
    similar names, are none, nor is zeroed or copied memory."""
    on_gpu = [event.name for event in events if event.device_type == DeviceType.CUDA]
    return [name for name in on_gpu if not name.lower().startswith(("memset", "memcpy"))]


def test_launches_are_counted_by_what_ran_on_the_gpu():
    def event(name, device):
        return SimpleNamespace(name=name, device_type=device)

    host = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemsetAsync", "cudaDeviceSynchronize", "aten::fill_"]
    device = ["void masked_loss<float, true>(...)", "Memset (Device)", "gradient<float>", "Memcpy HtoD (Pageable)"]
    events = [event(name, DeviceType.CPU) for name in host] + [event(name, DeviceType.CUDA) for name in device]
    assert kernels_among(events) == ["void masked_loss<float, true>(...)", "gradient<float>"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_and_few_launches_on_cuda():
    upstream = torch.ones((), device="cuda")
    for name, (leaf, loss) in steps_on_cuda().items():
        torch.autograd.grad(loss(), leaf, upstream)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            try:
                torch.cuda.set_sync_debug_mode("error")
                torch.autograd.grad(loss(), leaf, upstream)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        kernels = kernels_among(profile.events())
        assert len(kernels) >= 2, (name, kernels)  # forward and backward are seen
        if name != "running":
            assert len(kernels) <= 3, (name, [kernel[:150] for kernel in kernels])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_capture():
    for leaf, loss in steps_on_cuda().values():
        expected = loss()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = loss()
        graph.replay()
        if leaf.dim() == 1:
            torch.testing.assert_close(captured, expected, rtol=0, atol=0)
        assert captured.isfinite()
