"""mmengine and what is built on it: registered losses, their signature, a training."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_integrations import one_thread, rows  # noqa: F401  (of every test here)
from torch import Tensor, nn
from torch.nn import functional as F

import fused_losses as fl
from fused_losses.integrations.mmengine import FusedLoss

pytestmark = pytest.mark.any_cpu  # another library


def mmseg_cross_entropy(
    logits: Tensor, label: Tensor, weight: Tensor | None, class_weight: Tensor | None, avg_factor: float | None
) -> Tensor:
    """What mmsegmentation computes with avg_non_ignore=True and ignore_index=255."""
    loss = F.cross_entropy(logits, label, weight=class_weight, reduction="none", ignore_index=255)
    if weight is not None:
        loss = loss * weight
    if avg_factor is None:
        counted = label[label != 255]
        avg_factor = len(counted) if class_weight is None else float(class_weight[counted].sum())
    return loss.sum() / avg_factor


@pytest.mark.parametrize(
    ("weighted", "class_weight", "avg_factor"),
    [*itertools.product([False, True], [None, [0.5, 1.0, 2.0, 0.0, 3.0]], [None, 17.0])],
)
def test_mmengine_signature(weighted: bool, class_weight: list[float] | None, avg_factor: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 3, generator=generator)
    label = torch.randint(5, (2, 4, 3), generator=generator)
    label[0, :2] = 255
    weight = torch.rand(2, 4, 3, generator=generator) if weighted else None
    loss = FusedLoss("cross_entropy", 0.4, class_weight=class_weight)
    expected = 0.4 * mmseg_cross_entropy(
        logits, label, weight, None if class_weight is None else torch.tensor(class_weight), avg_factor
    )
    torch.testing.assert_close(loss(logits, label, weight=weight, avg_factor=avg_factor, ignore_index=255), expected)
    torch.testing.assert_close(loss(logits, label, weight, avg_factor), expected, msg="255 is the default")


def test_mmengine_reductions_names_and_parameters() -> None:
    logits, label = rows(12)
    label[3] = 255
    loss = FusedLoss("gce_loss", q=0.4, loss_weight=2.0)
    assert loss.loss_name == "loss_gce" and FusedLoss("gce", loss_name="loss_aux").loss_name == "loss_aux"
    kept = label != 255
    plain = fl.functional.gce_loss(logits[kept], label[kept], q=0.4, reduction="none")
    torch.testing.assert_close(loss(logits, label), 2.0 * plain.mean())
    torch.testing.assert_close(loss(logits, label, reduction_override="sum"), 2.0 * plain.sum())
    none = loss(logits, label, avg_factor=3.0, reduction_override="none")
    torch.testing.assert_close(none[kept], 2.0 * plain)
    assert none[3] == 0.0
    torch.testing.assert_close(loss(logits, label), 2.0 * plain.mean(), msg="an override is for one call")
    torch.testing.assert_close(loss(logits, label, avg_factor=torch.tensor(4.0)), 2.0 * plain.sum() / 4.0)
    ignored = torch.full_like(label, 255)
    assert loss(logits, ignored) == loss(logits, ignored, avg_factor=0) == loss(logits, ignored, torch.rand(12)) == 0.0
    with pytest.raises(ValueError, match='avg_factor must be None with reduction="sum", got 3'):
        loss(logits, label, avg_factor=3, reduction_override="sum")
    with pytest.raises(ValueError, match=r"loss must be one of cross_entropy, mae, .* got 'dice'"):
        FusedLoss("dice")


def test_mmengine_255_is_a_class_where_there_are_that_many() -> None:
    logits, label = torch.randn(4, 300), torch.tensor([255, 0, -100, 2])
    expected = fl.CrossEntropyLoss()(logits, label)
    assert FusedLoss("cross_entropy")(logits, label) == expected
    torch.testing.assert_close(
        FusedLoss("cross_entropy", ignore_index=255)(logits[[0, 1]], label[[0, 1]]),
        F.cross_entropy(logits[1:2], label[1:2]),
    )


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_mmengine_takes_probabilities(ignore_index: int | None) -> None:
    """As mmpretrain's Mixup and CutMix give them; no row of theirs is ignored."""
    logits, soft, weight = torch.randn(4, 6), torch.rand(4, 6).softmax(1), torch.rand(4)
    for stem in ("gce", "cross_entropy"):
        loss = FusedLoss(stem, 2.0, ignore_index=ignore_index)
        plain = fl.LOSSES[stem].function(logits, soft, reduction="none")
        torch.testing.assert_close(loss(logits, soft, ignore_index=ignore_index), 2.0 * plain.mean())
        torch.testing.assert_close(loss(logits, soft, avg_factor=8), 2.0 * plain.sum() / 8)
        torch.testing.assert_close(loss(logits, soft, weight), 2.0 * (weight * plain).mean())
        classes = torch.tensor([0, 5, 1, 255])
        torch.testing.assert_close(loss(logits, classes), loss(logits[:3], classes[:3]), msg="of classes 255 still is")
    with pytest.raises(RuntimeError, match=r"hem: .*one-hot labels are passed as class indices"):
        FusedLoss("hem", ignore_index=ignore_index)(logits, soft)
    image, soft = torch.randn(2, 5, 3, 4), torch.rand(2, 5, 3, 4).softmax(1)
    torch.testing.assert_close(
        FusedLoss("cross_entropy", class_weight=[1.0, 2.0, 0.5, 0.0, 1.0])(image, soft),
        F.cross_entropy(image, soft, torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0])),
    )


