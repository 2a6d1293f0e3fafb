"""row_statistics against plain torch operations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import one_in
from functorch.compile import make_boxed_func
from test_layouts import DENSE, SPARSE
from torch._dynamo.backends.common import aot_autograd

import fused_losses as fl

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# float32 arithmetic on exactly converted logits: a few roundings of numbers up to the largest logit.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def expected(logits, target, ignore_index=-100):
    """The fields of RowStatistics, rows first."""
    z = logits.double().movedim(1, -1) if logits.dim() > 1 else logits.double()
    ignored = target == ignore_index
    y = torch.where(ignored, 0, target.long()).unsqueeze(-1)
    log_p = torch.log_softmax(z, -1)
    of_target = z.gather(-1, y).squeeze(-1)
    others = z.scatter(-1, y, -math.inf).amax(-1) if z.shape[-1] > 1 else torch.full_like(of_target, -math.inf)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    fields = [log_p.gather(-1, y).squeeze(-1), log_p.amax(-1).exp(), z.amax(-1), of_target - others, entropy]
    return [torch.where(ignored, math.nan, field) for field in fields], z.argmax(-1)


def assert_right(logits, target, ignore_index=-100):
    rows = fl.row_statistics(logits, target, ignore_index)
    fields, argmax = expected(logits, target, ignore_index)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[logits.dtype]
    for name, field in zip(rows._fields, fields, strict=False):
        actual = getattr(rows, name)
        assert actual.dtype == acc and actual.shape == target.shape and not actual.requires_grad
        torch.testing.assert_close(
            actual.double(),
            field,
            rtol=tolerance,
            atol=10 * tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert rows.argmax.dtype == torch.int64 and torch.equal(rows.argmax, argmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 7, 10, 33, 100, 101, 257, 1000, 5001])
def test_rows(classes, dtype, device):
    generator = torch.Generator().manual_seed(classes)
    for rows, scale in [(1, 1.0), (5, 4.0), (67, 2.0)]:
        logits = (scale * torch.randn(rows, classes, generator=generator)).to(device, dtype)
        target = torch.randint(classes, (rows,), generator=generator).to(device)
        target[rows // 2] = -100
        assert_right(logits, target)
        assert_right(logits.requires_grad_(), target.to(torch.int32))
        assert_right(logits[0], target[0])
        assert_right(logits.detach().t().contiguous().t(), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*DENSE, *SPARSE])
def test_image_layouts(layout, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return (torch.randn(shape, generator=generator) * 3).to(dtype).to(device)

    target = torch.randint(0, 5, (4, 6, 7), generator=generator).to(device)
    target[0, 0, :2] = 4
    for labels in (target, target.transpose(0, 2).contiguous().transpose(0, 2), target.to(torch.uint8)):
        assert_right((DENSE | SPARSE)[layout](new), labels, ignore_index=4)


def test_worked_by_hand():
    rows = fl.functional.row_statistics(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([1, 0]))
    torch.testing.assert_close(rows.log_prob, torch.tensor([math.log(0.25), math.log(0.5)]))
    torch.testing.assert_close(rows.max_prob, torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(rows.max_logit, torch.tensor([math.log(3.0), 0.0]))
    torch.testing.assert_close(rows.margin, torch.tensor([-math.log(3.0), 0.0]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(rows.entropy, torch.tensor([entropy, math.log(2.0)]))
    assert rows.argmax.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 300])
def test_not_finite(classes, dtype, device):
    nan, inf = math.nan, math.inf
    logits = torch.zeros(8, classes, dtype=dtype, device=device)
    logits[:, 1] = torch.tensor([nan, inf, -inf, 1.0, -inf, 0.0, nan, 1.0])
    logits[4] = -inf
    logits[5, 1:] = -inf
    logits[6, 2] = inf
    target = torch.tensor([0, 0, 1, 1, 0, 0, 1, 2], device=device)
    for layout in (logits, logits.t().contiguous().t()):
        rows = fl.row_statistics(layout, target)
        assert rows.argmax.tolist() == [1, 1, 0, 1, 0, 0, 1, 1] == logits.double().argmax(1).tolist()
        for undefined in (rows.log_prob, rows.max_prob, rows.entropy):
            assert undefined.isnan().tolist() == [True, True, False, False, True, False, True, False]
        assert rows.max_logit.nan_to_num(7.0, 8.0, 9.0).tolist() == [7, 8, 0, 1, 9, 0, 7, 1]
        assert rows.margin.nan_to_num(7.0, 8.0, 9.0).tolist() == [7, 9, 9, 1, 7, 8, 7, -1]
        assert rows.log_prob[2] == -inf and rows.log_prob[5] == 0 and rows.entropy[5] == 0
        torch.testing.assert_close(rows.entropy[2].item(), math.log(classes - 1), rtol=1e-5, atol=0)
        fields, _ = expected(logits[[2, 3, 7]], target[[2, 3, 7]])
        for actual, field in zip(rows, fields, strict=False):
            torch.testing.assert_close(actual[[2, 3, 7]].double(), field, rtol=1e-5, atol=1e-6)


def test_bad_input(device):
    logits = torch.zeros(2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"^row_statistics: .*target"):
        fl.row_statistics(logits, torch.zeros(2, 3, device=device))
    with pytest.raises(ValueError, match="batch_size"):
        fl.row_statistics(logits, torch.zeros(3, dtype=torch.int64, device=device))
    if device == "cpu":
        with pytest.raises(IndexError, match="Target 3 is out of bounds"):
            fl.row_statistics(logits, torch.tensor([0, 3]))
    empty = fl.row_statistics(logits[:0], torch.zeros(0, dtype=torch.int64, device=device))
    assert all(field.shape == (0,) for field in empty)


def test_same_bits_for_any_number_of_threads():
    logits, target = torch.randn(300, 1000), torch.randint(1000, (300,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fl.row_statistics(logits, target)
        torch.set_num_threads(3)
        many = fl.row_statistics(logits, target)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.any_cpu
def test_compiled():
    compiled = torch.compile(fl.row_statistics, backend="aot_eager", fullgraph=True, dynamic=True)
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    for a, b in zip(compiled(logits, target), fl.row_statistics(logits, target), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gce", "hem"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=needs_gpu)])  # nothing traces the emulation
def test_compiled_from_the_read_of_a_loss(name, reduction, place):
    criterion = fl.LOSSES[name].module(reduction=reduction)
    targets = []

    def count(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def step(logits, target):
        return criterion(2 * logits, target, return_row_stats=True)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 9):
        logits = torch.randn(rows, 5, device=place, requires_grad=True)
        target = torch.randint(5, (rows,), device=place)
        (loss, found), (eager, expected_rows) = compiled(logits, target), step(logits, target)
        torch.testing.assert_close(loss, eager)
        grads = [torch.autograd.grad(1.5 * value.sum(), logits)[0] for value in (loss, eager)]
        torch.testing.assert_close(*grads)
        for actual, field in zip(found, expected_rows, strict=True):
            torch.testing.assert_close(actual, field)
            assert not actual.requires_grad
    saves = "_with_stats" if place == "cuda" and name == "hem" else ""
    assert targets.count(f"fused_losses.row_loss{saves}_and_statistics.default") == 1
    assert "fused_losses.row_statistics.default" not in targets


# The loss is computed as without statistics, to the bit, but for softmax losses on CUDA, which have another kernel.
def rounding_of(name, device):
    return 1e-5 if device == "cuda" and fl.LOSSES[name].affine_in_softmax else 0.0


@pytest.mark.parametrize("name", fl.LOSSES)
def test_at_the_call_of_every_module(name, device):
    logits = torch.randn(6, 5, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 1], device=device)
    criterion = fl.LOSSES[name].module(ignore_index=1)
    loss, rows = criterion(logits, target, return_row_stats=True)
    loss.backward()
    rounding = rounding_of(name, device)
    torch.testing.assert_close(loss, criterion(logits, target), rtol=rounding, atol=rounding)
    assert logits.grad.isfinite().all()
    for actual, field in zip(rows, fl.row_statistics(logits, target, 1), strict=True):
        torch.testing.assert_close(actual, field, equal_nan=True)


LOGITS = {  # blocks of rows, rows one by one, pixels, columns, gaps between the pixels
    "few classes": lambda new: new(37, 10),
    "an odd number of classes": lambda new: new(21, 45),
    "many classes": lambda new: new(19, 300),
    "more classes": lambda new: new(7, 1003),
    "very many classes": lambda new: new(3, 6000),
    "pixels": lambda new: new(2, 10, 3, 7),
    "columns": lambda new: new(300, 5).t(),
    "every other": lambda new: new(2, 10, 3, 14)[..., ::2],
}


# Without and with sums over classes; multi-reduction losses.
NAMES = ["gce", "nce", "ngce", "hem", "nfl_mae", "bi_tempered", "multi_margin"]


@pytest.mark.parametrize(("name", "layout", "dtype"), one_in(7, NAMES, LOGITS, DTYPES))
def test_from_the_read_of_a_loss(name, layout, dtype, device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = LOGITS[layout](lambda *shape: (3 * torch.randn(shape, generator=generator)).to(device, dtype))
    classes, rows = logits.shape[1], logits[:, 0].shape
    target = torch.randint(classes, rows, generator=generator).to(device)
    ignored = torch.where(torch.rand(rows, generator=generator).to(device) < 0.2, -100, target)
    odd = logits.clone()  # rows that are not finite
    odd[0, 1], odd[1, 0], odd[-1] = math.nan, math.inf, -math.inf
    cases = [(z, labels, bias) for z in (logits, odd) for labels in (target, ignored) for bias in (0.0, 2.0, -1.0)]
    expected = [fl.row_statistics(z, labels) for z, labels, _ in cases]
    monkeypatch.setattr(fl._ops, "row_statistics", None)  # the operator of the loss does it
    for (z, labels, bias), fields in zip(cases, expected, strict=True):
        for reduction in ("mean", "none"):
            criterion = fl.LOSSES[name].module(reduction=reduction, logit_bias=bias)
            z = z.detach().requires_grad_()
            alone, (loss, found) = criterion(z, labels), criterion(z, labels, return_row_stats=True)
            rounding = rounding_of(name, device)
            torch.testing.assert_close(loss, alone, rtol=rounding, atol=rounding, equal_nan=True)
            grads = [torch.autograd.grad(value.sum(), z)[0] for value in (alone, loss)]
            if rounding > 0 or (device == "cpu" and reduction == "none"):  # the CPU saves no numbers of rows here
                rounding = max(rounding, torch.finfo(dtype).eps)
            torch.testing.assert_close(*grads, rtol=rounding, atol=rounding, equal_nan=True)
            assert not any(field.requires_grad for field in found)
            with torch.no_grad():
                without_gradient = criterion(z, labels, return_row_stats=True)[1]
            for statistics in (found, without_gradient):
                for actual, field in zip(statistics, fields, strict=True):
                    torch.testing.assert_close(actual, field, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "classes", "dtype"),
    one_in(4, ["hem", "amse", "bi_tempered", "anl_fl"], [3, 10, 33, 257, 402], DTYPES),
)
def test_equal_logits_in_slices(name, classes, dtype, device):
    """The first of equal logits, of ignored rows too, wherever the rows begin; nothing is written around them."""
    generator = torch.Generator().manual_seed(classes)
    criterion = fl.LOSSES[name].module(ignore_index=1, weight=torch.rand(classes, generator=generator).to(device))
    for begin, gap in [(0, 1), (1, 0), (3, 5), (8, 8)]:
        around = torch.full((9, begin + classes + gap), math.nan, dtype=dtype, device=device)
        around[:, begin : begin + classes] = torch.randn(9, classes, generator=generator).round().to(device, dtype)
        before, logits = around.clone(), around[:, begin : begin + classes].requires_grad_()
        target = torch.randint(classes, (9,), generator=generator).to(device)
        target[3:7] = 1
        fields, argmax = expected(logits.detach(), target, 1)
        for labels, weight in [(target, None), (target, torch.rand(9, generator=generator).to(device))]:
            loss, found = criterion(logits, labels, weight, return_row_stats=True)
            alone = criterion(logits, labels, weight)
            assert torch.equal(loss, alone) and torch.equal(found.argmax, argmax)
            grads = [torch.autograd.grad(value, logits)[0] for value in (loss, alone)]
            assert torch.equal(*grads) and not grads[0][3:7].any()
            for actual, field in zip(found, fields, strict=False):
                torch.testing.assert_close(actual.double(), field, rtol=2e-6, atol=2e-5, equal_nan=True)
        assert torch.equal(around.detach().nan_to_num(7.0), before.nan_to_num(7.0))
        ignored = criterion(logits, torch.full_like(target, 1), return_row_stats=True)[1]
        assert torch.equal(ignored.argmax, argmax) and all(field.isnan().all() for field in ignored[:-1])


@pytest.mark.parametrize("name", ["hem", "nfl"])
def test_what_traced_and_untraced_calls_save_gives_one_gradient(name, device):
    """Traces of multi-reduction losses on CUDA take the operator without bits, whose results have shapes they know."""
    logits, target = torch.randn(6, 40, device=device), torch.randint(40, (6,), device=device)
    args = fl.LOSSES[name].arguments(logits, target, reduction="none")
    upstream = torch.rand(6, device=device)
    calls = [fl._ops.row_loss_with_stats_and_statistics, fl._ops.row_loss_with_bits_and_statistics]
    (loss, stats, denominator, *rows), (other, saved, _, *others) = (call(*args) for call in calls)
    assert torch.equal(loss, other) and all(map(torch.equal, rows, others))
    grads = [fl._ops.row_loss_backward(upstream, of, denominator, *args) for of in (stats, saved)]
    assert torch.equal(*grads) and stats.shape == fl._ops.row_loss_with_stats(*args)[1].shape


def test_other_derivatives_beside_statistics():
    logits, target = torch.randn(6, 4), torch.arange(6) % 4
    for options in ({"logit_bias": torch.nn.Parameter(torch.tensor(0.5))}, {"weight": torch.ones(4).requires_grad_()}):
        criterion, (leaf,) = fl.GCELoss(**options), options.values()
        loss, _ = criterion(logits, target, return_row_stats=True)
        found, right = (torch.autograd.grad(value, leaf)[0] for value in (loss, criterion(logits, target)))
        torch.testing.assert_close(found, right)
