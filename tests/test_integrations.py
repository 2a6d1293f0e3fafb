"""The losses inside other libraries: what they compute there, and short trainings; skipped where one is missing."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_losses as fl
import fused_losses.demo
from fused_losses.integrations.huggingface import compute_loss
from fused_losses.integrations.timm import MixupLoss

pytestmark = pytest.mark.any_cpu  # other libraries


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and wait for it where other programs use the cores."""
    with fl.demo.one_thread():
        yield


def rows(*shape: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (*shape, classes) and labels (*shape)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, classes, generator=generator), torch.randint(classes, shape, generator=generator)


# transformers


class TokenOutput(dict[str, Tensor]):
    """As transformers' outputs: a dict, told apart by the name of its class."""


class SomeCausalLMOutputWithPast(TokenOutput):
    pass


@pytest.mark.parametrize("criterion", [fl.CrossEntropyLoss(), fl.GCELoss(), nn.CrossEntropyLoss()])
def test_huggingface_scales_by_the_items_of_the_whole_batch(criterion: nn.Module) -> None:
    logits, labels = rows(6, 7)
    labels[:2, 3:] = -100
    function = compute_loss(criterion)
    whole = function(TokenOutput(logits=logits), labels)
    torch.testing.assert_close(whole, criterion(logits.flatten(0, 1), labels.flatten()))
    for items in (int((labels != -100).sum()), (labels != -100).sum()):
        parts = [function(TokenOutput(logits=logits[i : i + 2]), labels[i : i + 2], items) for i in (0, 2, 4)]
        torch.testing.assert_close(sum(parts), whole, msg="accumulated unequal batches are the mean over all items")


def test_huggingface_shifts_labels_of_causal_models() -> None:
    logits, labels = rows(3, 8)
    labels[1, 5:] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    shifted = compute_loss(fl.CrossEntropyLoss())(SomeCausalLMOutputWithPast(logits=logits), labels)
    torch.testing.assert_close(shifted, expected)
    torch.testing.assert_close(compute_loss(fl.CrossEntropyLoss(), causal=True)((logits,), labels), expected)
    plain = compute_loss(fl.CrossEntropyLoss(), causal=False)(SomeCausalLMOutputWithPast(logits=logits), labels)
    torch.testing.assert_close(plain, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    with pytest.raises(ValueError, match="causal must be True or False for a model that returns a tuple, got None"):
        compute_loss(fl.CrossEntropyLoss())((logits,), labels)


def test_huggingface_layouts() -> None:
    logits, labels = rows(4)
    function = compute_loss(fl.GCELoss())
    assert function((logits,), labels) == function(TokenOutput(logits=logits), labels) == fl.GCELoss()(logits, labels)
    image = torch.randn(2, 5, 3, 4)
    pixels = torch.randint(5, (2, 3, 4))
    assert function(TokenOutput(logits=image), pixels) == fl.GCELoss()(image, pixels)
    logits, _ = rows(30)
    several = torch.arange(150).remainder(2).reshape(30, 5).float()
    bce = compute_loss(fl.ZErrorBCEWithLogitsLoss(threshold=9.0))
    torch.testing.assert_close(
        bce(TokenOutput(logits=logits), several, 300), F.binary_cross_entropy_with_logits(logits, several) / 2
    )
    mse = compute_loss(fl.ZMSELoss(threshold=9.0))
    number = torch.randn(30)
    torch.testing.assert_close(mse(TokenOutput(logits=logits[:, :1]), number), F.mse_loss(logits[:, 0], number))
    with pytest.raises(ValueError, match=r"labels must have the shape of the logits \(2, 5, 3, 4\) .* got \(2, 6, 8\)"):
        function(TokenOutput(logits=image), torch.zeros(2, 6, 8).long())
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"criterion must give a mean, got one with reduction='{reduction}'"):
            compute_loss(fl.GCELoss(reduction=reduction))
    with pytest.raises(TypeError, match="criterion must be a Module or a function, got str"):
        compute_loss("gce")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="causal must be True, False or None, got 'no'"):
        compute_loss(fl.GCELoss(), causal="no")  # type: ignore[arg-type]


