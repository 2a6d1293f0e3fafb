"""What a criterion remembers: its shape, its life in copies, checkpoints and inference mode, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # what a criterion remembers

ROWS, CLASSES = 60, 4
MAKE = {
    "ce": lambda **options: fl.ZErrorCrossEntropyLoss(1.5, running=True, **options),
    "bce": lambda **options: fl.ZErrorBCEWithLogitsLoss(1.5, running=True, **options),
    "mse": lambda **options: fl.ZMSELoss(1.5, running=True, **options),
    "mse_per_task": lambda **options: fl.ZMSELoss(1.5, running=True, per_task=True, **options),
}
FIXED = {
    "ce": {"num_classes": CLASSES},
    "bce": {"num_tasks": CLASSES},
    "mse": {},
    "mse_per_task": {"num_tasks": CLASSES},
}
GROUPS = {"ce": CLASSES, "bce": 2 * CLASSES, "mse": 1, "mse_per_task": CLASSES}
KINDS = list(MAKE)


def batch(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, CLASSES, generator=generator)
    if kind == "ce":
        return x, torch.arange(ROWS) % CLASSES
    noise = torch.randn(ROWS, CLASSES, generator=generator)
    return x, (noise > 0).float() if kind == "bce" else noise


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_number_fixes_the_shape_from_the_start(kind):
    module = MAKE[kind](**FIXED[kind])
    assert module.running_moments.shape == (3, GROUPS[kind])
    averaged = AveragedModel(module, use_buffers=True)
    module(*batch(kind))
    averaged.update_parameters(module)
    averaged.update_parameters(module)
    torch.testing.assert_close(averaged.module.running_moments, module.running_moments)
    resumed = MAKE[kind](**FIXED[kind])
    for name, buffer in resumed.state_dict().items():  # in place, as a distributed checkpoint does it
        buffer.copy_(module.state_dict()[name])
    assert torch.equal(resumed.running_moments, module.running_moments)
    resumed.load_state_dict({"running_moments": torch.zeros_like(kept := resumed.running_moments)})  # graphs read it
    assert resumed.running_moments is kept and not kept.any()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_call_in_inference_mode_does_not_spoil_later_ones(kind, fixed):
    module, other = (MAKE[kind](**(FIXED[kind] if fixed else {})) for _ in range(2))
    with torch.inference_mode():
        module(*batch(kind))
    other(*batch(kind))
    x, y = batch(kind, seed=1)
    for criterion in (module, other):
        criterion(x.clone().requires_grad_(), y).backward()
    assert torch.equal(module.running_moments, other.running_moments)


WITH_MEAN = {
    "small": lambda: fl.SmallLoss("cross_entropy", 0.5, running=True),
    "antidote": lambda: fl.Antidote("cross_entropy", 0.4, running=True),
    "super": lambda: fl.SuperLoss("cross_entropy", running=True),
    "ce_of_rows": lambda: fl.ZErrorCrossEntropyLoss(1.5, running=True, reduction="none"),
    "gce_in_float16": lambda: fl.ZErrorCrossEntropyLoss(1.5, running=True, base="gce", statistic="prob"),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *WITH_MEAN])
def test_a_recomputation_does_not_learn_again(kind, large, reentrant):
    """Small calls take a way of their own, and a checkpoint wants the same tensors to be saved the second time."""
    twice, once = ((MAKE.get(kind) or WITH_MEAN[kind])() for _ in range(2))
    for seed in range(3):
        x, y = batch(kind if kind in MAKE else "ce", seed)
        x = x.to(torch.float16 if kind == "gce_in_float16" else x.dtype)
        x, y = (t.repeat((80, 1)[: t.dim()] if t.dim() > 1 else 80) if large else t for t in (x, y))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        losses = once(leaves[0], y), checkpoint(twice, leaves[1], y, use_reentrant=reentrant)
        for loss in losses:
            loss.sum().backward()
        assert torch.equal(*losses) and torch.equal(leaves[0].grad, leaves[1].grad)
        assert torch.equal(twice.running_moments, once.running_moments)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_are_handed_in_learn(kind):
    """As in functional training loops; the Module itself learns nothing, as BatchNorm."""
    module, other = (MAKE[kind](**FIXED[kind]) for _ in range(2))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for seed in range(2):
        torch.func.functional_call(module, buffers, batch(kind, seed))
        other(*batch(kind, seed))
    assert torch.equal(buffers["running_moments"], other.running_moments) and not module.running_moments.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_learns_only_into_statistics_of_known_shape(kind):
    """The first replica of DataParallel shares its buffers with the Module, as far as they stay the same tensors."""
    module = MAKE[kind](**FIXED[kind])
    module._replicate_for_data_parallel()(*batch(kind))
    assert module.running_moments.any()
    if MAKE[kind]().running_moments.numel() == 0:
        message = r"with running=True cannot learn in a replica .*: give num_classes \(num_tasks\), or call it once$"
        with pytest.raises(RuntimeError, match=message):
            MAKE[kind]()._replicate_for_data_parallel()(*batch(kind))


def test_more_than_a_thousand_classes():
    module = fl.ZErrorCrossEntropyLoss(running=True, num_classes=21_841)
    assert module(torch.randn(4, 21_841), torch.arange(4)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_eval_judges_by_the_batch(kind):
    x, y = batch(kind)
    for options in ({}, FIXED[kind]):
        module = MAKE[kind](**options).eval()
        plain = MAKE[kind](**options)
        plain.running = False
        torch.testing.assert_close(module(x, y), plain(x, y))
        assert module(x, y) > 0
        assert not module.running_moments.any()


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_is_refused(kind):
    module = MAKE[kind](**FIXED[kind])
    if kind == "mse":
        return
    x, y = batch(kind)
    called = "classes" if kind == "ce" else "tasks"
    with pytest.raises(ValueError, match=f"those of {CLASSES} {called}, got a batch with 3"):
        module(x[:, :3], y.clamp(max=2) if kind == "ce" else y[:, :3])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda m: m[:, :3], r"have shape \(3, 4\), got \(3, 3\)"),
        (lambda m: m[:2], r"have shape \(3, 4\), got \(2, 4\)"),
        (lambda m: m[0], r"have shape \(3, 4\), got \(4,\)"),
        (lambda m: torch.full_like(m, math.nan), "hold finite means"),
        (lambda m: torch.full_like(m, math.inf), "hold finite means"),
        (lambda m: -m.abs() - 1, "hold finite means"),
    ],
)
def test_moments_that_cannot_be_are_refused_at_load(spoil, message):
    module = fl.ZErrorCrossEntropyLoss(running=True, num_classes=CLASSES)
    module(*batch("ce"))
    kept = module.running_moments.clone()
    state = module.state_dict()
    state["running_moments"] = spoil(state["running_moments"])
    with pytest.raises(RuntimeError, match=f"running_moments must {message}"):
        module.load_state_dict(state, strict=False)
    assert torch.equal(module.running_moments, kept)


@pytest.mark.parametrize("wild", [1e200, math.inf, math.nan])
def test_a_wild_batch_is_forgotten(wild):
    module, sane = (fl.ZErrorCrossEntropyLoss(1.5, running=True, num_classes=CLASSES) for _ in range(2))
    x, y = (t.double() if t.is_floating_point() else t for t in batch("ce"))
    bad = x.clone()
    bad[0, 0] = wild
    for criterion in (module, sane):
        criterion(x, y)
    module(bad, y)
    assert module.running_moments.isfinite().all()
    for seed in range(3):
        x, y = batch("ce", seed)
        results = [criterion(x.double(), y, return_mask=True) for criterion in (module, sane)]
        assert results[0].loss.isfinite() and not results[0].mask.all()


def test_a_memory_that_is_no_number_recovers():
    module = fl.ZErrorCrossEntropyLoss(1.5, running=True, num_classes=CLASSES)
    module.running_moments.fill_(math.nan)
    fresh = fl.ZErrorCrossEntropyLoss(1.5, running=True, num_classes=CLASSES)
    torch.testing.assert_close(module(*batch("ce")), fresh(*batch("ce")))
    assert torch.equal(module.running_moments, fresh.running_moments)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_apply_is_no_attribute(kind):
    assert hasattr(MAKE[kind](), "running_statistics")
    module = MAKE[kind]()
    module.running = False
    assert not hasattr(module, "running_statistics")
    for loss in (module, fl.SmallLoss("gce", 0.5), copy.deepcopy(module)):
        with pytest.raises(AttributeError, match=r"^\w+Loss has running_statistics only with running=True$"):
            loss.running_statistics  # noqa: B018
    late = fl.SmallLoss("gce", 0.5)
    late.running = True
    with pytest.raises(AttributeError, match=r"^SmallLoss has running_moments only if it was made with running=True$"):
        late(torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    module = MAKE[kind](**FIXED[kind])
    module(*batch(kind))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)]
    expected = module(*batch(kind, 1))
    for other in copies:
        torch.testing.assert_close(other(*batch(kind, 1)), expected)


def test_a_copy_shares_the_process_group_and_a_pickle_says_what_to_do(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        parallel = fl.parallel.ClassParallel(fl.GCELoss(), group, 0, 3)
        for module in (fl.ZErrorCrossEntropyLoss(process_group=group), fl.GlobalMean(fl.HEMLoss(), group), parallel):
            module(torch.zeros(2, 3), torch.tensor([0, 2]))
            assert copy.deepcopy(module).process_group is group
            assert copy.deepcopy(torch.nn.Sequential(module))[0].process_group is group
            with pytest.raises(TypeError, match=r"cannot be pickled with its process_group.*state_dict"):
                pickle.dumps(module)
            module.process_group = None
            assert pickle.loads(pickle.dumps(module)).process_group is None
        for name, value in {"first_class": 0.5, "num_classes": 0}.items():
            with pytest.raises((TypeError, ValueError), match=f"{name} must .*got {value}"):
                setattr(parallel, name, value)
        parallel.first_class = 1  # what ranks have agreed upon is asked again
        with pytest.raises(ValueError, match=r"\[1, 4\) of 3"):
            parallel(torch.zeros(2, 3), torch.tensor([0, 2]))
    finally:
        torch.distributed.destroy_process_group()


def test_a_tensor_stays_one_and_keeps_its_digits():
    """Others hold on to it: schedules, compiled code, graphs."""
    scheduled = fl.ZErrorCrossEntropyLoss()
    schedule = fl.ThresholdSchedule(scheduled, end=1.0, steps=7)
    schedule.step()
    given = fl.SmallLoss("gce", keep=torch.tensor(0.7))
    for module, name in ((scheduled, "threshold"), (given, "keep"), (fl.HEMLoss(torch.tensor(0.3)), "margin")):
        with pytest.raises(TypeError, match=rf"{name} is a tensor here.*got 2.0: {name}.fill_\(2.0\) changes it"):
            setattr(module, name, 2.0)
    for half in (torch.Tensor.half, torch.Tensor.bfloat16):
        assert scheduled._apply(half).threshold.item() == schedule.value
        assert given._apply(half).keep == torch.tensor(0.7)


# ---- nothing that could not be judged is a perfect loss --------------------------------------------------------------


def test_a_single_row_has_its_squared_error():
    for statistic in ("target", "loss", "residual"):
        result = fl.ZMSELoss(statistic=statistic)(torch.tensor([1.0]), torch.tensor([3.0]), return_mask=True)
        assert result.loss == 4.0 and result.mask.all() and result.scores.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soft_labels_count(dtype):
    torch.manual_seed(0)
    x = torch.randn(64, dtype=dtype)
    label = torch.full((64,), 0.9, dtype=dtype)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x.double(), label.double())
    loss = fl.ZErrorBCEWithLogitsLoss(100.0)(x, label)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    mixed = torch.rand(64, dtype=torch.float64)
    weight = torch.tensor(2.5, dtype=torch.float64)
    leaf = x.double().requires_grad_()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(leaf, mixed, pos_weight=weight)
    actual = fl.functional.z_error_bce_with_logits(leaf, mixed, threshold=100.0, pos_weight=weight)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (actual, expected)))


def test_the_nearer_of_zero_and_one_is_the_class():
    x = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
    soft = torch.tensor([0.6, 1.0, 0.51, 0.5, 0.0, 0.49])
    kept = [fl.functional.z_error_bce_with_logits(x, y, threshold=0.5, return_mask=True) for y in (soft, soft.round())]
    assert torch.equal(kept[0].mask, kept[1].mask)
    torch.testing.assert_close(kept[0].scores, kept[1].scores)


@pytest.mark.parametrize("label", [-1.0, 1.0001, 2.0, -1e-9, math.inf, -math.inf])
def test_other_labels_are_refused(label):
    x, y = torch.randn(2, 20_000)
    y = (y > 0).float()
    y[15_000] = label
    for requires_grad in (False, True):
        with pytest.raises(ValueError, match=r"target must be in \[0, 1\], or NaN .*, got .* \(entry 15000\)"):
            fl.functional.z_error_bce_with_logits(x.clone().requires_grad_(requires_grad), y)
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\]"):
        fl.ZErrorBCEWithLogitsLoss(running=True)(x, y)


@pytest.mark.parametrize("make", [fl.ZErrorCrossEntropyLoss, fl.ZErrorBCEWithLogitsLoss])
def test_rows_alone_in_their_class_are_kept_by_default(make):
    if make is fl.ZErrorCrossEntropyLoss:
        x, y = torch.randn(5, 1000), torch.arange(5)
    else:
        x, y = torch.randn(2), torch.tensor([0.0, 1.0])
    result = make()(x, y, return_mask=True)
    assert result.mask.all() and result.scores.isnan().all() and result.loss > 0
    assert not make(small_class="drop")(x, y, return_mask=True).mask.any()


# ---- more than one column --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["target", "loss", "residual"])
@pytest.mark.parametrize("shape", [(50, 3), (20, 3, 5), (10, 3, 2, 4)])
def test_mse_per_task_is_each_task_alone(shape, statistic):
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 100.0, 1e4]).view(3, *[1] * (len(shape) - 2))
    y = torch.randn(shape) * scale
    x = (y + torch.randn(shape) * scale).requires_grad_()
    weight = torch.rand(shape)
    options = {"threshold": 1.2, "statistic": statistic, "reduction": "none", "return_mask": True}
    result = fl.functional.z_mse_loss(x, y, per_task=True, sample_weight=weight, **options)
    plain = fl.reference.z_mse_loss(x, y, per_task=True, sample_weight=weight, **options)
    assert result.loss.shape == result.mask.shape == result.scores.shape == shape
    for task in range(3):
        alone = fl.functional.z_mse_loss(x[:, task], y[:, task], sample_weight=weight[:, task], **options)
        for mine, theirs, other in zip(result, alone, plain, strict=True):
            torch.testing.assert_close(mine[:, task], theirs)
            torch.testing.assert_close(mine[:, task], other[:, task], check_dtype=False)
    assert not result.mask[:, 0].all()  # pooled, the small scale hides nothing
    grads = [torch.autograd.grad(r.loss.sum(), x)[0] for r in (result, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(40, 1, 3), (20, 1, 4, 5), (30, 2), (10, 2, 3, 4)])
def test_binary_tasks_of_any_trailing_shape(shape):
    torch.manual_seed(0)
    x, y = torch.randn(shape), (torch.randn(shape) > 0).float()
    result = fl.functional.z_error_bce_with_logits(x, y, threshold=1.1, return_mask=True, reduction="none")
    for task in range(shape[1]):
        alone = fl.functional.z_error_bce_with_logits(
            x[:, task].flatten(), y[:, task].flatten(), threshold=1.1, return_mask=True, reduction="none"
        )
        assert torch.equal(result.mask[:, task].flatten(), alone.mask)
        torch.testing.assert_close(result.loss[:, task].flatten(), alone.loss)


# ---- the bias is for training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(fl.LOSSES))
def test_eval_leaves_the_bias_out(name):
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.randint(0, 5, (20,))
    function, module = fl.LOSSES[name].function, fl.LOSSES[name].module(logit_bias=1.0)
    torch.testing.assert_close(module(x, y), function(x, y, logit_bias=1.0))
    module.eval()
    torch.testing.assert_close(module(x, y), function(x, y))
    z = fl.ZErrorCrossEntropyLoss(1.5, "loss", base=fl.LOSSES[name].module(logit_bias=1.0))
    plain = fl.ZErrorCrossEntropyLoss(1.5, "loss", base=fl.LOSSES[name].module())
    assert not torch.equal(z(x, y), plain(x, y))
    torch.testing.assert_close(z.eval()(x, y), plain.eval()(x, y))


def test_a_tracker_refuses_a_state_of_other_numbers():
    state = fl.OutlierTracker(3).state_dict()
    for name, wrong in (
        ("counts", state["counts"].double()),
        ("counts", state["counts"] - 1),
        ("sums", state["sums"].float()),
        ("sums", state["sums"] * math.nan),
    ):
        tracker = fl.OutlierTracker(3)
        with pytest.raises(ValueError, match=r"^state_dict must hold (counts|sums)"):
            tracker.load_state_dict({**state, name: wrong})
        assert not tracker.times_seen.any() and tracker.mean_score().isnan().all()