def test_mmengine_names_what_is_of_the_wrong_type() -> None:
    for loss in (None, fl.GCELoss()):
        with pytest.raises(TypeError, match=f"^loss must be the name of a loss, got {type(loss).__name__}$"):
            FusedLoss(loss)  # type: ignore[arg-type]
    for weight in ("weights.npy", {"cat": 1.0}, ["a", "b"]):
        with pytest.raises(TypeError, match=r"^class_weight must be a tensor, an array or a list of numbers, got "):
            FusedLoss("gce", class_weight=weight)  # type: ignore[arg-type]
    by_list = FusedLoss("gce", class_weight=[1, 2]).criterion.weight
    for weight in (torch.tensor([1.0, 2.0]), by_list.double().numpy()):
        assert torch.equal(FusedLoss("gce", class_weight=weight).criterion.weight, by_list)


@pytest.mark.parametrize("stem", ["hem", "z_error_cross_entropy"])
def test_mmengine_keeps_means_of_their_own(stem: str) -> None:
    logits, label = rows(40)
    module = fl.ZErrorCrossEntropyLoss() if stem.startswith("z_") else fl.HEMLoss()
    assert FusedLoss(stem)(logits, label) == module(logits, label)
    module.reduction = "sum"
    torch.testing.assert_close(FusedLoss(stem)(logits, label, avg_factor=8), module(logits, label) / 8)


@pytest.mark.parametrize("class_weight", [None, [1.0, 2.0, 3.0]])
def test_mmengine_counts_no_dropped_labels(class_weight: list[float] | None) -> None:
    logits, label = 3 * torch.randn(60, 3), torch.randint(3, (60,))
    loss = FusedLoss("z_error_cross_entropy", threshold=0.5, statistic="prob", sided="lower", class_weight=class_weight)
    plain, weighted = loss(logits, label), loss(logits, label, torch.ones(60))
    torch.testing.assert_close(weighted, plain)
    assert plain != FusedLoss("cross_entropy", class_weight=class_weight)(logits, label)


def test_mmengine_builds_and_trains_it(tmp_path: Path) -> None:
    registry = pytest.importorskip("mmengine.registry")
    model_module, runner = importlib.import_module("mmengine.model"), importlib.import_module("mmengine.runner")

    class Segmentor(model_module.BaseModel):  # type: ignore[name-defined,misc]
        def __init__(self, loss_decode: dict[str, Any]) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 1)
            self.loss_decode = registry.MODELS.build(loss_decode)

        def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
            logits = self.convolution(inputs)
            if mode == "loss":
                return {self.loss_decode.loss_name: self.loss_decode(logits, labels, ignore_index=255)}
            return logits

    torch.manual_seed(0)
    images = torch.randn(16, 3, 6, 6)
    labels = images.argmax(1)
    labels[:, 0] = 255
    model = Segmentor({"type": "FusedLoss", "loss": "gce", "q": 0.5, "loss_weight": 2.0})
    assert isinstance(model.loss_decode, FusedLoss) and model.loss_decode.criterion.q == 0.5
    before = float(model(images, labels, mode="loss")["loss_gce"].detach())
    runner.Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader([*zip(images, labels, strict=True)], batch_size=4),
        optim_wrapper={"optimizer": {"type": "Adam", "lr": 0.05}},
        train_cfg={"by_epoch": True, "max_epochs": 10},
        log_level="ERROR",
        experiment_name="fused_losses",
    ).train()
    assert float(model(images, labels, mode="loss")["loss_gce"].detach()) < 0.5 * before


# segmentation_models_pytorch