def test_huggingface_layouts_whose_shapes_do_not_say_where_the_classes_are() -> None:
    """Second in images, last in sequences."""
    function = compute_loss(fl.CrossEntropyLoss())
    for dims in (2, 3):
        image, pixels = rows(2, *[6] * dims, classes=6)
        torch.testing.assert_close(function({"logits": image}, pixels), F.cross_entropy(image, pixels))
        several = torch.randint(2, image.shape).float()
        dense = F.softmax(several, 1)
        torch.testing.assert_close(function({"logits": image}, dense), F.cross_entropy(image, dense))
        by_task = fl.ZErrorBCEWithLogitsLoss(threshold=1.0)
        expected = by_task(image.movedim(1, -1).reshape(-1, 6), several.movedim(1, -1).reshape(-1, 6))
        torch.testing.assert_close(compute_loss(by_task)({"logits": image}, several), expected)
    codes, labels = rows(2, 3, 4, classes=7)
    expected = F.cross_entropy(codes.flatten(0, 2), labels.flatten())
    torch.testing.assert_close(function({"logits": codes}, labels), expected, msg="only the last fits")
    sequence, labels = rows(2, 6, classes=6)
    expected = F.cross_entropy(sequence.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(function({"logits": sequence}, labels), expected)
    sequence, labels = rows(3, 7)
    torch.testing.assert_close(
        function({"logits": sequence.mT}, labels), F.cross_entropy(sequence.mT, labels), msg="only the second fits"
    )


@pytest.mark.parametrize("items", [0, torch.tensor(0), 5])
def test_huggingface_batch_without_labels(items: int | Tensor) -> None:
    logits, labels = rows(2, 6)
    logits.requires_grad_()
    loss = compute_loss(fl.GCELoss())({"logits": logits}, torch.full_like(labels, -100), items)
    loss.backward()
    assert loss == 0.0 and logits.grad is not None and not logits.grad.any()


def test_huggingface_wants_a_mean_of_functions_too() -> None:
    logits, labels = rows(6)
    for criterion in (
        functools.partial(fl.functional.gce_loss, reduction="none"),
        functools.partial(fl.GCELoss(reduction="none")),
    ):
        with pytest.raises(ValueError, match="criterion must give a mean, got one with reduction='none'"):
            compute_loss(criterion)
    with pytest.raises(ValueError, match=r"criterion must give a mean, got a loss of shape \(6,\)"):
        compute_loss(lambda x, y: F.cross_entropy(x, y, reduction="none"))({"logits": logits}, labels)
    labels[:3] = 0
    ignoring = functools.partial(fl.functional.gce_loss, q=0.5, ignore_index=0)
    counted = labels != 0
    expected = fl.functional.gce_loss(logits[counted], labels[counted], q=0.5)
    torch.testing.assert_close(compute_loss(ignoring)({"logits": logits}, labels, 6), expected)
    half = compute_loss(ignoring)({"logits": logits}, labels, torch.tensor(12))
    torch.testing.assert_close(half, expected / 2, msg="of two such batches")


def test_huggingface_leaves_out_what_has_no_labels_in_evaluation() -> None:
    logits, labels = rows(6)
    for criterion, ignored in ((fl.GCELoss(), -100), (fl.HEMLoss(ignore_index=255), 255)):
        function = compute_loss(criterion)
        nothing = torch.full_like(labels, ignored)
        assert function({"logits": logits}, nothing) == 0.0
        with torch.no_grad():
            assert function({"logits": logits}, nothing).isnan()
            assert function({"logits": logits}, labels) == criterion(logits, labels)


@pytest.mark.parametrize("kind", [dict, TokenOutput, SomeCausalLMOutputWithPast, tuple, list])
@pytest.mark.parametrize("grad", [True, False])
def test_huggingface_compiles_as_a_whole(kind: type, grad: bool) -> None:
    logits, labels = rows(4) if kind in (tuple, list) else rows(3, 8)
    function = compute_loss(fl.GCELoss())

    def step(logits: Tensor, labels: Tensor) -> Tensor:
        return function(kind(logits=logits) if issubclass(kind, dict) else kind([logits]), labels)

    torch.compiler.reset()  # every case compiles the same code
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(logits.requires_grad_(), labels), step(logits, labels))


