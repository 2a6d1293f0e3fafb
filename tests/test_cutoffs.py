"""Inlier mask and cut-offs: the paper's demo, hand-worked cases, properties, degenerate data, collecting."""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fused_losses._crossings import SkewNormal, gaussian_crossing, skewnorm_crossing
from fused_losses.cutoffs import (
    CutoffCollector,
    optimal_logit_cutoff_from_gaussians,
    optimal_prob_cutoff_from_skewnorm,
    z_error_inlier_mask,
)

pytestmark = pytest.mark.any_cpu  # numpy and scipy
CUTOFFS = [optimal_logit_cutoff_from_gaussians, optimal_prob_cutoff_from_skewnorm]


@pytest.fixture(scope="module")
def demo() -> tuple[np.ndarray, np.ndarray]:
    """The paper's demo: 1000 rows of N(-2, 1) in class 0 and of N(2, 1) in class 1."""
    generator = np.random.RandomState(42)
    logits = np.concatenate([generator.normal(-2, 1, 1000), generator.normal(2, 1, 1000)])
    return logits, np.repeat([0, 1], 1000)


def naive_mask(logits: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    mask = np.zeros(len(logits), dtype=bool)
    for label in (0, 1):
        rows = [i for i in range(len(logits)) if labels[i] == label and math.isfinite(logits[i])]
        if len(rows) < 2:
            continue
        mean, std = np.mean(logits[rows]), np.std(logits[rows], ddof=1)
        for i in rows:
            mask[i] = std < 1e-8 or abs(logits[i] - mean) / std <= threshold
    return mask


def test_demo_of_the_paper(demo: tuple[np.ndarray, np.ndarray]) -> None:
    assert z_error_inlier_mask(*demo).sum() == 1909
    assert optimal_logit_cutoff_from_gaussians(*demo) == pytest.approx((0.0326, 0.5082), abs=5e-5)
    assert optimal_prob_cutoff_from_skewnorm(*demo) == pytest.approx(0.5129, abs=5e-5)


def test_mask_of_the_paper_s_example() -> None:
    logits, labels = np.array([2.5, 0.2, -1.1, 1.3, -2.0, 3.0]), np.array([1, 1, 0, 1, 0, 1])
    assert z_error_inlier_mask(logits, labels, 1.1).tolist() == [True, False, True, True, True, True]
    assert z_error_inlier_mask(logits, labels, 1.3).all()
    assert z_error_inlier_mask(logits, labels).all()  # no |z| of 4 rows exceeds 1.5


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.shared(st.integers(0, 40), key="n"), elements=st.integers(-5, 5).map(float)),
    hnp.arrays(np.int64, st.shared(st.integers(0, 40), key="n"), elements=st.integers(0, 1)),
    st.sampled_from([0.31, 0.9, 1.53, 2.0]),
)
def test_mask_agrees_with_a_loop(logits: np.ndarray, labels: np.ndarray, threshold: float) -> None:
    assert z_error_inlier_mask(logits, labels, threshold).tolist() == naive_mask(logits, labels, threshold).tolist()


def test_mask_leaves_out_only_the_bad_row() -> None:
    logits = np.array([1.0, 2.0, 3.0, np.inf, np.nan, -1.0, -1.0, 5.0])
    labels = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, np.nan])
    assert z_error_inlier_mask(logits, labels).tolist() == [True, True, True, False, False, True, True, False]
    assert z_error_inlier_mask(np.array([7.0, 1.0, 1.0]), np.array([1, 0, 0])).tolist() == [False, True, True]
    assert z_error_inlier_mask(np.array([1.0, 1.1, 1.2]), np.array([0.5, 0.5, 0.5])).tolist() == [False] * 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.float32, torch.bool, torch.uint8])
def test_any_tensor(device: str, dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    logits = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).to(dtype).to(device).requires_grad_()
    labels = (torch.arange(200).unsqueeze(1) % 2).to(label_dtype).to(device)
    exact, classes = logits.detach().double().flatten().cpu().numpy(), labels.flatten().cpu().numpy().astype(int)
    mask = z_error_inlier_mask(logits, labels, 1.5)
    assert (mask.dtype, mask.shape, mask.device.type) == (torch.bool, logits.shape, device)
    assert mask.flatten().tolist() == naive_mask(exact, classes, 1.5).tolist()
    shifted = logits + 3 * labels.to(dtype)
    expected = optimal_logit_cutoff_from_gaussians(shifted.detach().double().cpu().numpy(), labels.cpu().numpy())
    assert optimal_logit_cutoff_from_gaussians(shifted, labels) == expected


