"""Label noise: its rates, what it leaves alone, and the transition matrix that is found again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch import Tensor

from fused_losses import noise
from fused_losses.noise import NoisyLabels

pytestmark = pytest.mark.any_cpu  # torch's functions, no loss

ROWS = 60_000
FEATURES = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(3))
SHARE = 5.0 * math.sqrt(0.25 / ROWS)  # five standard deviations of a share of all rows, at its largest
CLASS_SHARE = 5.0 * math.sqrt(0.25 / (ROWS / 10))  # of the rows of one of ten classes


def redrawn(labels: Tensor, rate: float, **options: Any) -> NoisyLabels:
    return noise.symmetric(labels, rate, 10, **options)


def excluding(labels: Tensor, rate: float, **options: Any) -> NoisyLabels:
    return noise.symmetric(labels, rate, 10, redraw=False, **options)


def paired(labels: Tensor, rate: float, **options: Any) -> NoisyLabels:
    return noise.asymmetric(labels, rate, 10, "cifar10", **options)


def by_matrix(labels: Tensor, rate: float, **options: Any) -> NoisyLabels:
    return noise.from_matrix(labels, noise.symmetric_matrix(rate, 10), **options)


def by_instance(labels: Tensor, rate: float, **options: Any) -> NoisyLabels:
    return noise.instance_dependent(FEATURES[: labels.numel()], labels, rate, 10, **options)


KINDS: list[Callable[..., NoisyLabels]] = [redrawn, excluding, paired, by_matrix, by_instance]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def balanced() -> Tensor:
    return torch.arange(ROWS) % 10


def confusion(given: Tensor, noisy: Tensor, num_classes: int = 10) -> Tensor:
    counts = torch.bincount(given * num_classes + noisy, minlength=num_classes**2).view(num_classes, -1).double()
    return counts / counts.sum(1, keepdim=True)


def test_every_public_kind_is_tested() -> None:
    kinds = [
        name
        for name in noise.__all__
        if inspect.isfunction(getattr(noise, name))
        and inspect.signature(getattr(noise, name)).return_annotation == "NoisyLabels"
    ]
    assert kinds == ["asymmetric", "from_matrix", "instance_dependent", "symmetric"]


@every_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("device", DEVICES)
def test_labels_keep_dtype_and_device_and_flipped_says_where_they_differ(
    kind: Callable[..., NoisyLabels], dtype: torch.dtype, device: torch.device | str
) -> None:
    labels = balanced()[:1000].to(device, dtype)
    noisy, flipped = kind(labels, 0.4)
    assert noisy.dtype == dtype and noisy.device == labels.device and noisy.shape == labels.shape
    assert torch.equal(labels.cpu().long(), balanced()[:1000]), "the given labels must not be overwritten"
    assert torch.equal(flipped, noisy != labels) and 0 < flipped.sum() < 1000
    assert noisy.min() >= 0 and noisy.max() < 10


@every_kind
def test_a_seed_repeats_and_leaves_the_global_state(kind: Callable[..., NoisyLabels]) -> None:
    labels = balanced()[:500]
    state = torch.get_rng_state()
    first, again, other = kind(labels, 0.4, seed=7), kind(labels, 0.4, seed=7), kind(labels, 0.4, seed=8)
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    assert torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(kind(labels, 0.4, seed=generator).labels, first.labels)
    assert not torch.equal(kind(labels, 0.4, seed=generator).labels, first.labels), "a generator goes on"
    assert torch.equal(kind(labels, 0.4).labels, kind(labels, 0.4, seed=0).labels)


@every_kind
def test_ignored_rows_stay(kind: Callable[..., NoisyLabels]) -> None:
    labels = balanced()[:1000].clone()
    labels[::3] = -100
    noisy, flipped = kind(labels, 1.0)
    assert (noisy[::3] == -100).all() and not flipped[::3].any()
    assert (noisy[labels != -100] >= 0).all() and flipped.any()
    unlabelled = torch.full((4,), 255, dtype=torch.uint8)
    assert torch.equal(kind(unlabelled, 1.0, ignore_index=255).labels, unlabelled)


@every_kind
def test_no_labels_give_no_labels(kind: Callable[..., NoisyLabels]) -> None:
    noisy, flipped = kind(torch.zeros(0, dtype=torch.int64), 0.4)
    assert noisy.shape == flipped.shape == (0,)


@pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: kind.__name__)
def test_any_shape_and_no_noise(kind: Callable[..., NoisyLabels]) -> None:
    labels = balanced()[:600].view(2, 30, 10).transpose(0, 2)
    noisy, flipped = kind(labels, 0.0)
    assert torch.equal(noisy, labels) and not flipped.any()
    assert kind(labels, 1.0).labels.shape == labels.shape


@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("redraw", [True, False])
def test_symmetric_rates(rate: float, redraw: bool) -> None:
    noisy, flipped = noise.symmetric(balanced(), rate, 10, redraw)
    wrong = rate * (0.9 if redraw else 1.0)
    assert float(flipped.double().mean()) == pytest.approx(wrong, abs=SHARE)
    expected = noise.symmetric_matrix(rate, 10, redraw)
    assert expected.sum(1).tolist() == pytest.approx([1.0] * 10)
    torch.testing.assert_close(confusion(balanced(), noisy), expected, rtol=0, atol=CLASS_SHARE)


def test_matrices_by_hand() -> None:
    # 1 - .6 + .6 / 3 on the diagonal, .6 / 3 beside it; without the own class .6 / 2
    assert noise.symmetric_matrix(0.6, 3).tolist() == [
        pytest.approx(row) for row in ([0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6])
    ]
    assert noise.symmetric_matrix(0.4, 2, redraw=False)[0].tolist() == pytest.approx([0.6, 0.4])
    assert noise.symmetric_matrix(0.6, 3, redraw=False)[0].tolist() == pytest.approx([0.4, 0.3, 0.3])
    assert noise.pair_matrix(0.25, 3, {0: 2}).tolist() == [[0.75, 0.0, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "classes", "share"),
    [("cifar10", 10, 0.5), ("fashion-mnist", 10, 0.5), ("mnist", 10, 0.5), ("cifar100", 100, 1.0)],
)
def test_pairs_of_data_sets(name: str, classes: int, share: float) -> None:
    labels = torch.arange(ROWS) % classes
    noisy, flipped = noise.asymmetric(labels, 0.4, classes, name)
    assert float(flipped.double().mean()) == pytest.approx(0.4 * share, abs=SHARE)
    moved = {(int(a), int(b)) for a, b in zip(labels[flipped], noisy[flipped], strict=True)}
    assert moved == set(noise.PAIRS[name].items())


def test_named_pairs_are_the_published_ones() -> None:
    assert noise.PAIRS["cifar10"] == {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    assert noise.PAIRS["fashion-mnist"] == {9: 7, 7: 5, 2: 6, 4: 3, 3: 4}
    # CIFAR-100's aquatic mammals: beaver, dolphin, otter, seal, whale; large trees: maple, oak, palm, pine, willow.
    pairs = noise.PAIRS["cifar100"]
    for group in ([4, 30, 55, 72, 95], [47, 52, 56, 59, 96]):
        assert [pairs[cls] for cls in group] == [*group[1:], group[0]]
    assert torch.bincount(torch.tensor(noise.CIFAR100_SUPERCLASSES)).tolist() == [5] * 20
    assert sorted(pairs) == sorted(pairs.values()) == list(range(100))


def test_from_matrix_draws_each_row_and_never_a_class_of_probability_zero() -> None:
    matrix = torch.zeros(10, 10)
    matrix[:, 0], matrix[:, 3], matrix[:, 8] = 0.2, 0.5, 0.3
    matrix[5] = torch.eye(10)[9]
    noisy, _ = noise.from_matrix(balanced(), matrix)
    found = confusion(balanced(), noisy)
    torch.testing.assert_close(found, matrix.double(), rtol=0, atol=CLASS_SHARE)
    assert (found[matrix == 0] == 0).all()


def test_inputs_of_one_feature() -> None:
    labels = torch.arange(12) % 3
    inputs = torch.linspace(0.0, 1.0, 12)
    flat, column = (noise.instance_dependent(x, labels, 0.4, 3, seed=0).labels for x in (inputs, inputs[:, None]))
    assert torch.equal(flat, column)


def test_instance_noise_has_its_rate_and_follows_the_inputs() -> None:
    labels = balanced()
    flipped = noise.instance_dependent(FEATURES, labels, 0.4, 10).flipped
    assert float(flipped.double().mean()) == pytest.approx(0.4, abs=SHARE)
    # Each input twice: where both change, they mostly agree on the wrong label; at random one pair in nine would.
    twice, wrong = noise.instance_dependent(4.0 * FEATURES.repeat(2, 1), labels.repeat(2), 0.4, 10)
    both = wrong[:ROWS] & wrong[ROWS:]
    assert float((twice[:ROWS] == twice[ROWS:])[both].double().mean()) > 0.7
    # Truncation to [0, 1] leaves the upper half of a normal distribution: its mean is std sqrt(2 / pi).
    few = noise.instance_dependent(FEATURES, labels, 0.0, 10, std=0.1).flipped
    assert float(few.double().mean()) == pytest.approx(0.1 * math.sqrt(2.0 / math.pi), abs=SHARE)


def test_instance_noise_repeats_the_probabilities_of_the_algorithm() -> None:
    # One sample many times: the shares of its wrong labels are the softmax of its own projection.
    sample, seed = torch.tensor([0.5, -1.0, 0.25]), 11
    noisy, flipped = noise.instance_dependent(
        sample.expand(ROWS, 3), torch.full((ROWS,), 2), 0.5, 4, std=0.01, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    (
        torch.rand(ROWS, generator=generator, dtype=torch.float64),
        torch.rand(ROWS, generator=generator, dtype=torch.float64),
    )
    scores = sample.double() @ torch.randn(3, 4, generator=generator).double()
    weights = [math.exp(float(score)) if j != 2 else 0.0 for j, score in enumerate(scores)]
    expected = [weight / sum(weights) for weight in weights]
    shares = torch.bincount(noisy[flipped], minlength=4) / flipped.sum()
    assert shares.tolist() == pytest.approx(expected, abs=2 * SHARE)  # half the rows flip


def posterior(num_classes: int, matrix: Tensor) -> Tensor:
    """What a perfect network predicts: for most samples a sure class, whose noisy labels follow the matrix."""
    generator = torch.Generator().manual_seed(0)
    truth = (40.0 * torch.randn(4000, num_classes, generator=generator)).double().softmax(1)
    return truth @ matrix


@pytest.mark.parametrize("num_classes", [2, 10, 50])
def test_the_transition_matrix_is_found_again(num_classes: int) -> None:
    matrix = noise.symmetric_matrix(0.3, num_classes) @ noise.pair_matrix(0.2, num_classes, {0: 1})
    found = noise.estimate_transition(posterior(num_classes, matrix))
    torch.testing.assert_close(found, matrix, rtol=0, atol=0.02)
    assert found.sum(1).tolist() == pytest.approx([1.0] * num_classes)


def test_the_quantile_is_rank_over_rows() -> None:
    first = torch.tensor([0.1, 0.7, 0.3, 0.9, 0.5])
    p = torch.stack([first, 1 - first], 1)
    # Ascending in column 0: .1 .3 .5 .7 .9, in column 1 the same numbers from the other end.
    assert noise.estimate_transition(p, 0.75).tolist() == [pytest.approx([0.7, 0.3]), pytest.approx([0.3, 0.7])]
    assert noise.estimate_transition(p, 1.0)[0].tolist() == pytest.approx([0.9, 0.1])
    assert noise.estimate_transition(p.bfloat16(), 1.0).sum(1).tolist() == pytest.approx([1.0, 1.0])


LABELS = torch.tensor([0, 1, 2])
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: noise.symmetric(LABELS, 1.5, 3), ValueError, "rate must be between 0.0 and 1.0, got 1.5"),
    (lambda: noise.symmetric(LABELS, math.nan, 3), ValueError, "rate must be between 0.0 and 1.0, got nan"),
    (lambda: noise.symmetric(LABELS, "0.4", 3), TypeError, "rate must be a number, got str"),  # type: ignore[arg-type]
    (lambda: noise.symmetric(LABELS, 0.4, 2), ValueError, r"labels must be in \[0, 2\) or -100, got 2"),
    (lambda: noise.symmetric(LABELS - 1, 0.4, 3), ValueError, r"labels must be in \[0, 3\) or -100, got -1"),
    (lambda: noise.symmetric(LABELS.float(), 0.4, 3), TypeError, "labels must be an integer tensor, got torch.float32"),
    (lambda: noise.symmetric([0, 1], 0.4, 3), TypeError, "labels must be an integer tensor, got list"),  # type: ignore[arg-type]
    (lambda: noise.symmetric(LABELS, 0.4, 3.0), TypeError, "num_classes must be an integer, got 3.0 of type float"),  # type: ignore[arg-type]
    (lambda: noise.symmetric(LABELS * 0, 0.4, 1, redraw=False), ValueError, "num_classes must be at least 2"),
    (lambda: noise.symmetric(LABELS, 0.4, 3, seed=0.5), TypeError, "seed must be an integer, got 0.5 of type float"),  # type: ignore[arg-type]
    (lambda: noise.symmetric_matrix(0.4, 0), ValueError, "num_classes must be at least 1, got 0"),
    (lambda: noise.symmetric_matrix(0.4, 1, redraw=False), ValueError, "num_classes must be at least 2, got 1"),
    (
        lambda: noise.asymmetric(LABELS, 0.4, 3, "cifar"),
        ValueError,
        "pairs must be a mapping or one of cifar10.*'cifar'",
    ),
    (
        lambda: noise.asymmetric(LABELS, 0.4, 3, "cifar10"),
        ValueError,
        r"pairs must lead from a class in \[0, 3\).*9: 1",
    ),
    (lambda: noise.asymmetric(LABELS, 0.4, 3, {1: 1}), ValueError, "to another, got 1: 1"),
    (lambda: noise.from_matrix(LABELS, torch.eye(3) * 0.9), ValueError, "sum of 0.9 in row 0"),
    (lambda: noise.from_matrix(LABELS, torch.eye(3) * math.nan), ValueError, "sum of nan in row 0"),
    (lambda: noise.from_matrix(LABELS, 2 * torch.eye(3) - torch.ones(3, 3) / 3), ValueError, "matrix must be >= 0"),
    (lambda: noise.from_matrix(LABELS, torch.ones(2, 3)), ValueError, r"shape \(C, C\), got \(2, 3\)"),
    (lambda: noise.from_matrix(LABELS, torch.tensor([[2.0, -1.0], [0.0, 1.0]])), ValueError, "entry of -1 in row 0"),
    (lambda: noise.asymmetric(LABELS, 0.4, 3, 3), TypeError, "pairs must be a mapping .*, got int"),  # type: ignore[arg-type]
    (lambda: noise.symmetric(LABELS, 0.4, 3, ignore_index=None), TypeError, "ignore_index must be an integer"),  # type: ignore[arg-type]
    (lambda: noise.instance_dependent(torch.ones(2, 4), LABELS, 0.4, 3), ValueError, r"got \(3,\) and \(2, 4\)"),
    (lambda: noise.instance_dependent(torch.ones(3, 4).long(), LABELS, 0.4, 3), TypeError, "inputs must be a floating"),
    (
        lambda: noise.instance_dependent(torch.ones(3, 4), LABELS, 0.4, 3, std=0.0),
        ValueError,
        "std must satisfy 0 < value",
    ),
    (
        lambda: noise.instance_dependent(torch.full((3, 4), math.nan), LABELS, 1.0, 3),
        ValueError,
        "inputs must be finite",
    ),
    (
        lambda: noise.instance_dependent(torch.full((3, 4), 1e200, dtype=torch.float64), LABELS, 1.0, 3),
        ValueError,
        r"inputs must be finite in float32, got 1e\+200",
    ),
    (
        lambda: noise.instance_dependent(torch.full((3, 4), 3e38), LABELS, 1.0, 3),
        ValueError,
        r"small enough for scores in float32, got 3e\+38",
    ),
    (lambda: noise.symmetric(LABELS, 0.4, 3, 1), TypeError, "redraw must be True or False, got 1"),  # type: ignore[arg-type]
    (lambda: noise.symmetric_matrix(0.4, 3, "no"), TypeError, "redraw must be True or False, got 'no'"),  # type: ignore[arg-type]
    (lambda: noise.from_matrix(LABELS, torch.eye(3) + 5j), TypeError, "matrix must be real, got torch.complex64"),
    (lambda: noise.instance_dependent(torch.ones(()), LABELS, 0.4, 3), ValueError, r"got \(3,\) and \(\)"),
    (lambda: noise.estimate_transition(torch.ones(4, 3)), ValueError, "rows that sum to 1"),
    (lambda: noise.estimate_transition(torch.full((4, 3), math.nan)), ValueError, "rows that sum to 1"),
    (lambda: noise.estimate_transition(torch.ones(4)), ValueError, r"shape \(N, C\), got \(4,\)"),
    (
        lambda: noise.estimate_transition(torch.ones(4, 1), 1.1),
        ValueError,
        "quantile must be between 0.0 and 1.0, got 1.1",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
