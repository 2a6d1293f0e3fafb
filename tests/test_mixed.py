"""functional.mixed against the loss of each label, row by row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import fused_losses as fl
from fused_losses.integrations.timm import MixupLoss


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    a, b = (torch.randint(5, (6,), generator=generator).to(device) for _ in range(2))
    a[1] = b[1] = b[2] = -100
    return logits, a, b, torch.rand(6, generator=generator, dtype=torch.float64).to(device)


def value_and_grad(loss, logits):
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("name", fl.LOSSES)
def test_by_rows(name, batch):
    logits, a, b, lam = batch
    entry = fl.LOSSES[name]
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=logits.device)
    samples = torch.linspace(0.2, 2.0, 6, dtype=torch.float64, device=logits.device)
    for own, reduction in itertools.product(
        ({}, {"weight": weight, "sample_weight": samples}), ("none", "sum", "mean")
    ):
        rows = [entry.reference(logits, target, reduction="none", **own) for target in (a, b)]
        expected = lam * rows[0] + (1.0 - lam) * rows[1]
        if reduction != "none":
            expected = expected.sum()
        if reduction == "mean":
            shares = (lam, a), (1.0 - lam, b)
            of_class = own.get("weight", torch.ones_like(weight))
            of_row = own.get("sample_weight", torch.ones_like(samples))
            expected = expected / sum((x * of_row * of_class[y.clamp(min=0)])[y >= 0].sum() for x, y in shares)
        actual = fl.functional.mixed(name, logits, a, b, lam, reduction=reduction, **own)
        for x, y in zip(value_and_grad(actual, logits), value_and_grad(expected, logits), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", fl.LOSSES)
def test_one_factor_for_all_rows(name, batch):
    logits, a, b, _ = batch
    entry = fl.LOSSES[name]
    parts = [entry.function(logits, target, reduction="mean") for target in (a, b)]
    for lam in (0.0, 0.3, 1.0, torch.tensor(0.3, device=logits.device)):
        for loss in (name, entry.function):
            actual = fl.functional.mixed(loss, logits, a, b, lam, reduction="mean")
            torch.testing.assert_close(actual, (lam * parts[0] + (1.0 - lam) * parts[1]).to(actual.dtype))


IN_ONE_READ = [name for name, entry in fl.LOSSES.items() if entry.takes_probabilities]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def one_by_one(entry, logits, a, b, lam, weight, sample_weight, reduction):
    """From the plain formula of each label in float64."""
    values = [
        entry.reference(logits.double(), y, reduction="none", weight=weight.double()) * sample_weight for y in (a, b)
    ]
    shares = [torch.where(y == -100, 0.0, weight[y.clamp(min=0).long()] * sample_weight) for y in (a, b)]
    if reduction == "none":
        return lam * values[0] + (1.0 - lam) * values[1]
    if reduction == "sum":
        return (lam * values[0] + (1.0 - lam) * values[1]).sum()
    if lam.dim() > 0:
        return (lam * values[0] + (1.0 - lam) * values[1]).sum() / (lam * shares[0] + (1.0 - lam) * shares[1]).sum()
    return lam * values[0].sum() / shares[0].sum() + (1.0 - lam) * values[1].sum() / shares[1].sum()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (70, 33), (19, 260), (3, 7, 5, 9)])
def test_every_layout_and_dtype(shape, dtype, device):
    """Blocks of rows, rows and pixels, with labels that are equal or ignored, and weights."""
    generator = torch.Generator().manual_seed(1)
    rows, classes = (shape[0], *shape[2:]), shape[1]
    z = (3 * torch.randn(shape, generator=generator)).to(dtype).to(device)
    a, b = (torch.randint(classes, rows, generator=generator).to(device) for _ in range(2))
    a.view(-1)[1:3], b.view(-1)[2:4], b.view(-1)[5] = -100, -100, a.view(-1)[5]
    weight, samples = torch.rand(classes, generator=generator) + 0.5, torch.rand(rows, generator=generator)
    weight, samples, lam = weight.to(device), samples.to(device), torch.rand(rows, generator=generator).to(device)
    for name, reduction, share, index in itertools.product(
        ("cross_entropy", "gce", "nce_mae"), ("none", "sum", "mean"), (lam, lam.view(-1)[0]), (torch.int64, torch.uint8)
    ):
        if index is torch.uint8 and reduction != "mean":
            continue
        logits, entry = z.clone().requires_grad_(), fl.LOSSES[name]
        ignored = -100 if index is torch.int64 else 255
        targets = [torch.where(y == -100, ignored, y).to(index) for y in (a, b)]
        options = {"weight": weight, "sample_weight": samples, "reduction": reduction, "ignore_index": ignored}
        actual = fl.functional.mixed(name, logits, *targets, share, **options)
        want = one_by_one(entry, logits, a, b, share.double(), weight, samples.double(), reduction)
        torch.testing.assert_close(actual.double(), want, rtol=2e-5, atol=2e-5)
        upstream = torch.rand(actual.shape, generator=generator).to(device)
        gradient, expected = (torch.autograd.grad(x, logits, upstream.to(x.dtype))[0] for x in (actual, want))
        torch.testing.assert_close(gradient, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)


@pytest.mark.parametrize("name", IN_ONE_READ)
def test_one_read(name, device):
    """Where there is a kernel it is used; later backwards and the second derivative are right, too."""
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    logits.requires_grad_()
    a, b = torch.arange(8, device=device) % 5, torch.arange(8, device=device) % 3

    def loss(x):
        return fl.functional.mixed(name, x, a, b, 0.3)

    assert "_MixedLoss" in type(loss(logits).grad_fn).__name__
    first, second = loss(logits), loss(logits)
    grads = [torch.autograd.grad(first, logits, torch.tensor(2.0).to(first), retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(grads[0], 2.0 * torch.autograd.grad(second, logits)[0])
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()) * 2.0, grads[0])
    apart = 0.3 * fl.LOSSES[name].reference(logits, a) + 0.7 * fl.LOSSES[name].reference(logits, b)
    slopes = [torch.autograd.grad(x, logits, create_graph=True)[0] for x in (loss(logits), apart)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*(torch.autograd.grad(x[:, 0].sum(), logits)[0] for x in slopes))


@pytest.mark.any_cpu
@pytest.mark.parametrize("name", IN_ONE_READ)
def test_one_factor_that_must_not_be_looked_at(name, batch, monkeypatch):
    """As on CUDA, where reading it would wait: the same from one read; with nothing to average, too."""
    logits, a, b, _ = batch
    lam = torch.tensor(0.3, device=logits.device, dtype=torch.float64)
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=logits.device)
    samples = torch.linspace(0.2, 2.0, 6, dtype=torch.float64, device=logits.device)
    none = torch.full_like(b, -100)
    for own, reduction, second in itertools.product(
        ({}, {"weight": weight, "sample_weight": samples}), ("none", "sum", "mean"), (b, none)
    ):
        parts = [fl.LOSSES[name].reference(logits, y, reduction=reduction, **own) for y in (a, second)]
        expected = value_and_grad(lam * parts[0] + (1.0 - lam) * parts[1], logits)
        with monkeypatch.context() as patch:
            patch.setattr("fused_losses.mixed.reads_values", lambda share: False)
            patch.setattr(torch.Tensor, "item", None)
            loss = fl.functional.mixed(name, logits, a, second, lam, reduction=reduction, **own)
            assert "_MixedLoss" in type(loss.grad_fn).__name__
        for x, y in zip(value_and_grad(loss, logits), expected, strict=True):
            torch.testing.assert_close(x, y)
    monkeypatch.setattr("fused_losses.mixed.reads_values", lambda share: False)
    spoiled = logits.detach().fill_(torch.nan).requires_grad_()
    for x, y, own in ((logits, none, {}), (spoiled, none, {}), (spoiled, b.clamp(min=0), {"weight": 0.0 * weight})):
        loss = fl.functional.mixed(name, x, y, y, lam, **own)
        assert [t.abs().max() for t in value_and_grad(loss, x)] == [0.0, 0.0]


@pytest.mark.any_cpu
@pytest.mark.parametrize("lam", [torch.rand(8), torch.tensor(0.3)], ids=["by rows", "of all rows"])
def test_in_compiled_code(lam):
    logits = torch.randn(8, 5, requires_grad=True)
    a, b = torch.arange(8) % 5, torch.arange(8) % 3

    def loss(x):
        return fl.functional.mixed("gce", x, a, b, lam)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for x, y in zip(value_and_grad(compiled(logits), logits), value_and_grad(loss(logits), logits), strict=True):
        torch.testing.assert_close(x, y)


def test_a_label_that_does_not_count_is_left_out():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    impossible, other = torch.tensor([1]), torch.tensor([0])
    for lam in (0.0, torch.tensor(0.0), torch.zeros(1)):
        actual = fl.functional.mixed("cross_entropy", logits, impossible, other, lam)
        for x, y in zip(
            value_and_grad(actual, logits),
            value_and_grad(fl.functional.cross_entropy(logits, other), logits),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", fl.LOSSES)
def test_rows_whose_only_label_has_no_share_do_not_count(name, filling, device):
    """The other one is ignored, in the first row the second label, in the second row the first."""
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    logits[:2] = filling
    logits = logits.to(device).requires_grad_()
    a, b = torch.tensor([1, -100, 2, 3, 4], device=device), torch.tensor([-100, 1, 0, 3, -100], device=device)
    lam = torch.tensor([0.0, 1.0, 0.3, 0.5, 1.0], device=device)
    for reduction in ("none", "sum", "mean"):
        for make in (lambda x: x, torch.Tensor.double):
            whole = make(logits.detach()).requires_grad_()
            actual = fl.functional.mixed(name, whole, a, b, lam, reduction=reduction)
            of_rest = fl.functional.mixed(name, whole[2:], a[2:], b[2:], lam[2:], reduction=reduction)
            expected = torch.cat([of_rest.new_zeros(2), of_rest]) if reduction == "none" else of_rest
            for differentiable in (False, True):
                slopes = [
                    torch.autograd.grad(x.sum(), whole, create_graph=differentiable, retain_graph=True)[0]
                    for x in (actual, expected)
                ]
                torch.testing.assert_close(*slopes)
                assert not slopes[0][:2].any()
            torch.testing.assert_close(actual, expected)
    for share, (first, second) in ((1.0, (b[:2], a[:2])), (0.0, (a[:2], b[:2]))):  # one of all rows, a tensor
        x = logits.detach()[:1].requires_grad_()
        loss = fl.functional.mixed(name, x, first[:1], second[:1], torch.tensor(share, device=device))
        assert not loss.any() and not torch.autograd.grad(loss, x)[0].any()


def test_options_of_a_module(batch):
    logits, a, b, lam = batch
    weight = torch.rand(5, device=logits.device)
    module = fl.GCELoss(q=0.4, weight=weight, reduction="sum")
    actual = fl.functional.mixed(module, logits, a, b, lam)
    torch.testing.assert_close(
        actual, fl.functional.mixed("gce_loss", logits, a, b, lam, q=0.4, weight=weight, reduction="sum")
    )


def test_dense_targets_say_the_same_of_cross_entropy(batch):
    logits, a, b, lam = batch
    a, b = a.clamp(min=0), b.clamp(min=0)
    one_hot = torch.nn.functional.one_hot
    dense = lam[:, None] * one_hot(a, 5) + (1.0 - lam[:, None]) * one_hot(b, 5)
    torch.testing.assert_close(
        fl.functional.mixed("cross_entropy", logits, a, b, lam), torch.nn.functional.cross_entropy(logits, dense)
    )


@pytest.mark.parametrize("name", ["cross_entropy", "gce", "nce_mae"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (5,)])
def test_probabilities(name, shape, device):
    """A number, a 0-dim tensor and one number per row; beside class indices, too."""
    generator = torch.Generator().manual_seed(0)
    logits, *scores = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(3))
    logits, dim = logits.requires_grad_(), min(len(shape) - 1, 1)
    u, v = (score.softmax(dim) for score in scores)
    row_shape = shape[:dim] + shape[dim + 1 :]
    samples, lam = (torch.rand(row_shape, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    if lam.dim() > 0:
        lam.view(-1)[:2] = torch.tensor([0.0, 1.0])
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=device) if name == "cross_entropy" else None
    for second, reduction, own in itertools.product(
        (v, v.argmax(dim)), ("none", "sum", "mean"), ({}, {"sample_weight": samples, "weight": weight})
    ):
        for share in (0.3, torch.tensor(0.3, dtype=torch.float64, device=device)):
            actual = fl.functional.mixed(name, logits, u, second, share, reduction=reduction, **own)
            parts = [fl.LOSSES[name].reference(logits, y, reduction=reduction, **own) for y in (u, second)]
            expected = value_and_grad(0.3 * parts[0] + 0.7 * parts[1], logits)
            for x, y in zip(value_and_grad(actual, logits), expected, strict=True):
                torch.testing.assert_close(x, y)
        parts = [fl.LOSSES[name].reference(logits, y, reduction="none", **own) for y in (u, second)]
        expected = lam * parts[0] + (1.0 - lam) * parts[1]
        if reduction != "none" and lam.dim() > 0:
            expected = expected.sum()
            if reduction == "mean" and second is v:
                expected = expected / own.get("sample_weight", torch.ones_like(samples)).sum()
        if lam.dim() > 0 and (reduction != "mean" or second is v):
            actual = fl.functional.mixed(name, logits, u, second, lam, reduction=reduction, **own)
            for x, y in zip(value_and_grad(actual, logits), value_and_grad(expected, logits), strict=True):
                torch.testing.assert_close(x, y)


def test_probabilities_of_no_share_and_bad_input(batch):
    logits, a, b, lam = batch
    a[0], b[0] = 1, 2
    u, v = F.one_hot(a.clamp(min=0), 5).double(), F.one_hot(b.clamp(min=0), 5).double()
    with torch.no_grad():
        logits[0, u[0] > 0] = -torch.inf
    lam[0] = 0.0
    loss = fl.functional.mixed("cross_entropy", logits, u, v, lam)
    assert all(x.isfinite().all() for x in value_and_grad(loss, logits))
    with pytest.raises(RuntimeError, match=r"of the shape of the rows of logits, \(6,\), got \(6, 5\)"):
        fl.functional.mixed("gce", logits, u, v, u)
    for share in (0.3, torch.tensor(0.3), lam):
        with pytest.raises(RuntimeError, match=r"hem: .*one-hot labels are passed as class indices"):
            fl.functional.mixed("hem", logits, u, v, share)


@pytest.mark.parametrize("name", ["gce", "hem"])  # with a kernel for two labels and without
def test_float64_beside_float32_logits(name, batch):
    """Shares and weights do not widen the loss."""
    logits, a, b, lam = batch
    logits = logits.detach().float()
    weight, samples = (
        torch.linspace(0.5, 1.5, 5, device=logits.device),
        torch.linspace(0.2, 2.0, 6, device=logits.device),
    )
    for share, reduction in itertools.product((lam, lam[0]), ("none", "sum", "mean")):
        alike = {"weight": weight, "sample_weight": samples, "reduction": reduction}
        wide = {"weight": weight.double(), "sample_weight": samples.double(), "reduction": reduction}
        expected = fl.functional.mixed(name, logits, a, b, share.float(), **alike)
        actual = fl.functional.mixed(name, logits, a, b, share, **wide)
        assert actual.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("error")
def test_bad_input(batch):
    logits, a, b, lam = batch
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"^lam must be between 0.0 and 1.0, got "):
            fl.functional.mixed("gce", logits, a, b, wrong)
    for tensors in ((None, a, b), (logits, None, b), (logits, a, 1)):
        with pytest.raises(TypeError, match=r"^(logits|target_a|target_b) must be a Tensor, got "):
            fl.functional.mixed("gce", *tensors, lam)
    with pytest.raises(RuntimeError, match=r"^lam must be a number, 0-dim or of the shape of target_a"):
        fl.functional.mixed("gce", logits, a, b, lam[:2])
    with pytest.raises(ValueError, match=r"^loss must be one of cross_entropy, "):
        fl.functional.mixed("nonsense", logits, a, b, lam)
    with pytest.raises(TypeError, match=r"^loss must be a name, a function or a Module of a row loss, got MSELoss"):
        fl.functional.mixed(torch.nn.MSELoss(), logits, a, b, lam)
    with pytest.raises(TypeError, match=r"^loss must be a name, a function or a Module of a row loss, got the class G"):
        fl.functional.mixed(fl.GCELoss, logits, a, b, lam)
    fl.functional.mixed("gce", logits, a, b, lam.clone().requires_grad_())  # no gradient, and no warning of torch's
    with pytest.raises(ValueError, match=r"^reduction must be 'none', 'mean' or 'sum', got 'active_mean'"):
        fl.functional.mixed("gce", logits, a, b, lam, reduction="active_mean")


WITH_ACTIVE_MEAN = [("hem", {}), ("multi_margin", {"mean_above_zero": True}), ("multi_margin", {})]


@pytest.mark.parametrize("name, own", WITH_ACTIVE_MEAN)
def test_the_reduction_is_the_loss_s_own(name, own, batch):
    """A name, a function and a Module: lam loss(a) + (1 - lam) loss(b), each with its own active rows."""
    logits, a, b, _ = batch
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=logits.device)
    samples = torch.linspace(0.2, 2.0, 6, dtype=torch.float64, device=logits.device)
    entry = fl.LOSSES[name]
    with torch.no_grad():
        logits[3, a[3]], logits[4, b[4]] = 20.0, 20.0  # rows that satisfy one label
    for options, lam in itertools.product(
        ({}, {"weight": weight, "sample_weight": samples}),
        (0.0, 0.3, 1.0, torch.tensor(0.3, dtype=torch.float64, device=logits.device)),
    ):
        parts = [entry.reference(logits, target, **own, **options) for target in (a, b)]
        expected = value_and_grad(lam * parts[0] + (1.0 - lam) * parts[1], logits)
        for loss in (name, entry.function, entry.module(**own)):
            given = {} if isinstance(loss, torch.nn.Module) else own
            actual = value_and_grad(fl.functional.mixed(loss, logits, a, b, lam, **given, **options), logits)
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x, y)


def test_active_rows_with_a_factor_per_row(batch):
    logits, a, b, lam = batch
    samples = torch.linspace(0.2, 2.0, 6, dtype=torch.float64, device=logits.device)
    with torch.no_grad():
        logits[3, a[3]], logits[4, b[4]] = 20.0, 20.0
    rows = [fl.reference.hem_loss(logits, target, reduction="none") for target in (a, b)]
    shares = [lam * samples, (1.0 - lam) * samples]
    assert all(((row == 0) & (target >= 0)).any() for row, target in zip(rows, (a, b), strict=True))
    total = sum((share * row).sum() for share, row in zip(shares, rows, strict=True))
    active = sum(share[row != 0].sum() for share, row in zip(shares, rows, strict=True))
    actual = fl.functional.mixed("hem", logits, a, b, lam, sample_weight=samples)
    for x, y in zip(value_and_grad(actual, logits), value_and_grad(total / (active + 1e-6), logits), strict=True):
        torch.testing.assert_close(x, y)


def test_active_rows_of_a_mixup(batch):
    """timm's targets for a loss that takes no probabilities, with its default reduction."""
    logits, a, b, lam = (each[3:] for each in batch)
    target = lam[:, None] * F.one_hot(a, 5) + (1.0 - lam[:, None]) * F.one_hot(b, 5)
    total, active = 0.0, 1e-6
    for label, share in ((a, lam), (b, 1.0 - lam)):
        values = fl.reference.hem_loss(logits, label, reduction="none")
        total, active = total + (share * values).sum(), active + share[values > 0].sum()
    torch.testing.assert_close(MixupLoss(fl.HEMLoss())(logits, target), total / active)


