"""Every wrong argument is refused with a message that names it, its rule and the value given."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import fused_losses as fl
from fused_losses._common import Criterion
from fused_losses._parameters import OrNone, OrTensor, Range, one_of

pytestmark = pytest.mark.any_cpu  # errors

NAMES = list(fl.LOSSES)
RANGES = {
    (name, parameter): rule.range if isinstance(rule, OrNone | OrTensor) else rule
    for name, entry in fl.LOSSES.items()
    for parameter, rule in entry.ranges.items()
    if isinstance(rule, Range | OrNone | OrTensor)
}
PARAMETERS = list(RANGES)
INDEX_ONLY = [name for name in NAMES if name != "cross_entropy"]


@pytest.fixture
def problem(device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, generator=generator).to(device), torch.tensor([0, 1, 2, 0], device=device)


def outside(name: str, parameter: str) -> list[float]:
    """Numbers around and beyond the ends of all the ranges in use, less those this parameter allows."""
    candidates = [math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 1.0, 1.5, 1.0 + 1e-9]
    allowed = RANGES[name, parameter].holds
    return [value for value in candidates if not allowed(value)]


def test_ranges_are_the_documented_ones():
    def allows(name, parameter, *values):
        return [RANGES[name, parameter].holds(v) for v in values]

    for name, parameter in PARAMETERS:
        assert allows(name, parameter, math.nan, math.inf, -math.inf) == [False] * 3
        assert -math.inf < RANGES[name, parameter].low < 0 or allows(name, parameter, -1.0) == [False]
    for name, parameter in [
        ("mae", "scale"), ("gce", "q"), ("agce", "a"), ("agce", "q"), ("aue", "q"), ("ae", "a"), ("rce", "A"),
        ("bounded_ce", "a"), ("ngce", "q"), ("nce_mae", "mae_scale"), ("nce_rce", "A"), ("nfl_mae", "mae_scale"),
        ("nfl_rce", "A"), ("nce_agce", "a"), ("nce_agce", "q"), ("bi_tempered", "t2"),
    ]:  # fmt: skip
        assert allows(name, parameter, 0.0, 1e-9, 7.0) == [False, True, True]
    sums = [(name, weight) for name in NAMES for weight in ("alpha", "beta") if (name, weight) in RANGES]
    assert len(sums) >= 12
    for name, parameter in [
        *sums, ("focal", "gamma"), ("nfl", "gamma"), ("nfl_mae", "gamma"), ("nfl_rce", "gamma"), ("hem", "margin"),
        ("multi_margin", "margin"),
    ]:  # fmt: skip
        assert allows(name, parameter, 0.0, 7.0) == [True, True]
    for name, parameter in [("aue", "a"), ("phuber_ce", "tau")]:
        assert allows(name, parameter, 1.0, 1.0 + 1e-9) == [False, True]
    assert allows("js", "pi", 0.0, 0.5, 1.0) == [False, True, False]
    for name, parameter in [("taylor_ce", "order"), ("bi_tempered", "num_iters")]:
        assert allows(name, parameter, 0, 1, 1.5, 2, 2.0) == [False, True, False, True, True]
    for name, parameter in [
        ("cross_entropy", "label_smoothing"), ("bi_tempered", "label_smoothing"), ("bi_tempered", "t1"),
    ]:  # fmt: skip
        assert allows(name, parameter, 0.0, 1.0, 1.0 + 1e-9) == [True, True, False]


@pytest.mark.parametrize("name, parameter", PARAMETERS)
def test_hyper_parameter_out_of_range(name, parameter, problem):
    entry = fl.LOSSES[name]
    assert outside(name, parameter)
    for value in outside(name, parameter):
        message = rf"^{parameter} must (satisfy|be) .*[0-9].*, got {value}$"
        for made in (entry.function, entry.reference):
            with pytest.raises(ValueError, match=message):
                made(*problem, **{parameter: value})
        with pytest.raises(ValueError, match=message):
            entry.module(**{parameter: value})
        module = entry.module()
        setattr(module, parameter, value)
        with pytest.raises(ValueError, match=message):
            module(*problem)


@pytest.mark.parametrize("name, parameter", PARAMETERS)
def test_hyper_parameter_is_no_number(name, parameter, problem):
    entry = fl.LOSSES[name]
    rule = entry.ranges[parameter]
    none = [] if isinstance(rule, OrNone) else [None]
    for value in ("1.5", [1.5], *none):
        message = f"^{parameter} must be a number, got {type(value).__name__}$"
        for made in (entry.function, entry.reference):
            with pytest.raises(TypeError, match=message):
                made(*problem, **{parameter: value})
        with pytest.raises(TypeError, match=message):
            entry.module(**{parameter: value})
    if isinstance(rule, OrTensor):
        return
    for tensor, message in [
        (torch.ones(3), "Tensor; class weights are given as weight=$"),
        (torch.ones(1, 1), "Tensor$"),
        (torch.tensor(1.0, device="meta"), "Tensor$"),
        (torch.tensor(1j), "Tensor$"),
        (torch.tensor(1.0, requires_grad=True), "a tensor that requires a gradient, and would get none$"),
    ]:
        for call in (entry.module, lambda **given: entry.function(*problem, **given)):
            with pytest.raises(TypeError, match=f"^{parameter} must be a number, got {message}"):
                call(**{parameter: tensor})


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keyword(name, problem):
    entry = fl.LOSSES[name]
    for made in (entry.function, entry.reference):
        with pytest.raises(TypeError, match=rf"^{made.__name__}\(\) got an unexpected keyword argument 'nonsense'"):
            made(*problem, nonsense=1.0)
    with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'nonsense'") as raised:
        entry.module(nonsense=1.0)
    assert str(raised.value).startswith(entry.module.__name__)


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("num_classes", "the logits tell"),
        ("scale", "multiply the loss"),
        ("size_average", "reduction"),
        ("alpha", "weight"),
        ("pos_weight", "weight, one number per class"),
    ],
)
def test_keywords_of_other_implementations_are_explained(keyword, hint, problem):
    for call in (fl.GCELoss, lambda **given: fl.functional.gce_loss(*problem, **given)):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'; .*{hint}"):
            call(**{keyword: 1})


def test_what_z_error_losses_judge_by_has_two_names():
    assert fl.ZErrorBCEWithLogitsLoss(space="prob") and fl.ZErrorCrossEntropyLoss(statistic="prob")
    with pytest.raises(TypeError, match=r"keyword argument 'statistic'; the Z-Error losses .* as space$"):
        fl.ZErrorBCEWithLogitsLoss(statistic="prob")
    for kind in (fl.ZErrorCrossEntropyLoss, fl.ZMSELoss):
        with pytest.raises(TypeError, match=r"keyword argument 'space'; the other Z-Error losses call it statistic$"):
            kind(space="prob")


@pytest.mark.parametrize("kind", [fl.ZErrorBCEWithLogitsLoss, fl.ZMSELoss])
@pytest.mark.parametrize(
    ("keyword", "hint"), [("weight", "sample_weight, in the call"), ("ignore_index", "a missing label is NaN")]
)
def test_options_of_class_labels_are_explained_by_other_losses(keyword, hint, kind):
    x = torch.tensor([0.0, 1.0])
    function = {fl.ZMSELoss: "z_mse_loss", fl.ZErrorBCEWithLogitsLoss: "z_error_bce_with_logits"}[kind]
    for call in (kind, partial(getattr(fl.functional, function), x, x), partial(getattr(fl.reference, function), x, x)):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'; .*{hint}$"):
            call(**{keyword: x})
    # What the messages name does what they say.
    assert float(kind()(x, x, sample_weight=torch.zeros(2))) == 0.0
    assert torch.equal(kind(reduction="sum")(x, torch.tensor([0.0, torch.nan])), kind(reduction="sum")(x[:1], x[:1]))


LOSS_MODULES = [made for made in vars(fl).values() if isinstance(made, type) and issubclass(made, Criterion)]
FUNCTIONS = [
    getattr(made, name)
    for made in (fl.functional, fl.reference)
    for name in fl.functional.__all__
    if hasattr(made, name) and name not in ("linear_loss", "mixed", "row_statistics")  # these hand them on, or are none
]


HANDING_ON = {  # their options to the loss inside
    fl.LinearLoss: (3, 3, "gce"), fl.LogitClip: ("gce", 1.0), fl.LogitNorm: ("gce",), fl.Antidote: ("gce", 0.5),
    fl.ClippedLoss: ("gce", 0.5), fl.SmallLoss: ("gce", 0.5), fl.SuperLoss: ("gce",),
}  # fmt: skip


@pytest.mark.parametrize("made", [*LOSS_MODULES, *FUNCTIONS], ids=lambda made: f"{made.__module__}.{made.__name__}")
def test_every_loss_explains_foreign_keywords(made, problem):
    arguments = HANDING_ON.get(made, () if isinstance(made, type) else problem)
    name = "GCELoss" if made in HANDING_ON else made.__name__
    for keyword, hint in [("size_average", "; reduction='mean' or 'sum'"), ("reduce", "; reduction='none'"), ("x", "")]:
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{keyword}'{hint}$"):
            made(*arguments, **{keyword: True})


@pytest.mark.parametrize("value", [None, "1", 1.5, True])
def test_ignore_index(value, problem):
    logits, target = problem
    for call in (
        lambda: fl.functional.gce_loss(logits, target, ignore_index=value),
        lambda: fl.reference.gce_loss(logits, target, ignore_index=value),
        lambda: fl.GCELoss(ignore_index=value),
        lambda: fl.ZErrorCrossEntropyLoss(ignore_index=value),
        lambda: fl.ELRLoss(4, 3, ignore_index=value),
        lambda: fl.GJSLoss((0.5, 0.5), ignore_index=value),
        lambda: fl.ForwardCorrectionLoss(torch.eye(3), ignore_index=value),
        lambda: fl.functional.forward_correction_loss(logits, target, torch.eye(3), ignore_index=value),
        lambda: fl.row_statistics(logits, target, ignore_index=value),
    ):
        with pytest.raises(TypeError, match=f"^ignore_index must be an integer, got {value!r}$"):
            call()


@pytest.mark.parametrize("name", INDEX_ONLY)
def test_options_are_keywords(name, problem):
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        fl.LOSSES[name].function(*problem, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_reduction(name, problem):
    entry = fl.LOSSES[name]
    allowed = one_of(entry.reductions)
    message = f"reduction must be {allowed}, got 'average'"
    none = [] if name == "multi_margin" else [None]  # multi_margin's default
    for made in (entry.function, entry.reference):
        with pytest.raises(ValueError, match=message):
            made(*problem, reduction="average")
        for reduction in (1, *none):
            with pytest.raises(ValueError, match=rf"reduction must be {allowed}, got {reduction!r}"):
                made(*problem, reduction=reduction)
    for reduction in ("average", 1, *none):
        with pytest.raises(ValueError, match=rf"reduction must be {allowed}, got {reduction!r}"):
            entry.module(reduction=reduction)
    module = entry.module()
    module.reduction = "average"
    with pytest.raises(ValueError, match=message):
        module(*problem)


@pytest.mark.parametrize("name", NAMES)
def test_logit_bias(name, problem):
    entry = fl.LOSSES[name]
    for value, error, message in [
        ("big", ValueError, "logit_bias must be a number, a 0-dim tensor or \"auto\", got 'big'"),
        (math.nan, ValueError, "logit_bias must satisfy -inf < value < inf, got nan"),
        (math.inf, ValueError, "logit_bias must satisfy -inf < value < inf, got inf"),
        (True, TypeError, "logit_bias must be a number, got bool"),
        (None, TypeError, "logit_bias must be a number, got NoneType"),
        (torch.ones(3), ValueError, r"logit_bias must be a .* 0-dim floating point tensor, got .*\[?\(?3"),
        (torch.tensor(2), ValueError, "logit_bias must be a .* 0-dim floating point tensor, got .*(Long|int64)"),
    ]:
        with pytest.raises(error, match=message):
            entry.function(*problem, logit_bias=value)
        with pytest.raises(error, match=message):
            entry.module(logit_bias=value)


@pytest.mark.parametrize("name", NAMES)
def test_target(name, problem):
    logits, target = problem
    function = fl.LOSSES[name].function
    for dtype, shown in [(torch.float32, "Float"), (torch.bool, "Bool"), (torch.int8, "Char")]:
        with pytest.raises(RuntimeError, match=rf"{name}: expected target dtype to be Long or Byte.*got {shown}"):
            function(logits, target.to(dtype))
    with pytest.raises(RuntimeError, match=r"Expected floating point type for target with class prob.*got Long"):
        function(logits, target.unsqueeze(1).expand(4, 3))
    with pytest.raises(ValueError, match=r"Expected input batch_size \(4\) to match target batch_size \(3\)"):
        function(logits, target[:3])
    with pytest.raises(RuntimeError, match=r"Expected target size \[4\] for logits of shape \[4, 3\], got \[4, 1\]"):
        function(logits, target.unsqueeze(1))
    with pytest.raises(RuntimeError, match=r"Expected target size \[4, 2\] .* got \[4, 3\]"):
        function(logits.unsqueeze(2).expand(4, 3, 2), target.unsqueeze(1).expand(4, 3))
    with pytest.raises(RuntimeError, match=r"Expected target size \[\] for logits of shape \[3\], got \[4\]"):
        function(logits[0], target)
    with pytest.raises(RuntimeError, match=r"target must be on the device of logits .*, got meta"):
        function(logits, target.to("meta"))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'target'"):
        function(logits)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_target_out_of_range(name, requires_grad):
    # On the CPU only: on a GPU a device assertion fails, after which the process cannot use it any more.
    logits = torch.randn(4, 3, requires_grad=requires_grad)
    for reduction in ("mean", "none"):
        for wrong, dtype in [(3, torch.uint8), (-1, torch.int16), (-99, torch.int32), (2**40, torch.int64)]:
            target = torch.tensor([0, -100 % 256 if dtype == torch.uint8 else -100, wrong, 9], dtype=torch.int64)
            message = rf"target must be in \[0, 3\) or equal ignore_index=.*: Target {wrong} is out of bounds \(row 2\)"
            ignore_index = int(target[1])
            with pytest.raises(IndexError, match=message):
                fl.LOSSES[name].function(logits, target.to(dtype), reduction=reduction, ignore_index=ignore_index)


@pytest.mark.parametrize("name", NAMES)
def test_the_bad_row_is_found_in_a_large_batch(name):
    target = torch.zeros(100_000, dtype=torch.int64)
    target[[77_777, 99_999]] = 2
    with pytest.raises(IndexError, match=r"Target 2 is out of bounds \(row 77777\)"):
        fl.LOSSES[name].function(torch.zeros(100_000, 2), target)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, problem):
    logits, target = problem
    function = fl.LOSSES[name].function
    for dtype, shown in [(torch.int64, "Long"), (torch.bool, "Bool"), (torch.complex64, "ComplexFloat")]:
        message = f"{name}: logits must be float64, float32, float16 or bfloat16, got {shown}"
        with pytest.raises(RuntimeError, match=message):
            function(logits.to(dtype), target)
    with pytest.raises(RuntimeError, match=r"logits must have shape \(C,\), \(N, C\) .*, got a scalar"):
        function(logits[0, 0], target[0])
    for no_classes, labels in [(logits[:, :0], target), (logits[0, :0], target[0]), (logits[:0, :0], target[:0])]:
        with pytest.raises(ValueError, match="logits must have at least one class, got shape"):
            function(no_classes, labels)
    for error in (TypeError, RuntimeError):  # as torch's functions and as its operators
        with pytest.raises(error, match=rf"^{name}: logits must be a Tensor, got list$"):
            function([[0.0, 1.0]], target)
        with pytest.raises(error, match=rf"^{name}: target must be a Tensor, got ndarray$"):
            function(logits, target.cpu().numpy())


@pytest.mark.parametrize("name", NAMES)
def test_weights(name, problem):
    logits, target = problem
    function = fl.LOSSES[name].function
    for shape in [(2,), (3, 1), ()]:
        message = r"weight tensor should be defined either for all 3 classes or no classes but got .* of shape \["
        with pytest.raises(RuntimeError, match=message):
            function(logits, target, weight=torch.ones(shape, device=logits.device))
    with pytest.raises(RuntimeError, match=r"weight must be a floating point tensor .*, got Long"):
        function(logits, target, weight=torch.ones(3, dtype=torch.int64, device=logits.device))
    with pytest.raises(RuntimeError, match=r"weight must be a floating point tensor on the device .* on meta"):
        function(logits, target, weight=torch.ones(3, device="meta"))
    for shape in [(3,), (4, 1), ()]:
        with pytest.raises(RuntimeError, match=r"sample_weight must have one entry per row, shape \[4\], got \["):
            function(logits, target, sample_weight=torch.ones(shape, device=logits.device))
    with pytest.raises(RuntimeError, match=r"sample_weight must be a floating point tensor .*, got Int"):
        function(logits, target, sample_weight=torch.ones(4, dtype=torch.int32, device=logits.device))
    for option in ("weight", "sample_weight"):
        for call in (function, fl.LOSSES[name].reference):
            with pytest.raises(TypeError, match=rf": {option} must be a Tensor.*, got list"):
                call(logits, target, **{option: [1.0, 1.0, 1.0, 1.0]})
    with pytest.raises(TypeError, match="buffer 'weight'"):
        fl.LOSSES[name].module(weight=[1.0, 1.0, 1.0])
    with pytest.raises(TypeError, match=r"^ignore_index must be an integer, got 1\.5"):
        function(logits, target, ignore_index=1.5)


@pytest.mark.parametrize("name", [name for name in NAMES if not fl.LOSSES[name].takes_probabilities])
def test_losses_without_probabilities_say_which_have_them(name, problem):
    logits, _ = problem
    message = (
        rf"{name}: target must hold class indices of shape \[4\]; class probabilities are taken by cross_entropy, mae, "
        r".*nce_agce.*, got shape \[4, 3\]; one-hot labels are passed as class indices, target.argmax\(1\)"
    )
    with pytest.raises(RuntimeError, match=message):
        fl.LOSSES[name].function(logits, torch.softmax(logits, 1))


def test_probabilities_exclude_what_needs_a_target_class(problem):
    logits, _ = problem
    probabilities = torch.softmax(logits, 1)
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target, got 1"):
        fl.functional.cross_entropy(logits, probabilities, ignore_index=1)
    for bias in (1.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="logit_bias is not supported for class probabilities"):
            fl.functional.cross_entropy(logits, probabilities, logit_bias=bias)
    with pytest.raises(ValueError, match="logit_bias is not supported for class probabilities"):
        fl.functional.cross_entropy(logits.repeat(1, 4), probabilities.repeat(1, 4) / 4, logit_bias="auto")


@pytest.mark.parametrize("made", ["function", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_no_word_stands_for_the_default_reduction(name, made, problem):
    for reduction in ("", "default", "Mean"):
        with pytest.raises(ValueError, match=rf"reduction must be .*, got '{reduction}'"):
            getattr(fl.LOSSES[name], made)(*problem, reduction=reduction)


def test_other_options_that_are_no_tensors(problem):
    logits, target = problem
    functional, wrong = fl.functional, [1.0, 1.0, 1.0, 1.0]
    for option, call in [
        ("weight", lambda: functional.z_error_cross_entropy(logits, target, weight=wrong)),
        ("sample_weight", lambda: functional.z_error_cross_entropy(logits, target, sample_weight=wrong)),
        ("pos_weight", lambda: functional.z_error_bce_with_logits(logits, logits > 0, pos_weight=wrong)),
        ("weight", lambda: functional.mixed("gce", logits, target, target, 0.3, weight=wrong)),
        ("sample_weight", lambda: functional.mixed("hem", logits, target, target, 0.3, sample_weight=wrong)),
    ]:
        with pytest.raises(TypeError, match=rf"{option} must be a Tensor, got list"):
            call()
