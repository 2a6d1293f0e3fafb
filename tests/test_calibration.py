"""calibration.solve_logit_bias: published values, closed forms, an independent simulation, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fused_losses import calibration
from fused_losses.calibration import solve_logit_bias

# Monte Carlo estimates of the root of Eq. 4 at C = 0.15; 4e5 draws leave a sampling error of up to 0.006.
MONTE_CARLO_TABLE = {
    2: -2.31,
    5: -0.41,
    10: 0.526,
    14: 0.929,
    20: 1.332,
    50: 2.318,
    100: 3.034,
    200: 3.739,
    365: 4.345,
    500: 4.659,
    1000: 5.357,
    5000: 6.964,
    10000: 7.657,
}


@pytest.mark.parametrize(("num_classes", "expected"), MONTE_CARLO_TABLE.items())
def test_agrees_with_the_monte_carlo_table(num_classes: int, expected: float) -> None:
    assert solve_logit_bias(num_classes) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("num_classes", "published"), [(10, 0.5), (100, 3.0)])
def test_agrees_with_the_paper(num_classes: int, published: float) -> None:
    assert solve_logit_bias(num_classes) == pytest.approx(published, abs=0.05)  # printed with one decimal


@pytest.mark.parametrize("target", [1e-3, 0.15, 0.5, 0.9, 1 - 1e-6])
def test_two_classes_solve_the_one_dimensional_integral(target: float) -> None:
    # z_1 - z_2 ~ N(0, 2), so E[p'] = E[sigmoid(N(0, 2) + eps)].
    difference = np.arange(-30.0, 30.0, 0.05)
    density = np.exp(-(difference**2) / 4.0) / math.sqrt(4.0 * math.pi) * 0.05
    mean = float(density @ (1.0 / (1.0 + np.exp(-difference - solve_logit_bias(2, target)))))
    assert mean == pytest.approx(target, abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_equal_shares_need_no_bias(num_classes: int) -> None:
    assert solve_logit_bias(num_classes, 1.0 / num_classes) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("target", [0.01, 0.2, 0.49])
def test_two_classes_are_antisymmetric_in_the_target(target: float) -> None:
    assert solve_logit_bias(2, target) == pytest.approx(-solve_logit_bias(2, 1.0 - target), abs=1e-12)


@pytest.mark.parametrize(("num_classes", "target"), [(3, 0.5), (10, 0.15), (40, 0.6), (300, 0.15)])
def test_simulated_softmax_has_the_target_mean(num_classes: int, target: float) -> None:
    generator = np.random.default_rng(20240601)
    logits = generator.standard_normal((40_000, num_classes))
    logits[:, 0] += solve_logit_bias(num_classes, target)
    weights = np.exp(logits)
    activation = weights[:, 0] / weights.sum(axis=1)
    standard_error = activation.std(ddof=1) / math.sqrt(len(activation))
    assert abs(activation.mean() - target) < 4.0 * standard_error


def test_grows_with_the_number_of_classes_and_with_the_target() -> None:
    by_classes = [solve_logit_bias(k) for k in (2, 3, 5, 6, 7, 8, 50, 10_000, 1_000_000)]
    assert by_classes == sorted(by_classes)
    assert by_classes[3] < 0 < by_classes[4], "the bias turns positive between 6 and 7 classes"
    by_target = [solve_logit_bias(10, c) for c in (1e-300, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1 - 2**-53)]
    assert by_target == sorted(by_target)
    assert all(map(math.isfinite, by_target))


@pytest.mark.parametrize("num_classes", [2, 10, 1000, 1_000_000])
@pytest.mark.parametrize("target", [1e-3, 0.15, 0.95])
def test_a_finer_grid_gives_the_same_root(num_classes: int, target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = solve_logit_bias(num_classes, target)
    step = 0.07
    normal = np.arange(-14.0, 14.0, step)
    monkeypatch.setattr(calibration, "_STEP", step)
    monkeypatch.setattr(calibration, "_SCORE", np.arange(-17.0, 140.0, step))
    monkeypatch.setattr(calibration, "_NORMAL", normal)
    monkeypatch.setattr(calibration, "_NORMAL_WEIGHT", np.exp(-0.5 * normal**2) * (step / math.sqrt(2 * math.pi)))
    caches = (calibration._rate, calibration._log_score_distribution, calibration._solve_cached)
    for cache in caches:
        cache.cache_clear()
    try:
        assert solve_logit_bias(num_classes, target) == pytest.approx(expected, abs=1e-12)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_is_cached_and_repeatable() -> None:
    calibration._solve_cached.cache_clear()
    first = solve_logit_bias(123, 0.2)
    assert solve_logit_bias(np.int64(123), np.float64(0.2)) == first
    assert calibration._solve_cached.cache_info().hits == 1
    calibration._solve_cached.cache_clear()
    assert solve_logit_bias(123, 0.2) == first
    assert type(first) is float


@pytest.mark.parametrize("dynamic", [False, True])
def test_is_a_constant_inside_a_compiled_function(dynamic: bool) -> None:
    def biased(logits: torch.Tensor) -> torch.Tensor:
        return logits + solve_logit_bias(logits.shape[1])

    torch._dynamo.reset()
    compiled = torch.compile(biased, backend="eager", fullgraph=True, dynamic=dynamic)
    for num_classes in (10, 100):
        logits = torch.zeros(3, num_classes, dtype=torch.float64)
        torch.testing.assert_close(compiled(logits), biased(logits), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((True,), TypeError, "num_classes must be an integer, got True of type bool"),
        ((10.0,), TypeError, "num_classes must be an integer, got 10.0 of type float"),
        (("10",), TypeError, "num_classes must be an integer, got '10' of type str"),
        ((1,), ValueError, "num_classes must be at least 2, got 1"),
        ((-5,), ValueError, "num_classes must be at least 2, got -5"),
        ((10, 0.0), ValueError, "target_activation must be greater than 0 and less than 1, got 0.0"),
        ((10, 1), ValueError, "target_activation must be greater than 0 and less than 1, got 1.0"),
        ((10, math.nan), ValueError, "target_activation must be greater than 0 and less than 1, got nan"),
        ((10, math.inf), ValueError, "target_activation must be greater than 0 and less than 1, got inf"),
        ((10, True), TypeError, "target_activation must be a real number, got True"),
        ((10, "0.15"), TypeError, "target_activation must be a real number, got '0.15'"),
        ((10, None), TypeError, "target_activation must be a real number, got None"),
    ],
)
def test_bad_input_names_argument_rule_and_value(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        solve_logit_bias(*arguments)
    assert str(caught.value) == message
