"""Properties that hold for whole families of problems, on examples drawn by Hypothesis (the same ones in every run)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import GRAD_FLOOR, GRAD_TOLERANCE, LOSS_TOLERANCE, loss_and_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_problem import Problem

import fused_losses as fl

NAMES = list(fl.LOSSES)
ALL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EXACT_DTYPES = [torch.float64, torch.float32]  # the rounding of a gradient in half precision would hide differences

# Ranges of drawn parameters; what is not listed keeps its default. Within these ends float32 can tell the loss from
# a constant: values are divided by q, by a - 1 and by (1 - pi) log(1 - pi), and with a power above 5 or so the gradient
# of most rows vanishes. Edges that have a meaning of their own (0, 1) are listed one by one.
PARAMETERS: dict[str, dict[str, st.SearchStrategy[float]]] = {
    "cross_entropy": {"label_smoothing": st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99)},
    "mae": {"scale": st.floats(0.1, 4.0)},
    "gce": {"q": st.floats(0.1, 3.0)},
    "agce": {"a": st.floats(0.1, 6.0), "q": st.floats(0.1, 3.0)},
    "aue": {"a": st.floats(1.2, 6.0), "q": st.floats(0.1, 3.0)},
    "ae": {"a": st.floats(0.3, 5.0)},
    "rce": {"A": st.floats(0.5, 12.0)},
    "sce": {
        "alpha": st.just(0.0) | st.floats(0.01, 6.0),
        "beta": st.just(0.0) | st.floats(0.01, 2.0),
        "A": st.floats(0.5, 12.0),
    },
    "taylor_ce": {"order": st.integers(1, 12)},
    "phuber_ce": {"tau": st.floats(1.1, 50.0)},
    "js": {"pi": st.floats(0.05, 0.95)},
    "focal": {"gamma": st.just(0.0) | st.floats(0.1, 5.0)},
    "bounded_ce": {"a": st.floats(0.05, 3.0)},
}

# The losses that fall from the second number to the first as p_y goes from 0 to 1 (without label smoothing).
VALUE_RANGE = {
    "cross_entropy": lambda label_smoothing: (0.0, math.inf),
    "mae": lambda scale: (0.0, scale),
    "gce": lambda q: (0.0, 1 / q),
    "agce": lambda a, q: (0.0, ((a + 1) ** q - a**q) / q),
    "aue": lambda a, q: (0.0, (a**q - (a - 1) ** q) / q),
    "ae": lambda a: (math.exp(-1 / a), 1.0),
    "rce": lambda A: (0.0, A),
    "sce": lambda alpha, beta, A: (0.0, math.inf if alpha else beta * A),
    "taylor_ce": lambda order: (0.0, sum(1 / k for k in range(1, order + 1))),
    "phuber_ce": lambda tau: (0.0, 1 + math.log(tau)),
    "js": lambda pi: (0.0, 1 + pi * math.log(pi) / ((1 - pi) * math.log(1 - pi))),
    "focal": lambda gamma: (0.0, math.inf),
    "bounded_ce": lambda a: (0.0, math.log(1 + 1 / a)),
}

# Loss, its parameters, and the sum it must equal: [(factor, other loss, its parameters)].
IDENTITIES = {
    "mae is gce": lambda x: ("mae", {"scale": x}, [(x, "gce", {"q": 1.0})]),
    "rce is taylor_ce": lambda x: ("rce", {"A": x}, [(x, "taylor_ce", {"order": 1})]),
    "agce is mae": lambda x: ("agce", {"a": x, "q": 1.0}, [(1.0, "mae", {"scale": 1.0})]),
    "aue is mae": lambda x: ("aue", {"a": 1 + x, "q": 1.0}, [(1.0, "mae", {"scale": 1.0})]),
    "sce is a sum": lambda x: (
        "sce",
        {"alpha": x, "beta": 0.5, "A": 1 + x},
        [(x, "cross_entropy", {}), (0.5, "rce", {"A": 1 + x})],
    ),
    "focal is cross entropy": lambda x: ("focal", {"gamma": 0.0}, [(1.0, "cross_entropy", {})]),
}

OF_DIFFERENCES = [name for name in NAMES if name != "ldr_kl"]  # between logits; it applies softplus to each by itself

CLASSES = st.integers(2, 70)
ROW = st.tuples(CLASSES)
BATCH = st.tuples(st.integers(0, 40), CLASSES)
IMAGES = st.tuples(st.integers(0, 40), CLASSES, st.integers(0, 6), st.integers(1, 6))
# Work is split into pieces of about 32768 elements: fewer would run on one thread whatever is asked for.
LARGE = st.sampled_from([(30_000, 5), (2000, 70), (9, 13, 50, 50), (3, 70, 30, 30)])


def examples(number: int) -> settings:
    same_device = [HealthCheck.function_scoped_fixture]  # `device` may be the same for all examples
    return settings(deadline=None, derandomize=True, max_examples=number, suppress_health_check=same_device)


def of_formulas(number: int, **strategies: Any) -> Any:
    """Examples for what holds of the formulas, with which the kernels of every instruction set are compared anyway."""
    return lambda test: pytest.mark.any_cpu(examples(number)(given(**strategies)(test)))


def random_weights(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Between 0 and 2, one in seven exactly 0."""
    return 2 * torch.rand(shape, generator=random) * (torch.rand(shape, generator=random) > 1 / 7)


