"""Losses around losses under torch.compile, torch.export, torch.func, and with logits spread over processes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from wrapped_losses import CASES, CLASSES, TRANSITION, batch

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # what is done with a loss, whose kernels other tests judge
NAMES = [name for name in CASES if " " not in name]  # compositions are made of these
STATEFUL = {
    "elr": lambda: fl.ELRLoss(12, CLASSES),
    "small": lambda: fl.SmallLoss("gce", 0.6, running=True),
    "antidote": lambda: fl.Antidote("gce", 0.6, running=True),
    "super": lambda: fl.SuperLoss("gce", running=True),
    "learnt": lambda: fl.ForwardCorrectionLoss(fl.TransitionMatrix(CLASSES)),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "backward", "clip", "gjs"])
def test_compile_fullgraph_dynamic(name):
    case = CASES[name]
    module = case.make()

    def call(x, y):
        return case(module, x, y)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 5):
        logits, target = batch(torch.float32, rows)
        logits.requires_grad_()
        losses = compiled(logits, target), call(logits, target)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("elr", "small") else pytest.mark.long) for n in STATEFUL]
)
def test_compiled_state_is_updated(name):
    modules = STATEFUL[name](), STATEFUL[name]()
    compiled = torch.compile(modules[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in range(3):
        logits, target = batch(torch.float32, rows=7 + seed, seed=seed)
        logits.requires_grad_()
        inputs = (torch.arange(7 + seed) + seed,) if name == "elr" else ()
        losses = compiled(logits, target, *inputs), modules[1](logits, target, *inputs)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
    for found, expected in zip(modules[0].state_dict().values(), modules[1].state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_memory_on_the_host_breaks_the_graph_and_is_right():
    modules = [fl.ELRLoss(7, CLASSES, memory="host") for _ in range(2)]
    logits, target = batch(torch.float32)
    for criterion in (torch.compile(modules[0], backend="aot_eager"), modules[1]):
        criterion(logits, target, torch.arange(7))
    torch.testing.assert_close(*(module.state_dict()["memory"] for module in modules))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "backward", "norm clip", "elr", "antidote", "gjs"])
def test_export(name):
    case = CASES[name]
    module = case.make()
    logits, target = batch(torch.float32)
    inputs = (logits, target, torch.arange(7)) if case.takes_index else (logits, target)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, inputs, dynamic_shapes=({0: rows},) * len(inputs))
    few = tuple(tensor[:5] for tensor in inputs)
    torch.testing.assert_close(program.module()(*few), module(*few))


@pytest.mark.slow
def test_an_exported_memory_is_updated(tmp_path):
    logits, target = batch(torch.float32)
    inputs, rows = (logits, target, torch.arange(7)), torch.export.Dim("rows", min=2)
    program = torch.export.export(fl.ELRLoss(7, CLASSES), inputs, dynamic_shapes=({0: rows},) * 3)
    torch.export.save(program, tmp_path / "elr.pt2")
    loaded, criterion = torch.export.load(tmp_path / "elr.pt2").module(), fl.ELRLoss(7, CLASSES)
    for count in (7, 5):
        few = tuple(tensor[:count] for tensor in inputs)
        torch.testing.assert_close(loaded(*few), criterion(*few))
        torch.testing.assert_close(loaded.state_dict()["memory"], criterion.memory)


@pytest.mark.parametrize("name", NAMES)
def test_function_transforms(name):
    case = CASES[name]
    module = case.make()
    batches = [batch(seed=seed) for seed in range(3)]
    logits, target = torch.stack([x for x, _ in batches]), torch.stack([y for _, y in batches])
    values = torch.func.vmap(lambda x, y: case(module, x, y))(logits, target)
    grads = torch.func.vmap(torch.func.grad(lambda x, y: case(module, x, y)))(logits, target)
    for (x, y), value, grad in zip(batches, values, grads, strict=True):
        x.requires_grad_()
        loss = case(module, x, y)
        torch.testing.assert_close(value, loss)
        torch.testing.assert_close(grad, torch.autograd.grad(loss, x)[0])
    x, y = batches[0]
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    _, slope = torch.func.jvp(lambda x: case(module, x, y), (x.detach(),), (tangent,))
    torch.testing.assert_close(slope, (grads[0] * tangent).sum())


@pytest.mark.parametrize("name", ["forward", "norm", "elr", "gjs"])
def test_second_derivatives(name):
    case = CASES[name]
    logits, target = batch(rows=3)
    assert torch.autograd.gradgradcheck(lambda x: case(case.make(), x, target), logits.requires_grad_())


def test_a_memory_is_not_updated_under_function_transforms():
    criterion = fl.ELRLoss(7, CLASSES)
    logits, target = batch()
    with pytest.raises(RuntimeError, match=r"^ELRLoss updates its memory in training mode"):
        torch.func.grad(lambda x: criterion(x, target, torch.arange(7)))(logits)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_are_refused(mesh):
    logits, target = batch()
    spread = distribute_tensor(logits, mesh, [Replicate()])
    index = torch.arange(7)
    calls = {
        "ForwardCorrectionLoss": lambda: fl.ForwardCorrectionLoss(TRANSITION)(spread, target),
        "BackwardCorrectionLoss": lambda: fl.BackwardCorrectionLoss(TRANSITION)(spread, target),
        "LogitNorm": lambda: fl.LogitNorm("gce")(spread, target),
        "LogitClip": lambda: fl.LogitClip("gce", 1.0)(spread, target),
        "ELRLoss": lambda: fl.ELRLoss(7, CLASSES)(spread, target, index),
        "SmallLoss": lambda: fl.SmallLoss("gce", 0.5)(spread, target),
        "ClippedLoss": lambda: fl.ClippedLoss("gce", 0.5)(spread, target),
        "Antidote": lambda: fl.Antidote("gce", 0.5)(spread, target),
        "SuperLoss": lambda: fl.SuperLoss("gce")(spread, target),
        "GJSLoss": lambda: fl.GJSLoss((0.5, 0.5))([spread], target),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=r"logits must be a plain tensor, got a DTensor"):
            raise AssertionError(f"{name} took it: {call()}")


OTHER = torch.eye(CLASSES, dtype=torch.float64) * 0.6 + 0.1
CORRECTIONS = [
    (fl.ForwardCorrectionLoss, fl.functional.forward_correction_loss),
    (fl.BackwardCorrectionLoss, fl.functional.backward_correction_loss),
]


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(kind, source, **options):
    module = kind(TRANSITION.clone())  # loading writes into it
    module.load_state_dict(source.state_dict(), **options)
    return module


@pytest.mark.parametrize("kind, function", CORRECTIONS)
def test_an_assigned_matrix_counts(kind, function):
    logits, target = batch()
    first, second = (function(logits, target, matrix) for matrix in (TRANSITION, OTHER))
    module = kind(TRANSITION)
    torch.testing.assert_close(module(logits, target), first)
    module.transition = OTHER
    for same in (
        module,
        copy.deepcopy(module),
        copy.copy(module),
        copy.deepcopy(module).half().double(),
        saved_and_loaded(module),
        loaded(kind, module),
        loaded(kind, module, assign=True),
    ):
        assert torch.equal(same.matrix(), OTHER) and same._is_known(same.matrix())
        torch.testing.assert_close(same(logits, target), second)
    module.transition = TRANSITION.tolist()
    torch.testing.assert_close(module(logits, target), first)
    module.transition = torch.nn.Parameter(OTHER)
    torch.testing.assert_close(module(logits, target), second)
    with pytest.raises(ValueError, match=r"^transition must be >= 0 with rows that sum to 1, got a sum of 5"):
        module.transition = torch.nn.Parameter(5 * TRANSITION)
    torch.testing.assert_close(module(logits, target), second)


@pytest.mark.parametrize("kind, function", CORRECTIONS)
def test_a_matrix_of_a_functional_call_counts(kind, function):
    logits, target = batch()
    module = kind(TRANSITION)

    def call(x, matrix):
        return torch.func.functional_call(module, {"transition": matrix}, (x, target))

    torch.testing.assert_close(call(logits, OTHER), function(logits, target, OTHER))
    torch.testing.assert_close(module(logits, target), function(logits, target, TRANSITION))
    expected = torch.func.grad(lambda x: function(x, target, OTHER))(logits)
    torch.testing.assert_close(torch.func.grad(call)(logits, OTHER), expected)
    with pytest.raises(ValueError, match=r"^transition must be >= 0 with rows that sum to 1, got a sum of 5"):
        call(logits, 5 * OTHER)
    with pytest.raises(ValueError, match=r"^transition must have shape"):
        call(logits, OTHER[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind, function", CORRECTIONS)
def test_compiled_code_takes_an_assigned_matrix(kind, function):
    logits, target = batch()
    module, graphs = kind(TRANSITION), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for matrix in (TRANSITION, OTHER, TRANSITION):
        module.transition = matrix
        torch.testing.assert_close(compiled(logits, target), function(logits, target, matrix))
    assert len(graphs) == 1 and "linalg_inv" not in graphs[0].code  # it is inverted where it is assigned

    @torch.compile(fullgraph=True, backend="aot_eager")
    def assigning(matrix):
        module.transition = matrix
        return module(logits, target)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def calling(matrix):
        return torch.func.functional_call(module, {"transition": matrix}, (logits, target))

    for call in (assigning, calling):
        for matrix in (OTHER, TRANSITION):
            torch.testing.assert_close(call(matrix), function(logits, target, matrix))


@pytest.mark.slow
def test_numbers_can_be_assigned_in_compiled_code():
    logits, target = batch()
    module = fl.SmallLoss("gce", 0.5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(keep):
        module.keep, module.reduction = keep, "sum"
        return module(logits, target)

    for keep in (0.5, 0.7, 0.9):
        torch.testing.assert_close(step(keep), fl.SmallLoss("gce", keep, reduction="sum")(logits, target))
    assert module.keep == 0.9