def test_huggingface_evaluates_in_eval_mode() -> None:
    modes = []

    class Watching(fl.GCELoss):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            modes.append(self.training)
            return super().forward(*args, **kwargs)

    criterion = Watching()
    logits, labels = rows(4)
    function = compute_loss(criterion)
    function((logits,), labels)
    with torch.no_grad():
        function((logits,), labels)
    assert modes == [True, False] and criterion.training, "the mode is given back"
    inner = fl.GCELoss().eval()
    outer = fl.SmallLoss(inner, 0.5)
    with torch.no_grad():
        compute_loss(outer)((logits,), labels)
    assert outer.training and not inner.training, "that of every Module"
    running = fl.ZErrorCrossEntropyLoss(running=True)
    function = compute_loss(running)
    function((logits,), labels)
    learned = running.running_moments.clone()
    with torch.no_grad():
        function((logits + 1.0,), labels)
    assert torch.equal(running.running_moments, learned), "validation rows teach nothing"


def test_huggingface_trainer_trains(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(3, 20, (96, 6), generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = torch.arange(96) % 3
    data = [{"input_ids": row, "labels": row[1]} for row in tokens]
    criterion = fl.GCELoss(logit_bias=0.5)
    trainer = train_with_trainer(transformers, model, data, tmp_path, compute_loss(criterion), num_train_epochs=12)
    assert trainer.evaluate()["eval_loss"] < 0.1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_huggingface_trainer_agrees_with_the_loss_of_a_causal_model(tmp_path: Path, accumulation: int) -> None:
    """Cross entropy of ours and the model's own give the same training, with unequal lengths and accumulation."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(12, (16, 8), generator=generator)
    labels = tokens.clone()
    labels[::2, 4:] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    weights, losses = [], []
    for function in (None, compute_loss(fl.CrossEntropyLoss())):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
        trainer = train_with_trainer(transformers, model, data, tmp_path, function, **options)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def train_with_trainer(
    transformers: Any, model: nn.Module, data: list[Any], folder: Path, function: Any, **options: Any
) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=function)
    trainer.train()
    return trainer


# timm

MIXED = ["cross_entropy", "gce", "nce", "nfl", "bi_tempered"]


def expanded(stem: str, logits: Tensor, target: Tensor) -> Tensor:
    """sum_k u_k loss(logits, k) of every row, in float64 by the reference."""
    labels = torch.arange(logits.shape[1]).expand(len(logits), -1)
    reference = fl.LOSSES[stem].reference
    losses = [reference(logits.double(), label, reduction="none") for label in labels.T]
    return (torch.stack(losses, 1) * target.double()).sum(1)


def dense(shares: Tensor, first: Tensor, second: Tensor, classes: int) -> Tensor:
    return shares[:, None] * F.one_hot(first, classes) + (1.0 - shares)[:, None] * F.one_hot(second, classes)


@pytest.mark.parametrize("stem", MIXED)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_mixup_targets_by_their_definition(stem: str, reduction: str) -> None:
    logits, first = rows(9)
    logits.requires_grad_()
    target = dense(torch.rand(9), first, first.flip(0), 5)  # the row in the middle is mixed with one of its own class
    expected = expanded(stem, logits, target)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    found = MixupLoss(fl.LOSSES[stem].module(reduction=reduction))(logits, target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_mixup_with_class_weights_by_hand() -> None:
    """The losses of both classes are 1 - p: 1/4 and 3/4 in the first row, 1/2 in the second."""
    logits, weight = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([1.0, 3.0])
    target = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    first, second = 0.25 * 1.0 * 0.25 + 0.75 * 3.0 * 0.75, 1.0 * 1.0 * 0.5
    loss = fl.GCELoss(q=1.0, weight=weight)
    assert float(MixupLoss(loss)(logits, target)) == pytest.approx((first + second) / (0.25 + 0.75 * 3.0 + 1.0))
    assert float(loss(logits, target)) == pytest.approx((first + second) / 2), "without MixupLoss: over rows"
    crossed = MixupLoss(fl.CrossEntropyLoss(weight=weight))(logits, target)
    by_hand = (0.25 * math.log(4.0 / 3.0) + 0.75 * 3.0 * math.log(4.0) + math.log(2.0)) / 2
    assert float(crossed) == pytest.approx(by_hand)
    torch.testing.assert_close(crossed, F.cross_entropy(logits, target, weight=weight))


def test_mixup_of_masked_classes_and_of_class_indices() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 2.0, -torch.inf]])
    target = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.7, 0.0]])
    found = MixupLoss(fl.GCELoss())(logits, target)
    torch.testing.assert_close(found.double(), expanded("gce", logits[:, :2], target[:, :2]).mean())
    labels = torch.tensor([0, 1])
    for loss in (fl.GCELoss(), fl.NFLLoss()):
        assert MixupLoss(loss)(logits, labels) == loss(logits, labels)


def test_mixup_refuses_what_it_cannot_give() -> None:
    logits, first = rows(8)
    smooth = 0.9 * dense(torch.rand(8), first, first.flip(0), 5) + 0.1 / 5
    torch.testing.assert_close(
        MixupLoss(fl.CrossEntropyLoss())(logits, smooth), F.cross_entropy(logits, smooth), msg="probabilities: any"
    )
    torch.testing.assert_close(MixupLoss(fl.GCELoss())(logits, smooth).double(), expanded("gce", logits, smooth).mean())
    with pytest.raises(ValueError, match="target must have two labels in a row"):
        MixupLoss(fl.GCELoss(logit_bias=2.0))(logits, smooth)
    with pytest.raises(ValueError, match="target must have two labels in a row"):
        MixupLoss(fl.GCELoss(weight=torch.ones(5)))(logits, smooth)
    with pytest.raises(ValueError, match=r"target must have two labels in a row .* got a row with 0.0"):
        MixupLoss(fl.HEMLoss(reduction="mean"))(logits, smooth)
    with pytest.raises(TypeError, match="loss must be the Module of a row loss, got ZErrorCrossEntropyLoss"):
        MixupLoss(fl.ZErrorCrossEntropyLoss())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("stem", MIXED)
def test_timm_mixup(mode: str, stem: str) -> None:
    data = pytest.importorskip("timm.data")
    np.random.seed(0)
    mixup = data.Mixup(0.8, 1.0, mode=mode, label_smoothing=0.0, num_classes=5)
    _, target = mixup(torch.randn(8, 3, 6, 6), torch.arange(8) % 5)
    logits, _ = rows(8, seed=1)
    found = MixupLoss(fl.LOSSES[stem].module())(logits, target)
    torch.testing.assert_close(found.double(), expanded(stem, logits, target).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [fl.GCELoss(), fl.NCEMAELoss(), fl.CrossEntropyLoss(), fl.HEMLoss(reduction="mean")])
def test_timm_task_trains_with_mixup(loss: Any) -> None:
    pytest.importorskip("timm")
    data, task_module = importlib.import_module("timm.data"), pytest.importorskip("timm.task")
    torch.manual_seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 4))
    task = task_module.ClassificationTask(model, MixupLoss(loss), verbose=False)
    mixup = data.Mixup(0.4, 0.0, label_smoothing=0.0, num_classes=4)
    inputs, target = torch.randn(64, 3, 4, 4), torch.arange(64) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = float(task(inputs, target)["loss"].detach())
    for _ in range(60):
        optimizer.zero_grad()
        task(*mixup(inputs.clone(), target))["loss"].backward()
        optimizer.step()
    result = task(inputs, target)
    assert float(result["loss"].detach()) < 0.5 * before
    assert (result["output"].argmax(1) == target).float().mean() > 0.9
