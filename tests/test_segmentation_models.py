"""A network of segmentation_models_pytorch trains with a loss of this package. Skipped without it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # other libraries


def test_segmentation_models_pytorch_trains() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, classes=4)
    images = torch.randn(4, 3, 32, 32)
    labels = images.mean(1).mul(2).round().clamp(0, 3).long()
    labels[:, :4] = 255
    for channels_last in (False, True):
        model = model.to(memory_format=torch.channels_last) if channels_last else model
        logits = model(images.to(memory_format=torch.channels_last) if channels_last else images)
        assert logits.shape == (4, 4, 32, 32)
        loss = fl.CrossEntropyLoss(ignore_index=255)
        torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels, ignore_index=255))
    criterion = fl.GCELoss(ignore_index=255)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = criterion(model(images), labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]