@st.composite
def problems(draw, names=NAMES, dtypes=EXACT_DTYPES, shapes=ROW | BATCH | IMAGES, smoothing=True, grid=True, **fixed):
    """Logits and bias are multiples of 1/16 unless ``grid=False``: adding integers to them is then exact."""
    entry = fl.LOSSES[draw(st.sampled_from(names))]
    own = PARAMETERS.get(entry.name, {})
    drawn = {name: draw(own[name]) for name in entry.parameters if name in own}
    parameters = {k: v for k, v in drawn.items() if smoothing or k != "label_smoothing"}

    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    classes, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], shape[:1] + shape[2:])
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(shape, generator=random, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 3.0, 10.0]))
    logits = ((logits * 16).round() / 16 if grid else logits + draw(st.floats(-20.0, 20.0))).to(dtype)

    ignore_index = draw(st.sampled_from([-100, 255, classes - 1]))
    hidden = torch.rand(rows, generator=random) < draw(st.sampled_from([0.0, 0.1, 0.3, 1.0]))
    target = torch.where(hidden, ignore_index, torch.randint(0, classes, rows, generator=random))
    bias = draw(st.just(0.0) | st.integers(-48, 96).map(lambda k: k / 16))
    biases = [bias, torch.tensor(bias), torch.tensor(bias, dtype=torch.float64)] + ([] if grid else ["auto"])
    options = {
        "weight": random_weights((classes,), random) if draw(st.booleans()) else None,
        "sample_weight": random_weights(rows, random) if draw(st.booleans()) else None,
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "logit_bias": draw(st.sampled_from(biases)),
    }
    upstream = 2 * torch.rand(rows, generator=random, dtype=torch.float64) - 1
    upstream = upstream if dtype == torch.float64 else upstream.float()
    return Problem(entry, parameters, logits, target, upstream, options | fixed, random)


def rounding_of_gradient(problem: Problem, reduction: str) -> float:
    """What p_y - 1 loses by cancellation, in any implementation: it can exceed all gradients of a confident batch.

    A few roundings, and one per class for the sum of exponentials, relative to the largest gradient that the loss has
    on logits (z, 0, ..., 0).
    """
    logits = torch.zeros(25, problem.num_classes, dtype=torch.float64)
    logits[:, 0] = torch.linspace(-12, 12, 25)
    target = torch.zeros(25, dtype=torch.int64)
    _, grads = loss_and_grad(problem.entry.reference, logits, target, reduction="none", **problem.parameters)
    factors = [problem.options[k] for k in ("weight", "sample_weight") if problem.options[k] is not None]
    largest = math.prod(float(f.max()) if f.numel() else 0.0 for f in factors) * float(grads.abs().max())
    if reduction == "mean":
        largest /= float(problem.row_weights().sum()) or 1.0
    computed_in = torch.float64 if problem.logits.dtype == torch.float64 else torch.float32
    return (16 + problem.num_classes) * torch.finfo(computed_in).eps * largest


def assert_close(problem: Problem, actual, expected, reduction: str | None = None) -> None:
    """Compares (loss, gradient) by the tolerances of conftest."""
    dtype = problem.logits.dtype
    (loss, grad), (expected_loss, expected_grad) = actual, ([t.double().cpu() for t in expected])
    assert loss.shape == expected_loss.shape and grad.shape == expected_grad.shape
    error = (loss.double().cpu() - expected_loss).abs()
    assert (error <= LOSS_TOLERANCE[dtype] * (1 + expected_loss.abs())).all()
    if not grad.numel():
        return
    allowed = GRAD_TOLERANCE[dtype] * expected_grad.abs().max() + GRAD_FLOOR[dtype]
    allowed += rounding_of_gradient(problem, reduction or problem.options["reduction"])
    assert ((grad.double().cpu() - expected_grad).abs() <= allowed).all()