def test_equal_spreads_meet_in_the_middle() -> None:
    logits = np.array([-3.0, -2.0, -1.0, 3.0, 4.0, 5.0])
    cutoff, probability = optimal_logit_cutoff_from_gaussians(logits, np.repeat([0, 1], 3))
    assert cutoff == pytest.approx(1.0, abs=1e-15)
    assert probability == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-15)
    assert optimal_logit_cutoff_from_gaussians(logits[::-1], np.repeat([0, 1], 3))[0] == pytest.approx(1.0, abs=1e-15)


def test_unequal_spreads_by_hand() -> None:
    # N(0, 1) and N(3, 2): x^2 / 2 = (x - 3)^2 / 8 + log 2, or 3 x^2 + 6 x - 9 - 8 log 2 = 0; one root is negative.
    expected = (-6 + math.sqrt(36 + 12 * (9 + 8 * math.log(2)))) / 6
    assert gaussian_crossing(0.0, 1.0, 3.0, 2.0) == pytest.approx(expected, rel=1e-14)
    # N(0, 1) and N(0.1, 3): 8 x^2 + 0.2 x - 0.01 - 18 log 3 = 0 has no root in (0, 0.1); the positive one is nearer.
    expected = (-0.2 + math.sqrt(0.04 + 32 * (0.01 + 18 * math.log(3)))) / 16
    assert gaussian_crossing(0.0, 1.0, 0.1, 3.0) == pytest.approx(expected, rel=1e-14)


def test_the_root_between_the_means_by_hand() -> None:
    # N(0, 1) and N(1, 0.5): x^2 / 2 = 2 (x - 1)^2 - log 2, or 1.5 x^2 - 4 x + 2 - log 2 = 0; the other root is above 2.
    expected = (4 - math.sqrt(16 - 6 * (2 - math.log(2)))) / 3
    assert 0.0 < expected < 1.0
    assert gaussian_crossing(0.0, 1.0, 1.0, 0.5) == pytest.approx(expected, rel=1e-14)


@given(st.floats(-50, 50), st.floats(1e-3, 50), st.floats(-50, 50), st.floats(1e-3, 50))
def test_densities_are_equal_at_the_root_between_the_means_if_there_is_one(
    mean_0: float, std_0: float, mean_1: float, std_1: float
) -> None:
    def difference(x: float) -> float:
        return (-(((x - mean_0) / std_0) ** 2) + ((x - mean_1) / std_1) ** 2) / 2 - math.log(std_0 / std_1)

    if (mean_0, std_0) == (mean_1, std_1):
        return
    x = gaussian_crossing(mean_0, std_0, mean_1, std_1)
    slope = abs((x - mean_0) / std_0**2) + abs((x - mean_1) / std_1**2)
    terms = ((x - mean_0) / std_0) ** 2 + ((x - mean_1) / std_1) ** 2 + 1
    assert abs(difference(x)) <= 1e-12 * terms + 1e-13 * slope * (abs(x) + 100)
    if difference(mean_0) > 1e-9 and difference(mean_1) < -1e-9:
        assert min(mean_0, mean_1) - 1e-9 <= x <= max(mean_0, mean_1) + 1e-9


def test_nearly_equal_spreads_lose_no_digits() -> None:
    assert gaussian_crossing(-2.0, 1.0, 2.0, 1.0 + 1e-13) == pytest.approx(0.0, abs=1e-12)


def test_a_row_at_the_threshold_is_kept() -> None:
    """Scores -1, 0, 1 have the standard deviation 1: the ends are at 1 exactly."""
    scores, labels = torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3)
    assert z_error_inlier_mask(scores, labels, 1.0).tolist() == [True, True, True]
    assert z_error_inlier_mask(scores, labels, math.nextafter(1.0, 0.0)).tolist() == [False, True, False]


@pytest.mark.parametrize("fit", [(math.nan, 0.5, 1.0), (1.0, math.inf, 1.0), (1.0, 0.5, 0.0), (1.0, 0.5, math.inf)])
def test_a_fit_that_is_no_density_is_refused(monkeypatch: pytest.MonkeyPatch, fit: tuple[float, ...]) -> None:
    from scipy import stats

    monkeypatch.setattr(stats.skewnorm, "fit", lambda samples: fit)
    with pytest.raises(ValueError, match="class 1: the skew-normal fit gave shape="):
        SkewNormal.fit(np.linspace(0.0, 1.0, 5), 1)


