"""Target types, non-finite and extreme values, reductions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GRAD_FLOOR, GRAD_TOLERANCE, LOSS_TOLERANCE, loss_and_grad, one_in
from naive import naive_losses
from test_values import make_problem

import fused_losses as fl

NAMES = list(fl.LOSSES)
REDUCTIONS = ["none", "mean", "sum"]
# Losses divided by a sum over all classes: they need two classes, and a class of probability 0 makes the sum infinite.
NORMALISED = [name for name, entry in fl.LOSSES.items() if entry.min_classes > 1]
# Losses with a term that is the mean of log p_j, which a class of probability 0 makes infinite.
WITH_MEAN_LOG = [
    name
    for name, entry in fl.LOSSES.items()
    if "log_probs" in (entry.sums or ()) and not entry.weighs_classes and entry.min_classes == 1
]
WITH_MARGIN = [name for name, entry in fl.LOSSES.items() if "active_mean" in entry.reductions]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def assert_matches_reference(name, logits, target, **options):
    loss, grad = loss_and_grad(fl.LOSSES[name].function, logits, target, **options)
    exact = {k: v.double().contiguous() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected, expected_grad = loss_and_grad(
        fl.LOSSES[name].reference, logits.double().contiguous(), target.contiguous(), **exact
    )
    assert loss.shape == expected.shape and grad.shape == logits.shape and grad.dtype == logits.dtype
    assert ((loss - expected).abs() <= LOSS_TOLERANCE[logits.dtype] * (1 + expected.abs())).all()
    allowed = GRAD_TOLERANCE[logits.dtype] * expected_grad.abs().max() + GRAD_FLOOR[logits.dtype]
    assert ((grad.double() - expected_grad).abs() <= allowed).all()
    return grad


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_target_types_agree(name, shape, device):
    logits, target, weight, _ = make_problem(shape, torch.float32, device)
    target[target == -100] = 4
    expected = loss_and_grad(fl.LOSSES[name].function, logits, target, weight=weight, ignore_index=4)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        actual = loss_and_grad(fl.LOSSES[name].function, logits, target.to(dtype), weight=weight, ignore_index=4)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0), (0, 5, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name, shape, device):
    logits = torch.empty(shape, device=device)
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(fl.LOSSES[name].function, logits, target, reduction=reduction)
        assert torch.equal(loss, torch.zeros(target.shape if reduction == "none" else (), device=device))
        assert grad.shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_are_exactly_zero(name, device):
    function = fl.LOSSES[name].function
    logits, target, weight, sample_weight = make_problem((8, 5), torch.float32, device)
    target = target.abs() % 5
    ignored = torch.tensor([True, False, True, False, False, True, False, False], device=device)
    hidden = torch.where(ignored, -7, target)
    for filling in (math.nan, math.inf, -math.inf):
        spoiled = logits.clone()
        spoiled[ignored] = filling
        for reduction in REDUCTIONS:
            options = {"reduction": reduction, "weight": weight}
            loss, grad = loss_and_grad(
                function, spoiled, hidden, ignore_index=-7, sample_weight=sample_weight, **options
            )
            kept = loss_and_grad(
                function, logits[~ignored], target[~ignored], sample_weight=sample_weight[~ignored], **options
            )
            assert torch.equal(grad[ignored], torch.zeros(3, 5, device=device))
            torch.testing.assert_close(grad[~ignored], kept[1])
            torch.testing.assert_close(loss[~ignored] if reduction == "none" else loss, kept[0])
            assert reduction != "none" or torch.equal(loss[ignored], torch.zeros(3, device=device))


@pytest.mark.parametrize("shape", [(8, 5), (2, 5, 4), (8, 40), (8, 33), (8, 131)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_are_zero_for_any_upstream_gradient(name, shape, device):
    for dtype, filling in itertools.product((torch.float32, torch.bfloat16), (math.nan, math.inf)):
        logits, target, _, _ = make_problem(shape, dtype, device)
        ignored = torch.arange(8, device=device).reshape(target.shape) % 3 == 0
        target = torch.where(ignored, -100, target.abs() % shape[1])
        upstream = torch.where(ignored, filling, 2.0)
        _, grad = loss_and_grad(fl.LOSSES[name].function, logits, target, upstream, reduction="none")
        _, expected = loss_and_grad(
            fl.LOSSES[name].function, logits, target, torch.full_like(upstream, 2.0), reduction="none"
        )
        assert torch.equal(grad, expected) and not expected.movedim(1, -1)[ignored].any()
        for reduction in ("mean", "sum"):
            upstream = torch.tensor(filling, device=device)
            _, grad = loss_and_grad(fl.LOSSES[name].function, logits, target, upstream, reduction=reduction)
            assert not grad.movedim(1, -1)[ignored].any() and not grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_everything_ignored(name, device):
    logits = torch.full((4, 5), math.nan, device=device)
    target = torch.full((4,), -100, device=device)
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(fl.LOSSES[name].function, logits, target, reduction=reduction)
        assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_sum_to_zero(name, device):
    logits = torch.randn(2, 3, device=device)
    target = torch.tensor([0, 1], device=device)
    for weight in ([0.0, 0.0, 0.0], [1.0, -1.0, 5.0]):
        loss, grad = loss_and_grad(
            fl.LOSSES[name].function, logits, target, weight=torch.tensor(weight, device=device), reduction="mean"
        )
        assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(grad, torch.zeros_like(grad))


ZERO_WEIGHTS = [{"weight": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])}, {"sample_weight": torch.tensor([0.0, 1.0, 1.0])}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("filling", [math.inf, math.nan])
def test_weight_zero_does_not_hide_a_row_that_is_not_finite(name, filling, device):
    target = torch.tensor([1, 2, 3], device=device)
    for place, weights, reduction in itertools.product((1, 2), ZERO_WEIGHTS, REDUCTIONS):
        logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(device)
        logits[0, place] = filling
        options = {key: value.to(device) for key, value in weights.items()}
        for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
            loss, grad = loss_and_grad(function, logits, target, reduction=reduction, **options)
            assert loss[0].isnan() and loss[1:].isfinite().all() if reduction == "none" else loss.isnan()
            assert grad[0].isnan().any() and grad[1:].isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("filling", [math.inf, -math.inf, math.nan])
def test_class_of_weight_zero_as_in_torch(smoothing, filling, device):
    weight, target = torch.tensor([1.0, 0.0, 1.0], device=device), torch.tensor([1, 2], device=device)
    logits = torch.randn(2, 3, device=device)
    logits[0, 1] = filling
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    ours = loss_and_grad(fl.functional.cross_entropy, logits, target, **options)[0]
    assert torch.equal(ours.isnan(), F.cross_entropy(logits, target, **options).isnan())


@pytest.mark.parametrize("name", NAMES)
def test_denominator_of_the_mean(name, device):
    function = fl.LOSSES[name].function
    logits, target, weight, sample_weight = make_problem((3, 6, 4, 5), torch.float64, device)
    kept = target != -100
    rows = function(logits, target, reduction="none")
    counts = torch.where(kept, weight[target.clamp(min=0)].double() * sample_weight, 0.0)
    for options, count in [
        ({}, kept.double()),
        ({"weight": weight}, torch.where(kept, weight[target.clamp(min=0)].double(), 0.0)),
        ({"sample_weight": sample_weight}, torch.where(kept, sample_weight.double(), 0.0)),
        ({"weight": weight, "sample_weight": sample_weight}, counts),
    ]:
        torch.testing.assert_close(function(logits, target, reduction="none", **options), rows * count)
        torch.testing.assert_close(function(logits, target, reduction="sum", **options), (rows * count).sum())
        mean = (rows * count).sum() / count.sum()
        torch.testing.assert_close(function(logits, target, reduction="mean", **options), mean)


@pytest.mark.parametrize("shape", [(9, 5), (3, 5, 3)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_non_finite_logit_spoils_only_its_row(name, bad, shape, device):
    function = fl.LOSSES[name].function
    logits, target, _, _ = make_problem(shape, torch.float32, device)
    target = target.abs() % 5
    expected = loss_and_grad(function, logits, target, reduction="none")
    for cls in range(5):  # the target among them
        spoiled = logits.clone()
        at = (4, cls) if len(shape) == 2 else (1, cls, 1)
        spoiled[at] = bad
        loss, grad = loss_and_grad(function, spoiled, target, reduction="none")
        row = torch.zeros_like(target, dtype=torch.bool)
        row[(at[0], *at[2:])] = True
        assert torch.equal(loss.isfinite(), ~row)
        assert torch.equal(loss[~row], expected[0][~row])
        other = ~row.unsqueeze(1).expand(shape)
        assert torch.equal(grad[other], expected[1][other])
        assert not grad[~other].isfinite().any()


# Losses that do not depend on the number of classes; for the others their own tests say what a masked class means.
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if name not in (*WITH_MARGIN, "ldr_kl") and (not fl.LOSSES[name].sums or name == "cross_entropy")
    ],
)
def test_minus_infinity_masks_a_class(name, device):
    function = fl.LOSSES[name].function
    logits, target, _, _ = make_problem((20, 5), torch.float64, device)
    target = target.abs() % 5
    masked = torch.cat([logits[:, :2], torch.full((20, 3), -math.inf, device=device), logits[:, 2:]], 1)
    moved = torch.where(target < 2, target, target + 3)
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(function, masked, moved, reduction=reduction)
        expected, expected_grad = loss_and_grad(function, logits, target, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad[:, [0, 1, 5, 6, 7]], expected_grad)
        assert torch.equal(grad[:, 2:5], torch.zeros(20, 3, dtype=torch.float64, device=device))


@pytest.mark.parametrize("name", NAMES)
def test_a_target_of_probability_zero(name, device):
    logits = torch.tensor([[-math.inf, 0.0, 1.0]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    options = {"t2": 1.0} if name == "bi_tempered" else {}
    loss = fl.LOSSES[name].function(logits, target, **options)
    expected = naive_losses()[name].at_zero  # infinite only for losses that contain -log p
    assert loss.item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name, dtype, device):
    function = fl.LOSSES[name].function
    big = torch.finfo(dtype).max
    for size in (1e4, big / 4):
        logits = torch.tensor([[size, -size, 0.0], [size, size, -size]], dtype=dtype, device=device)
        for target in ([0, 0], [1, 1], [2, 2]):
            labels = torch.tensor(target, device=device)
            loss, grad = loss_and_grad(function, logits, labels, reduction="none")
            expected, expected_grad = loss_and_grad(
                fl.LOSSES[name].reference, logits.double(), labels, reduction="none"
            )
            # torch divides by a number on a GPU as by multiplying with its inverse: where terms cancel, an ulp is left.
            rtol, atol = (1e-7, 1e-7) if loss.dtype == torch.float64 else (1.3e-6, 1e-5)
            left = 2 * torch.finfo(torch.float64).eps * size
            torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=rtol, atol=atol + left)
            assert grad.isfinite().all()
            # On CUDA p_y - 1 of a certain row is off by rounding, which aue multiplies by a slope of 12.
            atol = 3e-6 if device == "cuda" else 1e-6
            torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=1e-2, atol=atol)
    if name in (*NORMALISED, *WITH_MEAN_LOG):
        return
    # The difference of the ends of the range overflows, as torch's does: infinite or finite, but no NaN.
    logits = torch.tensor([[big, -big]], dtype=dtype, device=device)
    for label in (0, 1):
        loss, grad = loss_and_grad(function, logits, torch.tensor([label], device=device))
        assert not loss.isnan() and grad.isfinite().all()


# So many classes that their log sum exp does not round to the logit of the label. Promised for the CPU only.
@pytest.mark.parametrize("bias", [0.0, 4.0, -4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "mae", "nce"])
def test_small_losses_keep_their_digits(name, dtype, bias):
    logits = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.arange(100)
    logits[range(100), target] += torch.linspace(4, 24, 100).to(dtype)
    loss = fl.LOSSES[name].function(logits, target, reduction="none", logit_bias=bias)
    expected = fl.LOSSES[name].reference(logits.double(), target, reduction="none", logit_bias=bias)
    assert expected.min() < 1e-6
    # The larger of them are differences of 1 and a rounded sum near it, which loses two digits.
    assert ((loss - expected).abs() <= 3e-5 * expected).all()


# Around those up to which a lane, a warp or a block has the row in registers; and more than any.
MANY_CLASSES = [401, 1000, 1025, 4099, 70_000]


@pytest.mark.parametrize(("name", "dtype", "classes"), one_in(4, NAMES, [torch.float32, torch.bfloat16], MANY_CLASSES))
def test_many_classes(name, dtype, classes, device):
    logits, target, _, _ = make_problem((4, classes), dtype, device)
    target[1:] = torch.tensor([0, classes - 1, classes // 2], device=device)  # the first and the last class among them
    assert_matches_reference(name, logits, target, reduction="none", logit_bias=5.0)
    shifted = torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view_as(logits)  # begins beside 16 bytes
    assert_matches_reference(name, shifted, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MARGIN)
def test_more_classes_than_float32_can_count(name):
    """Beyond 2^24 not every class has a number of its own."""
    logits = torch.zeros(1, 2**24 + 40)
    for target in (2**24 + 17, 2**24 + 39):
        _, grad = loss_and_grad(fl.LOSSES[name].function, logits, torch.tensor([target]))
        assert grad.argmin() == target and (grad < 0).sum() == 1
    logits[0, 2**24 + 16 : 2**24 + 18] = torch.tensor([5.0, 1.0])
    for laid_out in (logits, torch.stack([logits, logits], -1)[..., 0]):
        rows = fl.row_statistics(laid_out, torch.tensor([2**24 + 17]))
        assert rows.margin == -4.0 and rows.argmax == 2**24 + 16


@pytest.mark.parametrize("classes", [3, 10, 1001, 2**15, 2**17, 2**20 + 1, 2**21 + 3])
@pytest.mark.parametrize("name", WITH_MARGIN)
def test_equal_errors_are_all_kept(name, classes, device):
    """They are above their mean by a share 1 / C, to which a sum of so many numbers may be wrong."""
    options = {"threshold": True, "mean_above_zero": True} if name == "multi_margin" else {}
    target = torch.tensor([classes // 2], device=device)
    for margin, value in itertools.product((0.2, 0.3, 0.7), (0.0, 1.1)):
        logits = torch.full((1, classes), value, device=device)
        logits[0, target] -= value
        for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
            loss, grad = loss_and_grad(function, logits, target, margin=margin, **options)
            assert loss.item() == pytest.approx(value + margin, rel=1e-3)
            assert (grad > 0).sum() == classes - 1 and grad[0, target].item() == pytest.approx(-1.0, rel=1e-3)


# Around the sizes of vectors and tiles; one loss of each kind takes every number, the others do under `make test-long`.
COUNTS = {
    "some": [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 99, 100, 101, 104, 128],
    "all": [*range(1, 71), *range(99, 118), 128],
}
ONE_OF_EACH_KIND = ("cross_entropy", "nce", "ngce", "hem")


@pytest.mark.parametrize("counts", ["some", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_every_small_number_of_classes(name, counts, device):
    for classes in COUNTS["all" if name in ONE_OF_EACH_KIND else counts]:
        if classes < fl.LOSSES[name].min_classes:
            continue
        logits, target, _, _ = make_problem((7, classes), torch.float32, device, seed=classes)
        target[1:3] = torch.tensor([0, classes - 1], device=device)
        grad = assert_matches_reference(name, logits, target, reduction="none")
        if classes == 1:
            assert torch.equal(grad, torch.zeros_like(grad))
        assert_matches_reference(
            name, logits[:, None].transpose(1, 2).expand(7, classes, 2), target[:, None].expand(7, 2)
        )


@pytest.mark.parametrize("name", NAMES)
def test_one_row_and_no_batch(name, device):
    function = fl.LOSSES[name].function
    logits, target, _, _ = make_problem((3, 5), torch.float32, device)
    for reduction in REDUCTIONS:
        batch = loss_and_grad(function, logits[1:2], target[1:2], reduction=reduction)
        single = loss_and_grad(function, logits[1], target[1], reduction=reduction)
        assert single[0].shape == () and single[1].shape == (5,)
        assert torch.equal(single[0], batch[0].squeeze()) and torch.equal(single[1], batch[1][0])


@pytest.mark.slow
@pytest.mark.any_cpu  # where the scale comes in is written once for all
@pytest.mark.parametrize("name", NAMES)
def test_float16_gradient_of_a_large_batch_survives_loss_scaling(name, device):
    # 1 / 100000 is below the smallest normal float16; the scale must come in before the rounding.
    logits, target, _, _ = make_problem((100_000, 3), torch.float16, device)
    scale = torch.tensor(65536.0, device=device)
    loss, grad = loss_and_grad(fl.LOSSES[name].function, logits, target, scale)
    assert loss.dtype == torch.float32
    _, expected = loss_and_grad(fl.LOSSES[name].reference, logits.double(), target, scale.double())
    assert (grad.double() - expected).abs().max() <= GRAD_TOLERANCE[torch.float16] * expected.abs().max()


@pytest.mark.parametrize("classes", [10, 33, 64, 100, 101, 400, 1000])
def test_small_probabilities_beside_a_large_one_add_up(classes, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, classes, generator=generator)
    logits[:, 0] += 12.0 + 5.0 * torch.rand(500, generator=generator)
    target = torch.zeros(500, dtype=torch.int64)
    leaf = logits.to(device).requires_grad_()
    loss = fl.functional.cross_entropy(leaf, target.to(device), reduction="none")
    loss.sum().backward()
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    rest = torch.softmax(logits.double(), 1)[:, 1:].sum(1)
    # Of those that are added to the largest one, 1, each may lose half a unit in its last place, 6e-8. torch's errors
    # are up to 5e-7 for 100 classes and 2.3e-6 for 1000.
    most = 1.5e-6 if classes <= 400 else 3e-6
    assert (loss.cpu() - expected).abs().max() < most
    assert (leaf.grad[:, 0].cpu() + rest).abs().max() < most