@pytest.mark.any_cpu  # test_values.py and test_layouts.py have the kernels of every instruction set
@pytest.mark.parametrize("number", [20, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_float64_reference(name, number, device):
    @examples(number)
    @given(problems(names=[name], dtypes=ALL_DTYPES, grid=False))
    def check(problem):
        exact = {k: v.double() for k, v in problem.options.items() if isinstance(v, torch.Tensor)}
        exact |= {"logits": problem.logits.double(), "upstream": problem.upstream.double()}
        expected = problem.run(problem.entry.reference, **exact)
        assert_close(problem, problem.on(device).run(), expected)

    check()


@of_formulas(150, problem=problems(names=OF_DIFFERENCES))
def test_gradient_of_a_row_sums_to_zero(problem, device):
    _, grad = problem.on(device).run()
    total = grad.double().sum(problem.class_dim).abs().cpu()
    rounding = 4 * torch.finfo(grad.dtype).eps * grad.double().abs().sum(problem.class_dim).cpu()
    assert (total <= rounding + rounding_of_gradient(problem, problem.options["reduction"])).all()


@of_formulas(150, problem=problems(names=OF_DIFFERENCES))
def test_a_constant_added_to_a_row_changes_nothing(problem, device):
    constants = torch.randint(-1000, 1000, problem.target.shape, generator=problem.random)
    shifted = problem.logits + constants.unsqueeze(problem.class_dim)
    problem, shifted = problem.on(device), shifted.to(problem.logits.dtype).to(device)
    assert_close(problem, problem.run(logits=shifted), problem.run())


@of_formulas(150, problem=problems())
def test_classes_can_be_renamed(problem, device):
    order = torch.randperm(problem.num_classes, generator=problem.random).to(device)
    problem = problem.on(device)
    new_name, weight = order.argsort(), problem.options["weight"]
    ignore_index = problem.options["ignore_index"]
    if ignore_index in range(problem.num_classes):
        ignore_index = int(new_name[ignore_index])
    target = torch.where(problem.ignored, ignore_index, new_name[torch.where(problem.ignored, 0, problem.target)])
    renamed = problem.run(
        logits=problem.logits.index_select(problem.class_dim, order),
        target=target,
        weight=None if weight is None else weight[order],
        ignore_index=ignore_index,
    )
    loss, grad = problem.run()
    assert_close(problem, renamed, (loss, grad.index_select(problem.class_dim, order)))


@of_formulas(150, problem=problems(shapes=BATCH | IMAGES, reduction="none"))
def test_rows_are_independent(problem, device):
    rows = len(problem.target)
    order = torch.randperm(rows, generator=problem.random).to(device)
    parts = order.tensor_split([int(torch.randint(0, rows + 1, (), generator=problem.random))])
    problem = problem.on(device)
    pieces = [problem.run(**{name: tensor[part] for name, tensor in problem.per_row.items()}) for part in parts]
    together = [torch.cat(tensors) for tensors in zip(*pieces, strict=True)]
    assert_close(problem, together, [tensor[order] for tensor in problem.run()])


@of_formulas(150, problem=problems(), factor=st.sampled_from([0.125, 0.5, 2.0, 64.0]))
def test_reductions_agree(problem, factor, device):
    problem = problem.on(device)
    rows, grad = problem.run(reduction="none", upstream=torch.ones_like(problem.upstream))
    total = rows.double().sum()
    assert_close(problem, problem.run(reduction="sum"), (total, grad), "sum")
    denominator = problem.row_weights().sum()
    share = 1 / denominator if denominator else 0.0
    mean = (total * share, grad.double() * share)
    assert_close(problem, problem.run(reduction="mean"), mean, "mean")

    scaled = problem.per_row.get("sample_weight", torch.ones_like(problem.upstream)) * factor
    assert_close(problem, problem.run(reduction="mean", sample_weight=scaled), mean, "mean")
    loss, grad_of_scaled = problem.run(reduction="sum", sample_weight=scaled)
    assert_close(problem, (loss.double() / factor, grad_of_scaled.double() / factor), (total, grad), "sum")


@of_formulas(150, problem=problems())
def test_logit_bias_is_an_addition_to_the_target(problem, device):
    problem = problem.on(device)
    biased = problem.logits + problem.one_hot() * float(problem.options["logit_bias"])
    assert_close(problem, problem.run(), problem.run(logits=biased, logit_bias=0.0))


@of_formulas(
    150, problem=problems(names=list(VALUE_RANGE), smoothing=False, shapes=BATCH, reduction="none", weight=None)
)
def test_values_stay_in_their_range_and_reach_its_ends(problem, device):
    low, high = VALUE_RANGE[problem.entry.name](**problem.entry.parameters | problem.parameters)
    problem = problem.on(device)
    logits, one_hot, kept = problem.logits, problem.one_hot(), ~problem.ignored
    tolerance = LOSS_TOLERANCE[logits.dtype] * (1 + (low if high == math.inf else high))
    values, certain, impossible = (
        problem.run(logits=logits + push * one_hot, sample_weight=None)[0][kept] for push in (0, 1000, -1000)
    )
    assert (values >= low - tolerance).all() and (values <= high + tolerance).all()
    assert ((certain - low).abs() <= tolerance).all()
    assert high == math.inf or ((impossible - high).abs() <= tolerance).all()


@of_formulas(
    150, problem=problems(names=list(VALUE_RANGE), smoothing=False, shapes=ROW, weight=None, sample_weight=None)
)
def test_loss_falls_as_the_targets_logit_rises(problem, device):
    problem = problem.on(device)
    cls, steps = int(torch.randint(0, problem.num_classes, (), generator=problem.random)), 60
    logits = problem.logits.expand(steps, -1).clone()
    logits[:, cls] += torch.linspace(-30, 30, steps, dtype=logits.dtype, device=device)
    target = torch.full((steps,), cls, device=device)
    loss, grad = problem.run(
        logits=logits, target=target, ignore_index=-100, reduction="none", upstream=torch.ones_like(logits[:, 0])
    )
    assert (loss.diff() <= LOSS_TOLERANCE[logits.dtype] * (1 + loss[1:].abs())).all()
    rounding = rounding_of_gradient(problem, "none")
    others = torch.arange(problem.num_classes, device=device) != cls
    assert (grad[:, cls] <= rounding).all() and (grad[:, others] >= -rounding).all()


@of_formulas(150, problem=problems(smoothing=False, shapes=BATCH | IMAGES, dtypes=ALL_DTYPES))
def test_rows_of_weight_zero_have_no_gradient_and_no_influence(problem, device):
    problem = problem.on(device)
    idle = problem.row_weights() == 0
    loss, grad = problem.run()
    row_is_idle = idle.unsqueeze(1).expand_as(grad)
    assert (grad[row_is_idle] == 0).all()
    assert problem.options["reduction"] != "none" or (loss[idle] == 0).all()
    other_loss, other_grad = problem.run(logits=torch.where(row_is_idle, -problem.logits + 3, problem.logits))
    assert torch.equal(other_loss, loss) and torch.equal(other_grad, grad)


def in_layout(dense: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The same values with dimensions in another order in memory and with gaps, full of NaN (-1 for integers)."""
    order = torch.randperm(dense.dim(), generator=random).tolist()
    steps = torch.randint(1, 3, (dense.dim(),), generator=random).tolist()
    gap = math.nan if dense.is_floating_point() else -1
    memory = dense.new_full([1 + dense.shape[d] * steps[d] for d in order], gap)
    view = memory.permute([order.index(d) for d in range(dense.dim())])
    return view[tuple(slice(1, None, step) for step in steps)].copy_(dense)


@of_formulas(300, problem=problems(dtypes=ALL_DTYPES, shapes=BATCH | IMAGES))
def test_layout_in_memory_does_not_matter(problem, device):
    problem = problem.on(device)
    moved = {name: in_layout(tensor, problem.random) for name, tensor in problem.per_row.items()}
    assert_close(problem, problem.run(**moved), problem.run())


@examples(40)
@given(problem=problems(shapes=LARGE, dtypes=ALL_DTYPES))
def test_same_bits_every_time_and_for_any_number_of_threads(problem, device):
    problem = problem.on(device)
    results, before = [], torch.get_num_threads()
    for threads in (1, 1, 2, 2, 3, before):
        torch.set_num_threads(threads)
        results.append(problem.run())
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.any_cpu
@pytest.mark.parametrize("identity", IDENTITIES)
def test_losses_that_contain_each_other(identity, device):
    @examples(20)
    @given(problem=problems(names=["mae"]), x=st.floats(0.1, 4.0))
    def check(problem, x):
        name, parameters, parts = IDENTITIES[identity](x)
        problem = replace(problem, entry=fl.LOSSES[name], parameters=parameters).on(device)
        others = [(c, replace(problem, entry=fl.LOSSES[other], parameters=theirs)) for c, other, theirs in parts]
        terms = [[c * tensor.double() for tensor in other.run()] for c, other in others]
        assert_close(problem, problem.run(), [sum(column) for column in zip(*terms, strict=True)])

    check()


@of_formulas(150, problem=problems(names=["cross_entropy"], logit_bias=0.0, ignore_index=-100, reduction="none"))
def test_cross_entropy_is_linear_in_class_probabilities(problem, device):
    share = float(torch.rand((), generator=problem.random))
    problem = replace(problem, target=problem.target % problem.num_classes).on(device)
    one_hot, noise = problem.one_hot(), torch.randn(problem.logits.shape, generator=problem.random)
    other = noise.to(one_hot).softmax(problem.class_dim)
    labels = problem.run()
    assert_close(problem, problem.run(target=one_hot), labels)
    ends = zip(labels, problem.run(target=other), strict=True)
    expected = [share * at_labels.double() + (1 - share) * at_other.double() for at_labels, at_other in ends]
    assert_close(problem, problem.run(target=share * one_hot + (1 - share) * other), expected)
