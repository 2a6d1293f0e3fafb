"""Statistics by class against loops in numpy; merging; determinism."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import fused_losses as fl
from fused_losses import _z_reference, functional
from fused_losses.statistics import merge_moments

OPS = torch.ops.fused_losses


def by_loops(score, target, num_classes):
    """Count, mean, unbiased std of every class in float64."""
    x, y = score.double().cpu().numpy().ravel(), target.cpu().numpy().ravel()
    rows = [x[(y == c) & np.isfinite(x)] for c in range(num_classes)]
    count = np.array([len(r) for r in rows])
    mean = np.array([r.mean() if len(r) else math.nan for r in rows])
    std = np.array([r.std(ddof=1) if len(r) > 1 else math.nan for r in rows])
    return count, mean, std


def check(statistics, expected, rtol=1e-12):
    assert statistics.count.tolist() == expected[0].tolist()
    # Rounding of the mean is relative to the scores, whose mean may be 0.
    np.testing.assert_allclose(statistics.mean.cpu().numpy(), expected[1], rtol=rtol, atol=rtol * 10)
    np.testing.assert_allclose(statistics.std.cpu().numpy(), expected[2], rtol=rtol, atol=0)


def make_rows(rows, num_classes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, generator=generator, dtype=torch.float64) * 2 + 5
    target = torch.randint(-1, num_classes + 1, (rows,), generator=generator)  # both ends are outside
    return score.to(dtype), target


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows, num_classes", [(0, 3), (1, 1), (50, 1), (300, 2), (9000, 3), (5000, 300), (3000, 100_000)]
)
def test_matches_loops(rows, num_classes, dtype, device):
    score, target = make_rows(rows, num_classes, dtype)
    if rows > 10:
        score[3], score[7], score[8] = math.nan, math.inf, -math.inf
    statistics = fl.class_statistics(score.to(device), target.to(device), num_classes)
    checked = min(num_classes, 500)
    first = fl.ClassStatistics(*(value[:checked] for value in (statistics.count, statistics.mean, statistics.std)))
    check(first, by_loops(score, target, checked))
    moments = OPS.class_moments(score.to(device), target.to(device), num_classes)
    torch.testing.assert_close(
        moments, _z_reference.class_moments(score.to(device), target.to(device), num_classes), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_index_types(dtype, device):
    score, target = make_rows(200, 5)
    target = target.clamp(0, 5)
    check(fl.class_statistics(score.to(device), target.to(dtype).to(device), 5), by_loops(score, target, 5))


@pytest.mark.parametrize("layout", ["rows", "nchw", "channels_last", "crop", "transposed", "vector"])
def test_logits_stand_for_their_targets_entry(layout, device):
    torch.manual_seed(0)
    logits = {
        "rows": lambda: torch.randn(40, 5),
        "nchw": lambda: torch.randn(3, 5, 8, 9),
        "channels_last": lambda: torch.randn(3, 5, 8, 9).to(memory_format=torch.channels_last),
        "crop": lambda: torch.randn(3, 5, 8, 9)[:, :, 1:6, 2:7],
        "transposed": lambda: torch.randn(5, 40).t(),
        "vector": lambda: torch.randn(5),
    }[layout]().to(device)
    dim = 0 if logits.dim() == 1 else 1
    target = torch.randint(0, 5, [n for d, n in enumerate(logits.shape) if d != dim], device=device)
    score = logits.gather(dim, target.unsqueeze(dim)).squeeze(dim)
    statistics = fl.class_statistics(logits, target, 5)
    check(statistics, by_loops(score, target, 5))
    check(fl.class_statistics(score, target, 5), by_loops(score, target, 5))


def test_every_second_score(device):
    score, target = make_rows(300, 4)
    check(fl.class_statistics(score.to(device)[::2], target.to(device)[::2], 4), by_loops(score[::2], target[::2], 4))


def test_constant_classes_have_no_spread(device):
    """Whatever the rounding of sums: 0.1 is no binary fraction, and 1e9 leaves no room for an error of 1e-8."""
    for value in (0.1, 1e9 / 3, -7e-30):
        score = torch.full((20_000,), value, dtype=torch.float64, device=device)
        target = torch.arange(20_000, device=device) % 3
        statistics = fl.class_statistics(score, target, 3)
        assert statistics.mean.tolist() == [value] * 3 and statistics.std.tolist() == [0.0] * 3
        assert statistics.merge(statistics).std.tolist() == [0.0] * 3


def test_large_offset_and_outlier_keep_their_digits(device):
    score = torch.randn(30_000, dtype=torch.float64) + 1e6
    score[0] = -1e7  # the number that sums are shifted by
    target = torch.zeros(30_000, dtype=torch.int64)
    check(fl.class_statistics(score.to(device), target.to(device), 1), by_loops(score, target, 1), rtol=1e-10)


def test_absent_class_and_single_row(device):
    statistics = fl.class_statistics(torch.tensor([2.5], device=device), torch.tensor([1], device=device), 3)
    assert statistics.count.tolist() == [0, 1, 0]
    assert statistics.mean.isnan().tolist() == [True, False, True] and statistics.mean[1] == 2.5
    assert statistics.std.isnan().all()


def test_merged_moments_of_no_rows_are_zeros():
    """As those of a batch are: state_dict refuses others."""
    some = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    assert torch.equal(merge_moments(torch.stack([some, torch.zeros_like(some)])), some)


def test_one_row_of_faded_counts_has_no_spread():
    """Counts of running statistics are no integers: one of less than two rows may have a sum of squares."""
    loss = fl.ZErrorCrossEntropyLoss(running=True, num_classes=4)
    loss.running_moments.copy_(torch.tensor([[0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 1.0, 1.0], [0.0, 3.0, 2.0, 2.0]]))
    expected = torch.tensor([math.nan, math.nan, math.nan, 2.0], dtype=torch.float64)
    torch.testing.assert_close(loss.running_statistics.std, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_classes", [1, 3, 2000])
def test_same_bits_for_any_number_of_threads(num_classes):
    score, target = make_rows(50_000, num_classes)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(OPS.class_moments(score, target, num_classes))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


finite = st.floats(-1e3, 1e3, width=32)
rows_of_classes = st.lists(st.tuples(finite, st.integers(-1, 3)), max_size=60)


def as_tensors(rows):
    return (
        torch.tensor([r[0] for r in rows], dtype=torch.float64),
        torch.tensor([r[1] for r in rows], dtype=torch.int64),
    )


def close(a, b):
    assert a.count.tolist() == b.count.tolist()
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-10, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(a.std, b.std, rtol=1e-8, atol=1e-8, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(rows_of_classes, rows_of_classes)
def test_merge_is_the_statistics_of_both(first, second):
    a, b = (fl.class_statistics(*as_tensors(rows), 3) for rows in (first, second))
    whole = fl.class_statistics(*as_tensors(first + second), 3)
    close(a.merge(b), whole)
    close(b.merge(a), whole)
    close(a.update(*as_tensors(second)), whole)
    assert a.merge(b).count.dtype == torch.int64


def test_counts_that_fade_are_merged_whole():
    loss = fl.ZErrorBCEWithLogitsLoss(running=True, num_tasks=1)
    for _ in range(5):
        loss(torch.randn(6), torch.tensor([0.0, 0, 0, 1, 1, 1]))
    running = loss.running_statistics
    batch = fl.class_statistics(torch.tensor([1.0, 3.0, 4.0, 9.0]), torch.tensor([0, 0, 1, 1]), 2)
    for both in (batch.merge(running), running.merge(batch)):
        assert torch.equal(both.count, running.count + 2) and not both.count.frac().eq(0).any()
    close(batch.merge(running).merge(batch), batch.merge(batch).merge(running))


@settings(deadline=None, max_examples=60)
@given(rows_of_classes, st.randoms())
def test_order_does_not_matter(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    close(fl.class_statistics(*as_tensors(rows), 3), fl.class_statistics(*as_tensors(shuffled), 3))


def test_objects_are_not_changed():
    a = fl.class_statistics(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), 2)
    before = [value.clone() for value in (a.count, a.mean, a.std)]
    a.merge(a)
    a.update(torch.tensor([5.0]), torch.tensor([1]))
    for now, then in zip((a.count, a.mean, a.std), before, strict=True):
        torch.testing.assert_close(now, then, equal_nan=True, rtol=0, atol=0)


def test_scores_that_need_gradients_give_constants():
    logits = torch.randn(6, 3, requires_grad=True)
    assert not fl.class_statistics(logits, torch.tensor([0, 1, 2, 0, 1, 2]), 3).mean.requires_grad


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64), 0), ValueError, "num_classes must be at least 1, got 0"),
        ((torch.zeros(3), torch.zeros(4, dtype=torch.int64), 2), ValueError, "score must have one entry per row"),
        ((torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), 2), ValueError, "num_classes must be that of the log"),
        ((torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), 2), ValueError, "target must have the shape of the"),
        ((torch.zeros(3), torch.zeros(3), 2), RuntimeError, "target must hold class indices"),
        ((torch.zeros(3).long(), torch.zeros(3).long(), 2), RuntimeError, "score must be float64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fl.class_statistics(*arguments)


def test_merge_of_different_classes():
    a, b = (fl.class_statistics(torch.zeros(3), torch.zeros(3).long(), n) for n in (2, 3))
    with pytest.raises(ValueError, match=r"other must have statistics of 2 classes, got shape \(3,\)"):
        a.merge(b)


def test_opcheck():
    target = torch.tensor([0, 1, 1, 2, -100])
    for score in (torch.randn(5), torch.randn(5, 3)):
        arguments = (score, target, 3)
        assert set(opcheck(OPS.class_moments.default, arguments).values()) == {"SUCCESS"}


def test_compile():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(score, target):
        statistics = fl.class_statistics(score, target, 3)
        return statistics.count, statistics.merge(statistics).std

    for rows in (10, 15):
        score, target = make_rows(rows, 3)
        count, std = compiled(score, target)
        expected = fl.class_statistics(score, target, 3)
        assert torch.equal(count, expected.count)
        torch.testing.assert_close(std, expected.merge(expected).std, equal_nan=True)


@pytest.mark.any_cpu
@pytest.mark.parametrize(("field", "bad"), [("mean", math.nan), ("mean", math.inf), ("std", math.nan), ("count", -1)])
def test_statistics_by_which_no_row_would_be_kept_are_refused(field, bad):
    logits, target = torch.randn(12, 3), torch.arange(12) % 3
    good = fl.class_statistics(logits.gather(1, target[:, None])[:, 0], target, 3)
    wrong = getattr(good, field).clone()
    wrong[1] = bad
    with pytest.raises(ValueError, match=r"^statistics must hold finite means and counts .*got ClassStatistics"):
        functional.z_error_cross_entropy(logits, target, statistics=dataclasses.replace(good, **{field: wrong}))
    absent = fl.class_statistics(torch.randn(4), torch.tensor([0, 0, 1, 0]), 3)  # one row of class 1, none of class 2
    assert functional.z_error_cross_entropy(logits, target, statistics=absent, return_mask=True).mask[target > 0].all()
