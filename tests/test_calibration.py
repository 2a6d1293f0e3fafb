"""calibration: published values, closed forms, independent quadratures and simulations, bad input."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_in

import fused_losses as fl
from fused_losses import _logit_bias, _mean_error
from fused_losses._roots import nearest_root
from fused_losses.calibration import match_parameter, mean_target_error, plot_mean_target_error, solve_logit_bias

pytestmark = pytest.mark.any_cpu  # integrals and roots; other tests judge the kernels

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


@pytest.mark.slow
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


@pytest.mark.parametrize(("num_classes", "target"), one_in(3, [2, 10, 1000, 1_000_000], [1e-3, 0.15, 0.95]))
def test_a_finer_grid_gives_the_same_root(num_classes: int, target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = solve_logit_bias(num_classes, target)
    step = 0.07
    normal = np.arange(-14.0, 14.0, step)
    monkeypatch.setattr(_logit_bias, "_STEP", step)
    monkeypatch.setattr(_logit_bias, "_SCORE", np.arange(-17.0, 140.0, step))
    monkeypatch.setattr(_logit_bias, "_NORMAL", normal)
    monkeypatch.setattr(_logit_bias, "_NORMAL_WEIGHT", np.exp(-0.5 * normal**2) * (step / math.sqrt(2 * math.pi)))
    caches = (_logit_bias._rate, _logit_bias._log_score_distribution, _logit_bias._solve_cached)
    for cache in caches:
        cache.cache_clear()
    try:
        assert solve_logit_bias(num_classes, target) == pytest.approx(expected, abs=1e-12)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_is_cached_and_repeatable() -> None:
    _logit_bias._solve_cached.cache_clear()
    first = solve_logit_bias(123, 0.2)
    assert solve_logit_bias(np.int64(123), np.float64(0.2)) == first
    assert _logit_bias._solve_cached.cache_info().hits == 1
    _logit_bias._solve_cached.cache_clear()
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


def laplace_transform(s: np.ndarray, count: int) -> np.ndarray:
    """E[exp(-s S)] of the sum S of ``count`` exponentials of standard normals; s > 0."""
    normal = np.arange(-10.0, 10.0, 0.1)
    weight = np.exp(-0.5 * normal**2) * 0.1 / math.sqrt(2 * math.pi)
    return (np.exp(-np.outer(s, np.exp(normal))) @ weight) ** count


def mean_power(power: float, num_classes: int, z: float) -> float:
    """E[p^power], p = 1 / (1 + S e^-z): the integral of u^(power - 1) e^-u E[exp(-u e^-z S)] du over Gamma(power)."""
    step = 0.05
    log_u = np.arange(-80.0, 6.0, step)
    u = np.exp(log_u)
    terms = np.exp(power * log_u - u) * laplace_transform(u * math.exp(-z), num_classes - 1)
    return float(terms.sum() * step / math.gamma(power))


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 3, 4, 10, 100, 1000, 100_000])
@pytest.mark.parametrize("z", [-4.0, 0.0, 3.0])
def test_mean_error_is_the_integral(num_classes: int, z: float) -> None:
    # dL/dz_k = -w (1 - p): MAE has w = 2p, GCE w = p^q, cross entropy w = 1.
    first = mean_power(1.0, num_classes, z)
    mae = -2.0 * (first - mean_power(2.0, num_classes, z))
    gce = -(mean_power(0.7, num_classes, z) - mean_power(1.7, num_classes, z))
    assert mean_target_error("mae", num_classes, z) == pytest.approx(mae, rel=1e-8)
    assert mean_target_error(fl.GCELoss(), num_classes, z) == pytest.approx(gce, rel=1e-8)
    assert mean_target_error("cross_entropy", num_classes, z) == pytest.approx(first - 1.0, rel=1e-8)


@pytest.mark.parametrize(
    ("loss", "options", "num_classes", "expected"),
    [
        ("gce", {}, 100, -0.02823),
        ("gce", {}, 10, -0.1446),
        ("mae", {}, 10, -0.133),
        ("mae", {}, 100, -0.0123),
        ("mae", {}, 1000, -0.0012),
        ("mae", {"logit_bias": 0.5}, 10, -0.198),
        ("mae", {"logit_bias": 3.0}, 100, -0.197),
        ("mae", {"logit_bias": 5.2}, 1000, -0.179),
    ],
)
def test_mean_errors_at_logit_zero(loss: str, options: dict[str, float], num_classes: int, expected: float) -> None:
    digits = len(str(expected).split(".")[1])
    assert mean_target_error(loss, num_classes, 0.0, **options) == pytest.approx(expected, abs=0.51 * 10**-digits)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_classes"), one_in(3, sorted(fl.LOSSES), [2, 10, 300]))
def test_every_loss_agrees_with_a_simulation(name: str, num_classes: int) -> None:
    generator = np.random.default_rng(99)
    others = generator.standard_normal((200_000 // num_classes, num_classes - 1))
    logits = torch.from_numpy(np.pad(others, [(0, 0), (1, 0)], constant_values=1.0)).requires_grad_()
    target = torch.zeros(len(logits), dtype=torch.int64)
    values = fl.LOSSES[name].reference(logits, target, reduction="none")
    slopes = torch.autograd.grad(values.sum(), logits)[0][:, 0]
    found = mean_target_error(name, num_classes, 1.0)
    # A truncated loss has a slope in few rows: if they are 1e-5 of all, perhaps none is drawn.
    assert found < 0 or (name == "truncated_gce" and found == 0), "every loss raises the logit of the label"
    sampled = 5.0 * float(slopes.std()) / math.sqrt(len(slopes))
    assert abs(found - float(slopes.mean())) <= sampled + 2e-3 * abs(found) + (name == "truncated_gce") * 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [10, 1000, 100_000])
@pytest.mark.parametrize("name", ["gce", "mae", "js"])
def test_the_fixed_sample_is_good_to_half_a_per_cent(name: str, num_classes: int) -> None:
    z = np.array([-2.0, 0.0, 3.0])
    loss = functools.partial(fl.LOSSES[name].reference, reduction="none")
    sample = _mean_error._sample_means(loss, num_classes, z)
    assert sample.tolist() == pytest.approx(mean_target_error(name, num_classes, z).tolist(), rel=5e-3)
    assert sample.tolist() == _mean_error._sample_means(loss, num_classes, z).tolist(), "the same rows each time"


@pytest.mark.slow
def test_losses_of_all_classes_are_sampled_and_others_integrated() -> None:
    def on_log_p(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -logits.log_softmax(1).gather(1, target[:, None])[:, 0]

    def normalised(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return on_log_p(logits, target) / -logits.log_softmax(1).sum(1)

    assert _mean_error.depends_on_target_only(on_log_p, 7)
    assert not _mean_error.depends_on_target_only(normalised, 7)

    def by_rank(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        t = -on_log_p(logits, target)
        return torch.where(logits.argmax(1) == target, 1.0 - t.exp(), -t)

    for classes in (3, 4, 6, 7, 10, 11, 100):
        for loss in (by_rank, functools.partial(fl.reference.ece_loss, reduction="none")):
            assert not _mean_error.depends_on_target_only(loss, classes)
    smoothed = mean_target_error("cross_entropy", 10, 0.0, label_smoothing=0.1)
    # (1 - s) CE + (s / K) S: its slope is p - (1 - s) - s / K.
    assert smoothed == pytest.approx(mean_power(1.0, 10, 0.0) - 0.9 - 0.01, rel=2e-3)
    weight = torch.tensor([3.0, 1.0, 1.0, 1.0])
    weighted = mean_target_error(fl.MAELoss(weight=weight), 4, 0.0)
    assert weighted == pytest.approx(3.0 * mean_target_error("mae", 4, 0.0), rel=2e-3)


def test_a_given_parameter_takes_the_place_of_any() -> None:
    """Of a Module in eval mode, whose bias is out of use; of one that is learnt."""
    expected = mean_target_error("mae", 100, 0.0, logit_bias=3.0)
    learnt = fl.MAELoss(logit_bias=torch.nn.Parameter(torch.tensor(1.0)))
    for module in (fl.MAELoss(), fl.MAELoss().eval(), learnt, learnt.eval()):
        assert mean_target_error(module, 100, 0.0, logit_bias=3.0) == pytest.approx(expected)
        assert math.isfinite(match_parameter(module, "logit_bias", 1000, 100, 3.0))
    assert mean_target_error(fl.MAELoss().eval(), 100, 0.0) == mean_target_error("mae", 100, 0.0)
    assert learnt.logit_bias == 1.0 and not learnt.training


def test_the_nearest_of_two_roots_is_taken() -> None:
    def loss(logits: torch.Tensor, target: torch.Tensor, q: float = 1.0) -> torch.Tensor:
        height = (q - 0.89) * (q - 1.14) if logits.shape[1] == 7 else 0.0
        return height * logits.gather(1, target[:, None])[:, 0]

    assert match_parameter(loss, "q", 7, 5, 1.0) == pytest.approx(0.89)


def test_mean_error_takes_numbers_tensors_and_arrays() -> None:
    # One z and several z take different loops, which round in another order.
    expected = [pytest.approx(mean_target_error("mae", 10, logit), rel=1e-14) for logit in (-1.0, 2.0)]
    tensor = mean_target_error("mae_loss", 10, torch.tensor([[-1.0], [2.0]], dtype=torch.float16))
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64
    assert tensor.tolist() == [[expected[0]], [expected[1]]]
    array = mean_target_error(fl.functional.mae_loss, 10, np.array([-1, 2]))
    assert isinstance(array, np.ndarray) and array.tolist() == expected
    assert mean_target_error(torch.nn.CrossEntropyLoss(), 10, 0) == mean_target_error("cross_entropy", 10, 0)


def test_a_bias_shifts_the_curve() -> None:
    biased = mean_target_error(fl.MAELoss(logit_bias="auto"), 100, 0.0)
    shift = solve_logit_bias(100)
    assert biased == pytest.approx(mean_target_error("mae", 100, shift), rel=1e-10)
    assert biased == pytest.approx(mean_target_error("mae", 100, 0.0, logit_bias="auto"), rel=1e-10)
    module = fl.MAELoss(logit_bias=torch.tensor(shift, dtype=torch.float64), reduction="sum")
    assert mean_target_error(module, 100, 0.0) == pytest.approx(biased, rel=1e-10)
    assert (module.reduction, float(module.logit_bias)) == ("sum", shift), "the Module stays as it was"


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [3, 4, 7, 10, 1000, 1_000_000])
def test_the_solved_bias_gives_the_target_by_another_method(num_classes: int) -> None:
    # Here by the distribution of the sum of exponentials, in the package by adding Gumbel noise.
    log_sum, weight = _mean_error.log_sum_distribution(num_classes - 1)
    assert weight.sum() == pytest.approx(1.0, abs=1e-13)
    z = np.arange(-8.0, 8.0, 0.25) + solve_logit_bias(num_classes)
    normal = np.exp(-0.5 * np.arange(-8.0, 8.0, 0.25) ** 2) * 0.25 / math.sqrt(2 * math.pi)
    activation = [float(weight @ (1.0 / (1.0 + np.exp(log_sum - value)))) for value in z]
    assert float(normal @ activation) == pytest.approx(0.15, abs=1e-10)


@pytest.mark.parametrize(
    ("loss", "num_classes", "reference_num_classes", "expected"),
    [("gce", 1000, 100, 0.4816), (fl.GCELoss(), 100, 10, 0.379), (fl.functional.gce_loss, 1000, 10, 0.261)],
)
def test_matched_exponents(loss: Any, num_classes: int, reference_num_classes: int, expected: float) -> None:
    found = match_parameter(loss, "q", num_classes, reference_num_classes, 0.7)
    assert found == pytest.approx(expected, abs=0.51 * 10 ** -len(str(expected).split(".")[1]))
    reference = mean_target_error("gce", reference_num_classes, 0.0, q=0.7)
    assert mean_target_error("gce", num_classes, 0.0, q=found) == pytest.approx(reference, rel=1e-10)
    assert match_parameter(loss, "q", reference_num_classes, num_classes, found) == pytest.approx(0.7, rel=1e-8)


@pytest.mark.slow
def test_matching_other_parameters() -> None:
    assert match_parameter("gce", "q", 50, 50, 0.7) == 0.7
    # The scale of MAE multiplies its error.
    ratio = mean_target_error("mae", 10, 0.0) / mean_target_error("mae", 100, 0.0)
    assert match_parameter("mae", "scale", 100, 10, 2.0) == pytest.approx(2.0 * ratio, rel=1e-9)
    # A bias shifts the curve, and cross entropy's is monotone.
    bias = match_parameter("cross_entropy", "logit_bias", 100, 10, 0.0)
    assert mean_target_error("cross_entropy", 100, bias) == pytest.approx(mean_target_error("cross_entropy", 10, 0.0))
    # The ends of the range of pi are approached, never passed.
    pi = match_parameter(fl.JSLoss(), "pi", 100, 10, 0.5)
    assert 0.0 < pi < 0.5
    assert mean_target_error("js", 100, 0.0, pi=pi) == pytest.approx(mean_target_error("js", 10, 0.0), rel=1e-9)
    # What a Module or a partial sets for the other parameters stays.
    kept = match_parameter(fl.AGCELoss(a=2.0), "q", 12, 10, 0.6)
    assert kept == match_parameter(functools.partial(fl.functional.agce_loss, a=2.0), "q", 12, 10, 0.6)
    assert kept != match_parameter("agce", "q", 12, 10, 0.6)


def test_matching_a_bias_that_is_not_monotone() -> None:
    """A bounded loss learns slowly with a small bias and with a large one: there are two roots."""
    for name, classes, reference in (("mae", 1000, 2.0), ("gce", 1000, 2.5), ("mae", 100, 2.5)):
        bias = match_parameter(name, "logit_bias", classes, 10, reference)
        goal = mean_target_error(name, 10, 0.0, logit_bias=reference)
        assert mean_target_error(name, classes, 0.0, logit_bias=bias) == pytest.approx(goal)


def test_the_nearest_root_is_found() -> None:
    for roots, holds, nearest in [
        ((1.02, 1.04, 1.5), math.isfinite, 1.02),
        ((0.72, 1.29), lambda x: x > 0.7, 0.72),
        ((0.99, 0.98), math.isfinite, 0.99),
        ((1.0,), math.isfinite, 1.0),
        ((-30.0, -29.5), math.isfinite, -29.5),
    ]:
        found, reached = nearest_root(lambda x, roots=roots: math.prod(x - root for root in roots), 1.0, holds)
        assert found == pytest.approx(nearest, rel=1e-12) and reached
    found, reached = nearest_root(lambda x: x * x + 1.0, 1.0)
    assert found is None and 1.0 <= min(reached) < 1.1 and max(reached) > 1e10


def test_figure_of_the_paper(tmp_path: Path) -> None:
    losses = {"MAE": "mae", "MAE*": fl.MAELoss(logit_bias="auto")}
    figure = plot_mean_target_error(losses, [10, 100], np.linspace(-3.0, 6.0, 19))
    curves, histogram = figure.axes
    assert [line.get_label() for line in curves.lines][:4] == [
        *("MAE, K = 10", "MAE, K = 100", "MAE*, K = 10", "MAE*, K = 100"),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        line.get_label() for line in curves.lines[:4]
    ]
    labels = "logit of the labelled class", "mean error, dL / d logit", "density of initial logits"
    assert (curves.get_xlabel(), curves.get_ylabel(), histogram.get_ylabel()) == labels
    x, y = curves.lines[1].get_data()
    assert y[list(x).index(0.0)] == pytest.approx(mean_target_error("mae", 100, 0.0), rel=1e-12)
    areas = [bar.get_height() * bar.get_width() for bar in histogram.patches]
    assert sum(areas) == pytest.approx(1.0)
    assert max(histogram.patches, key=lambda bar: bar.get_height()).get_x() == pytest.approx(0.0, abs=0.3)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_figure_options(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot_mean_target_error(
        ["gce", fl.functional.mae_loss, fl.MAELoss()], 10, torch.linspace(0, 1, 3), initial_logits=np.zeros((2, 3))
    )
    assert len(figure.axes[0].lines) == 4, "a curve each and the zero line"
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert len(plot_mean_target_error("mae", 10, torch.zeros(1)).axes[0].lines) == 2
    with pytest.raises(ValueError, match="losses and num_classes must not be empty"):
        plot_mean_target_error([], 10)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        plot_mean_target_error("mae", 10)