def test_skew_normal_crossing_against_scipy() -> None:
    from scipy.stats import skewnorm

    first, second = SkewNormal(3.0, 0.1, 0.15), SkewNormal(-4.0, 0.95, 0.2)
    x = skewnorm_crossing(first, second)
    assert first.mode() < x < second.mode()
    assert skewnorm.pdf(x, 3.0, 0.1, 0.15) == pytest.approx(skewnorm.pdf(x, -4.0, 0.95, 0.2), rel=1e-9)
    assert skewnorm_crossing(second, first) == pytest.approx(x, abs=1e-12)
    grid = np.linspace(0, 1, 7)
    expected = skewnorm.logpdf(grid, 3.0, 0.1, 0.15) + math.log(math.sqrt(2 * math.pi) / 2)
    assert first.log_density(grid).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert first.mode() == pytest.approx(grid_mode(skewnorm.pdf, (3.0, 0.1, 0.15)), abs=1e-5)


def grid_mode(density: Any, parameters: tuple[float, ...]) -> float:
    grid = np.linspace(0, 1, 100_001)
    return float(grid[np.argmax(density(grid, *parameters))])


def test_skew_normal_crossing_where_both_densities_underflow() -> None:
    # At every point between the modes at least one density is 0 in float64, and both are at the ends of [0.001, 0.999].
    x = skewnorm_crossing(SkewNormal(0.0, 0.2, 0.002), SkewNormal(0.0, 0.8, 0.002))
    assert x == pytest.approx(0.5, abs=1e-9)


def test_skew_normal_crossing_outside_the_modes() -> None:
    # The same centre, one density twice as wide: |x - 0.5| = s sqrt(2 log 2 / (1 - 1/4)) on both sides.
    x = skewnorm_crossing(SkewNormal(0.0, 0.5, 0.05), SkewNormal(0.0, 0.5, 0.1))
    assert abs(x - 0.5) == pytest.approx(0.05 * math.sqrt(2 * math.log(2) / 0.75), rel=1e-6)
    with pytest.raises(ValueError, match=r"the densities of classes 0 and 1 .* do not cross between 0.001 and 0.999"):
        skewnorm_crossing(SkewNormal(0.0, 0.5, 0.05), SkewNormal(0.0, 0.5, 0.05))


@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0, 2.0, 3.0], [1, 1, 1], r"class 0 must have at least 2 inliers, got 0 of 0 rows \(z_threshold=2.0\)"),
        ([1.0, 2.0, 3.0], [0, 0, 1], "class 1 must have at least 2 inliers, got 0 of 1 rows"),
        ([1.0, 2.0, math.nan, 4.0], [0, 0, 1, 1], "class 1 must have at least 2 inliers, got 0 of 2 rows"),
        ([0.1, 0.1, 0.1, 1.0, 2.0], [0, 0, 0, 1, 1], "class 0 must have (logits|probabilities) that differ, all 3"),
        ([1.0, 2.0], [0], r"labels must have the shape \(2,\) of logits, got \(1,\)"),
        ([[1.0, 2.0]], [[0, 1]], r"logits must have shape \(N,\) or \(N, 1\), got \(1, 2\)"),
        ([[[1.0, 2.0]]], [[[0, 1]]], r"logits must have shape \(N,\) or \(N, 1\), got \(1, 1, 2\)"),
        (1.0, 0, r"logits must have shape \(N,\) or \(N, 1\), got \(\)"),
    ],
)
def test_degenerate_data(cutoff: Any, logits: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cutoff(np.array(logits), np.array(labels))


def test_more_degenerate_data() -> None:
    same = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"classes 0 and 1 have the same mean 2 and the same spread 0.816"):
        optimal_logit_cutoff_from_gaussians(same, np.repeat([0, 1], 3))
    generator = np.random.default_rng(0)
    for scale, offset in ((1.0, 0.0), (1e-3, 5.0), (1e80, 0.0)):
        rows = offset + scale * generator.normal(size=50)
        shuffled = np.concatenate([rows, generator.permutation(rows)])
        with pytest.raises(ValueError, match="classes 0 and 1 have the same mean"):
            optimal_logit_cutoff_from_gaussians(shuffled, np.repeat([0, 1], 50))
    with pytest.raises(ValueError, match=r"z_threshold must satisfy 0 < value <= inf, got 0.0"):
        optimal_logit_cutoff_from_gaussians(same, np.repeat([0, 1], 3), 0.0)
    with pytest.raises(ValueError, match="threshold must satisfy 0 < value <= inf, got nan"):
        z_error_inlier_mask(same, np.repeat([0, 1], 3), math.nan)
    with pytest.raises(TypeError, match="logits must be a tensor or an array, got list"):
        z_error_inlier_mask([1.0], np.array([1]))
    saturated = np.array([-1.0, 0.0, 1.0, 40.0, 41.0, 42.0])  # probabilities of class 1 all round to 1
    with pytest.raises(ValueError, match="class 1 must have probabilities that differ, all 3 inliers are 1"):
        optimal_prob_cutoff_from_skewnorm(saturated, np.repeat([0, 1], 3))


