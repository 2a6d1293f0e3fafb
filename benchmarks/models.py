"""Networks whose training steps are timed; untrained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_cnn(num_classes: int) -> nn.Module:
    """Three convolutions and a linear layer for 32 x 32 images."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the middle width is a quarter of the output's."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width

        def convolution(a: int, b: int, kernel: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b))

        self.narrow = convolution(before, width, 1)
        self.middle = convolution(width, width, 3, stride)
        self.widen = convolution(width, after, 1)
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else convolution(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.middle(F.relu(self.narrow(x))))
        return F.relu(self.widen(y) + self.shortcut(x))


def resnet50(num_classes: int) -> nn.Module:
    """The layer sizes of ResNet-50 (1512.03385, stride in the 3x3): 25.6 million parameters at 1000 classes."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            blocks.append(Bottleneck(channels, 64 << stage, 2 if stage and block == 0 else 1))
            channels = 256 << stage
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def parameter_count(model: nn.Module) -> int:
    return sum(torch.numel(p) for p in model.parameters())
