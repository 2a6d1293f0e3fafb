"""Margins from sample counts, and scores of certainty."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES
from hypothesis import given
from hypothesis import strategies as st

from fused_losses.calibration import hem_margin, hem_plus_margins
from fused_losses.scores import max_logit, max_softmax_probability

pytestmark = pytest.mark.any_cpu  # torch's functions, no loss


@pytest.mark.parametrize(
    ("num_samples", "published"),
    [(50_000, 0.2), (60_000, 0.1826), (100_000, 0.1414), (1_281_167, 0.0395)],
    ids=["cifar", "mnist", "tiny-imagenet", "imagenet"],
)
def test_published_margins(num_samples: int, published: float) -> None:
    assert hem_margin(num_samples) == pytest.approx(published, abs=5e-5)  # printed with four decimals


def test_rare_classes_get_larger_margins() -> None:
    # sqrt(2000 / (2 * 5000)) and sqrt(2000 / (2 * 500))
    expected = torch.tensor([math.sqrt(0.2), math.sqrt(2.0)])
    torch.testing.assert_close(hem_plus_margins([5000, 500]), expected, rtol=1e-6, atol=0)
    assert hem_plus_margins([1, 4], M=8.0).tolist() == [2.0, 1.0]


@given(st.integers(1, 1000), st.integers(1, 10**6), st.floats(1e-3, 1e6))
def test_balanced_classes_have_the_margin_of_hem(num_classes: int, count: int, M: float) -> None:
    margins = hem_plus_margins([count] * num_classes, M, dtype=torch.float64)
    assert margins.shape == (num_classes,)
    assert margins.tolist() == pytest.approx([hem_margin(num_classes * count, M)] * num_classes, rel=1e-14)


@pytest.mark.parametrize("counts", [[3, 7], (3, 7), np.array([3, 7]), torch.tensor([3, 7]), torch.tensor([3.0, 7.0])])
def test_counts_of_any_kind(counts: Any) -> None:
    assert hem_plus_margins(counts, dtype=torch.float64).tolist() == [math.sqrt(2000 / 6), math.sqrt(2000 / 14)]
    assert hem_plus_margins(counts).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hem_margin(0), "num_samples must be at least 1, got 0"),
        (lambda: hem_margin(10, M=-1.0), "M must satisfy 0 < value < inf, got -1.0"),
        (lambda: hem_plus_margins([5, 0, 3]), "class_counts must be at least 1 for every class, got 0 for class 1"),
        (
            lambda: hem_plus_margins([5, math.inf]),
            "class_counts must be at least 1 for every class, got inf for class 1",
        ),
        (lambda: hem_plus_margins([5], dtype=torch.int64), "dtype must be a floating point dtype, got torch.int64"),
        (lambda: hem_plus_margins([5, math.nan]), "class_counts must be at least 1 for every class, got nan for class"),
        (lambda: hem_plus_margins([]), r"class_counts must have one count per class, got shape \(0,\)"),
        (lambda: hem_plus_margins([[1, 2]]), r"class_counts must have one count per class, got shape \(1, 2\)"),
        (lambda: hem_plus_margins([1, 2], M=math.inf), "M must satisfy 0 < value < inf, got inf"),
    ],
)
def test_margins_reject(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 7, 3, 5)])
def test_scores_are_the_maxima(shape: tuple[int, ...], device: str) -> None:
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device) * 5
    dim = 0 if len(shape) == 1 else 1
    probability = max_softmax_probability(logits)
    torch.testing.assert_close(probability, logits.softmax(dim).amax(dim), rtol=1e-14, atol=0)
    assert torch.equal(max_logit(logits), logits.max(dim).values)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0], [2.0, -math.inf]])
    torch.testing.assert_close(max_softmax_probability(logits), torch.tensor([0.75, 0.9, 1.0]))
    torch.testing.assert_close(max_logit(logits), torch.tensor([math.log(3.0), math.log(9.0), 2.0]))


def test_large_logits_lose_no_digits():
    equal = torch.full((1, 1000), 12345.0)
    assert max_softmax_probability(equal).item() == pytest.approx(1e-3, rel=1e-6)
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(
        max_softmax_probability(logits + 1024), torch.softmax((logits + 1024).double(), 1).amax(1).float()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    result = max_softmax_probability(logits)
    assert result.dtype == max_logit(logits).dtype == torch.float32
    torch.testing.assert_close(result, logits.double().softmax(1).amax(1).float(), rtol=2e-6, atol=0)


def test_scores_do_not_overflow_and_have_gradients() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0], [-1e4, -1e4]], dtype=torch.float64, requires_grad=True)
    result = max_softmax_probability(logits)
    assert result.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0.5], rel=1e-12)
    result[0].backward()
    p = 1 / (1 + math.exp(-1))
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([p * (1 - p), -p * (1 - p)], rel=1e-9)


@pytest.mark.parametrize("score", [max_softmax_probability, max_logit])
@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "logits must be a floating point tensor, got torch.int64"),
        ([1.0, 2.0], TypeError, "logits must be a floating point tensor, got list"),
        (torch.zeros(3, 0), ValueError, r"logits must have at least one class, got shape \(3, 0\)"),
        (torch.tensor(1.0), ValueError, r"logits must have at least one class, got shape \(\)"),
    ],
)
def test_scores_reject(score: Any, logits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score(logits)
