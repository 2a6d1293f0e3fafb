"""Derivatives of every kind, opcheck, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from conftest import one_in
from torch.library import opcheck

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # of the operators, not of their results

NAMES = list(fl.LOSSES)
# An operator's registration and the Python code around it depend on the kind of a loss alone: functions of log p_y,
# losses with a sum over all classes, multi-reduction losses without and with margins.
ONE_OF_EACH_KIND = ("cross_entropy", "gce", "nce", "ngce", "hem")
KINDS = [name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
# Options that make the gradient the derivative of the loss; by default it is the one of the papers' code.
EXACT = {
    **{name: {"detach": False} for name, entry in fl.LOSSES.items() if "detach" in entry.parameters},
    "bi_tempered": {"num_iters": None},
}
OPS = torch.ops.fused_losses


@pytest.mark.parametrize(("name", "options"), one_in(2, NAMES, [{}, {"reduction": "none", "logit_bias": 0.7}]))
def test_gradcheck_and_gradgradcheck(name, options):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, -100, 1])

    def function(x):
        return fl.LOSSES[name].function(x, target, **options, **EXACT.get(name, {}))

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("name", NAMES)
def test_function_transforms(name):
    torch.manual_seed(0)
    logits, target = torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(0, 3, (5, 4))
    entry = fl.LOSSES[name]
    batched = torch.func.vmap(entry.function)(logits, target)
    assert batched.shape == (5,)
    torch.testing.assert_close(
        batched, torch.stack([entry.function(x, y) for x, y in zip(logits, target, strict=True)])
    )
    per_sample = torch.func.vmap(torch.func.grad(entry.function))(logits, target)
    for x, y, grad in zip(logits, target, per_sample, strict=True):
        x = x.clone().requires_grad_()
        entry.function(x, y).backward()
        torch.testing.assert_close(grad, x.grad)
    jacobian = torch.func.jacrev(lambda x: entry.function(x, target[0], reduction="none"))(logits[0])
    assert jacobian.shape == (4, 4, 3)


@pytest.mark.parametrize("name", [*NAMES, "margins", "smoothed", "corrected", "small", "antidote", "clip", "mixed"])
def test_single_rows_with_class_weights_under_vmap(name):
    """Gradients per sample: nobody may look at a label."""
    logits, target, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 2.0, 3.0])
    others = {
        "margins": lambda: fl.HEMLoss(margin=weight),
        "smoothed": lambda: fl.CrossEntropyLoss(weight=weight, label_smoothing=0.1),
        "corrected": lambda: fl.ForwardCorrectionLoss(0.1 + 0.7 * torch.eye(3), weight=weight),
        "small": lambda: fl.SmallLoss("gce", 0.5, weight=weight),
        "antidote": lambda: fl.Antidote("gce", 0.5, weight=weight),
        "clip": lambda: fl.LogitClip("gce", 1.0, weight=weight),
        "mixed": lambda: lambda x, y: fl.functional.mixed("gce", x, y, 2 - y, 0.25, weight=weight),
    }
    criterion = others[name]() if name in others else fl.LOSSES[name].module(weight=weight)
    found = torch.func.vmap(torch.func.grad(lambda x, y: criterion(x, y)))(logits, target)
    for x, y, grad in zip(logits, target, found, strict=True):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(criterion(x, y), x)[0])


@pytest.mark.parametrize("argument", ["weight", "sample_weight", "logit_bias"])
def test_other_inputs_are_differentiable(argument):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, -100, 1])
    size = {"weight": (3,), "sample_weight": (4,), "logit_bias": ()}[argument]
    value = (torch.rand(size, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: fl.functional.gce_loss(x, target, **{argument: v}), (logits, value))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", KINDS)
def test_opcheck(name, reduction):
    torch.manual_seed(0)
    args = (
        torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(5), torch.rand(6), None, None,
        name, fl.LOSSES[name].pack({}), 0.5, -100, reduction,
    )  # fmt: skip
    for op in (OPS.row_loss, OPS.row_loss_with_stats, *([OPS.row_loss_with_grad] if reduction == "mean" else [])):
        assert set(opcheck(op.default, args).values()) == {"SUCCESS"}
    if name in ("gce", "ngce") and reduction == "mean":  # all losses have the same entry
        for op in (OPS.row_loss_and_statistics, OPS.row_loss_with_grad_and_statistics):
            assert set(opcheck(op.default, args).values()) == {"SUCCESS"}
    loss, stats, denominator = OPS.row_loss_with_stats(*args)
    checked = opcheck(OPS.row_loss_backward.default, (torch.rand_like(loss), stats, denominator, *args))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [32, 33])
def test_short_rows_leave_no_numbers_on_a_gpu(device, classes, dtype):
    """Nor does tracing expect them; backward is right without."""
    torch.manual_seed(0)
    target = torch.randint(0, classes, (6,), device=device)
    for name in ("gce", "nce", "hem", "bi_tempered"):
        logits = torch.randn(6, classes, device=device, dtype=dtype)
        args = fl.LOSSES[name].arguments(logits, target, reduction="sum")
        loss, stats, denominator = OPS.row_loss_with_stats(*args)
        is_short = device == "cuda" and classes == 32 and dtype is not torch.float64 and name != "bi_tempered"
        assert (stats.numel() == 0) == is_short and stats.shape[1] == 6
        if device != "cuda" or torch.cuda.is_available():  # else it only looks like a GPU
            opcheck(OPS.row_loss_with_stats.default, tuple(args), test_utils="test_faketensor")
        gradient = OPS.row_loss_backward(torch.tensor(3.0, device=device).to(loss), stats, denominator, *args)
        expected = OPS.row_loss_with_grad(*args)[1] * 3
        torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS])
def test_compile_fullgraph_dynamic(name, backend="aot_eager"):
    torch._dynamo.reset()
    module = fl.LOSSES[name].module(logit_bias="auto")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for rows in (8, 12):
        logits, target = torch.randn(rows, 10, requires_grad=True), torch.randint(0, 10, (rows,))
        losses = compiled(logits, target), module(logits, target)
        grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)


MORE = {
    "z_error": fl.functional.z_error_cross_entropy,
    "mixed": lambda x, y: fl.functional.mixed("gce", x, y, y.flip(0), 0.3),
    "mixed, one by one": lambda x, y: fl.functional.mixed("hem", x, y, y.flip(0), 0.3),
    "module": fl.ZErrorCrossEntropyLoss(base="gce"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_one_graph_of_any_size_holds_a_loss_several_times(name):
    """Trained twice and looked at once."""
    torch._dynamo.reset()
    function = MORE[name] if name in MORE else fl.LOSSES[name].function

    def call(x, y):
        return function(x, y) + 0.5 * function(2 * x, y) - function(x.detach(), y)

    logits, target = torch.randn(8, 10, requires_grad=True), torch.randint(0, 10, (8,))
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    losses = compiled(logits, target), call(logits, target)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agce", pytest.param("cross_entropy", marks=pytest.mark.long)])
def test_inductor(name):
    test_compile_fullgraph_dynamic(name, "inductor")


def test_a_bias_tensor_is_seen_by_compiled_code():
    torch._dynamo.reset()
    module = fl.MAELoss(logit_bias=torch.tensor(0.0))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    logits, target = torch.randn(8, 10), torch.randint(0, 10, (8,))
    for bias in (0.0, 3.0):
        module.logit_bias.fill_(bias)
        torch.testing.assert_close(compiled(logits, target), fl.functional.mae_loss(logits, target, logit_bias=bias))


def test_export():
    logits, target = torch.randn(8, 10), torch.randint(0, 10, (8,))
    module = fl.GCELoss(logit_bias="auto")
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (logits, target), dynamic_shapes=({0: batch}, {0: batch}))
    torch.testing.assert_close(program.module()(logits[:5], target[:5]), module(logits[:5], target[:5]))


@pytest.mark.slow
def test_an_exported_program_updates_statistics_whose_shape_is_known():
    logits, target = torch.randn(8, 4), torch.randint(0, 4, (8,))
    with pytest.raises(RuntimeError, match=r"^ZErrorCrossEntropyLoss with running=True cannot be exported .* num_clas"):
        torch.export.export(fl.ZErrorCrossEntropyLoss(running=True), (logits, target))
    exported, module = (fl.ZErrorCrossEntropyLoss(running=True, num_classes=4) for _ in range(2))
    program = torch.export.export(exported, (logits, target)).module()
    for _ in range(3):
        torch.testing.assert_close(program(logits, target), module(logits, target))
        torch.testing.assert_close(program.state_dict()["running_moments"], module.running_moments)


# Compiled functions of a number that changes. With torch 2.13's cache of autograd graphs torch's own label_smoothing is
# then wrong from the third number on; losses from here are not ("torch.compile" in docs/training.md).
FLOATS = {
    "q": lambda x, y, s: fl.functional.gce_loss(x, y, q=1 - s / 2),
    "t1, t2": lambda x, y, s: fl.functional.bi_tempered_loss(x, y, t1=1 - s / 2, t2=1 + s / 2),
    "label_smoothing": lambda x, y, s: fl.functional.cross_entropy(x, y, label_smoothing=1 - s / 2),
    "logit_bias": lambda x, y, s: fl.functional.gce_loss(x, y, logit_bias=1 - s / 2),
}


@pytest.mark.long
@pytest.mark.any_cpu
@pytest.mark.parametrize("name", FLOATS)
def test_floats_that_change_are_not_stale_under_inductor(name):
    torch._dynamo.reset()
    x, y = torch.randn(8, 5), torch.randint(5, (8,))

    def loss(x, s):
        return s * torch.nn.functional.cross_entropy(x, y) + FLOATS[name](x, y, s)

    with torch._functorch.config.patch(enable_autograd_cache=True):
        compiled = torch.compile(loss)
        for s in (1.0, 0.9, 0.8, 0.5):
            leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
            values = compiled(leaves[0], s), loss(leaves[1], s)
            torch.testing.assert_close(*values)
            torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v, z in zip(values, leaves, strict=True)))


@pytest.mark.parametrize("made", ["function", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalty(name, made):
    """Where the gradient does not depend on the logits, as for margins, the penalty's gradient is 0 and no error."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = getattr(fl.LOSSES[name], made)(logits, torch.tensor([0, 1, 2, 3, -100, 1]))
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    slope.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).any() == (name not in ("hem", "multi_margin", "unhinged", "truncated_gce"))


@pytest.mark.parametrize("bad", [3, -1])
@pytest.mark.parametrize("name", NAMES)
def test_targets_out_of_range_are_the_same_error_everywhere(name, bad):
    """As with torch's losses, the plain formula and what goes through it raise as the kernels do."""
    entry = fl.LOSSES[name]
    logits, target = torch.randn(4, 3), torch.tensor([0, -100, bad, 2])
    learnt = torch.ones(3, requires_grad=True)
    for call in [
        lambda: entry.function(logits, target),
        lambda: entry.reference(logits, target),
        lambda: entry.function(logits, target, weight=learnt),
        lambda: torch.func.grad(lambda x: entry.function(x, target))(logits),
        lambda: torch.func.jvp(lambda x: entry.function(x, target), (logits,), (logits,)),
        lambda: torch.func.vmap(lambda x, y: entry.function(x, y))(logits, target),
        lambda: torch.func.vmap(torch.func.grad(entry.function))(logits, target),
        lambda: fl.reference.z_error_cross_entropy(logits, target, base=name),
    ]:
        with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds \(row 2\)"):
            call()