@pytest.mark.parametrize("largest", [2e100, 1e155, 5e300, -1.7e308])
@pytest.mark.parametrize("others", [[-1.0, -2.0, 3.0], [-1e300, -2e300, 1e300], [math.inf, 1.0, 2.0]])
def test_logits_whose_squares_are_out_of_range(largest: float, others: list[float]) -> None:
    logits, labels = np.array([*others, largest]), np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"logits must be between -1e\+100 and 1e\+100, got"):
        optimal_logit_cutoff_from_gaussians(logits, labels)
    if abs(others[0]) < 1e100:  # a row without a class does not count
        labels = np.array([0, 0, 1, 2])
        optimal_logit_cutoff_from_gaussians(np.append(logits, 5.0), np.append(labels, 1))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e50, 1e99])
def test_the_cutoff_scales_with_the_logits(scale: float) -> None:
    logits, labels = np.array([-3.0, -2.0, 1.0, 2.5]), np.array([0, 0, 1, 1])
    expected = optimal_logit_cutoff_from_gaussians(logits, labels)[0]
    assert optimal_logit_cutoff_from_gaussians(scale * logits, labels)[0] == pytest.approx(scale * expected, rel=1e-12)
    wide = np.array([-3.0 * scale, -2.0 * scale, 1.0, 2.5])
    assert math.isfinite(optimal_logit_cutoff_from_gaussians(wide, labels)[0])


def test_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch, demo: tuple[np.ndarray, np.ndarray]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="needs scipy: pip install scipy"):
        optimal_prob_cutoff_from_skewnorm(*demo)
    assert builtins.round(optimal_logit_cutoff_from_gaussians(*demo)[0], 4) == 0.0326


def test_collector_gives_what_the_whole_set_gives(demo: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = demo
    order = np.random.default_rng(0).permutation(2000)
    collector = CutoffCollector()
    for rows in np.array_split(order, 7):
        collector.update(torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]))
    assert len(collector) == 2000
    assert collector.inlier_mask().tolist() == z_error_inlier_mask(logits[order], labels[order]).tolist()
    expected = optimal_logit_cutoff_from_gaussians(logits, labels)
    assert collector.logit_cutoff_from_gaussians() == pytest.approx(expected, rel=1e-9)
    assert collector.prob_cutoff_from_skewnorm() == pytest.approx(0.5129, abs=5e-5)


def test_collector_skips_missing_labels_merges_and_is_saved() -> None:
    first, second = CutoffCollector(), CutoffCollector()
    first.update(np.array([1.0, 2.0, 3.0]), np.array([0.0, math.nan, 1.0]))
    second.update(torch.tensor([[4.0], [5.0]], dtype=torch.bfloat16), torch.tensor([[True], [False]]))
    both = first.merge(second)
    assert both.logits.tolist() == [1.0, 3.0, 4.0, 5.0]
    assert both.labels.tolist() == [0, 1, 1, 0]
    assert (len(first), len(second)) == (2, 2), "merge returns a new collector"
    restored = CutoffCollector()
    restored.update(np.array([9.0]), np.array([1]))
    restored.load_state_dict(both.state_dict())
    assert restored.logits.tolist() == both.logits.tolist() and restored.labels.tolist() == both.labels.tolist()
    assert repr(restored) == "CutoffCollector(4 rows)"
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        restored.load_state_dict({})
    with pytest.raises(TypeError, match="state_dict must be a dictionary, got list"):
        restored.load_state_dict([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class 0 must have at least 2 inliers, got 0 of 0 rows"):
        CutoffCollector().logit_cutoff_from_gaussians()
    with pytest.raises(RuntimeError, match="init_process_group"):
        both.all_reduce()