@pytest.mark.any_cpu
def test_mixup_in_compiled_and_transformed_code():
    logits, first, share = torch.randn(8, 5), torch.arange(8) % 5, torch.rand(8, 1)
    target = share * F.one_hot(first, 5) + (1.0 - share) * F.one_hot(first.flip(0), 5)
    criterion = MixupLoss(fl.NFLLoss())
    expected = criterion(logits, target)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), expected)
    program = torch.export.export(criterion, (logits, target))
    torch.testing.assert_close(program.module()(logits, target), expected)
    for transformed in (compiled, program.module()):
        with pytest.raises(RuntimeError, match="target must have two labels in a row"):
            transformed(logits, torch.full((8, 5), 0.2))
    per_row = torch.vmap(lambda z, u: criterion(z[None], u[None]))(logits, target)
    torch.testing.assert_close(per_row.mean(), expected)


@pytest.mark.parametrize("name", fl.LOSSES)
def test_one_row_alone_has_a_scalar_loss(name):
    logits, a, b = torch.randn(5), torch.tensor([2]), torch.tensor([4])
    expected = fl.functional.mixed(name, logits, a, b, 0.3, reduction="none")
    for lam in (torch.tensor(0.3), torch.tensor([0.3])):
        loss = fl.functional.mixed(name, logits, a, b, lam, reduction="none")
        assert loss.shape == expected.shape == ()
        torch.testing.assert_close(loss, expected)
