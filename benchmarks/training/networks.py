"""The networks of the papers' tables; anything else comes from timm."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 64  # images below this size keep their resolution in a ResNet's first layers


def make_network(name: str, input_shape: Sequence[int], num_classes: int, seed: int) -> nn.Module:
    """The network called ``name``, with weights drawn from ``seed``; torch's global random state stays as it is.

    Args:
        name: resnet32, resnet34, resnet50, wide_resnet101_2, small_cnn, mlp (two layers of 512), ``mlp:WIDTH`` or
            ``timm:NAME``.
        input_shape: of a sample: (channels, height, width), or (channels,) for photographs of any size.

    Raises:
        SystemExit: the name is unknown.
    """
    check_name(name)
    channels = input_shape[0]
    kind, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "timm":
            network: nn.Module = importlib.import_module("timm").create_model(
                rest, num_classes=num_classes, in_chans=channels
            )
            return network
        if kind == "mlp":
            if len(input_shape) == 1:
                raise SystemExit("--model mlp needs images of one size, in memory")
            return _mlp(math.prod(input_shape), int(rest or 512), num_classes)
        if kind == "small_cnn":
            return _small_cnn(input_shape, num_classes)
        block, depths, width = _resnets()[name]
        small = name == "resnet32" or (len(input_shape) > 1 and input_shape[-1] < SMALL)
        return ResNet(block, depths, width, channels, num_classes, small=small)


def check_name(name: str) -> None:
    """Refuses what :func:`make_network` cannot make, without data.

    Raises:
        SystemExit: the name is unknown, or timm is not there.
    """
    kind, colon, rest = name.partition(":")
    if kind == "timm":
        _check_timm(rest)
    elif kind == "mlp" and colon:
        if not (rest.isdecimal() and int(rest) > 0):
            raise SystemExit(f"--model mlp:WIDTH must have a width of at least 1, got {name!r}")
    elif name not in ("mlp", "small_cnn", *_resnets()):
        raise SystemExit(
            f"--model must be {', '.join(_resnets())}, small_cnn, mlp, mlp:WIDTH or timm:NAME, got {name!r}"
        )


def _check_timm(name: str) -> None:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise SystemExit(f"--model timm:{name} needs timm: pip install timm") from None
    if name not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise SystemExit(f"--model timm:{name} is no model of timm {timm.__version__}; near it: {close or 'none'}")


def _resnets() -> dict[str, tuple[type[Basic] | type[Bottleneck], tuple[int, ...], int]]:
    """Blocks, how many of each size, and channels of the first."""
    return {
        "resnet32": (Basic, (5, 5, 5), 16),
        "resnet34": (Basic, (3, 4, 6, 3), 64),
        "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
        "wide_resnet101_2": (WideBottleneck, (3, 4, 23, 3), 64),
    }


def _mlp(features: int, width: int, num_classes: int) -> nn.Module:
    hidden = [nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


def _small_cnn(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Two strided convolutions and a hidden layer: quick on a CPU, for images of 28 or 32 pixels."""
    layers: list[nn.Module] = []
    for before, after, kernel in ((input_shape[0], 8, 5), (8, 16, 3)):
        layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2), nn.BatchNorm2d(after), nn.ReLU()]
    if len(input_shape) == 1:  # photographs of any size
        layers.append(nn.AdaptiveAvgPool2d(8))
        input_shape = (input_shape[0], 32, 32)
    features = 16 * math.prod(-(-side // 4) for side in input_shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, num_classes))


class ResNet(nn.Module):
    """1512.03385: stages of residual blocks, each after the first with half the resolution and twice the channels."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        depths: Sequence[int],
        width: int,
        channels: int,
        num_classes: int,
        *,
        small: bool,
    ) -> None:
        super().__init__()
        stem = [_convolution(channels, width, 3 if small else 7, 1 if small else 2), nn.ReLU()]
        self.stem = nn.Sequential(*stem, nn.Identity() if small else nn.MaxPool2d(3, 2, 1))
        before = width
        blocks: list[Block] = []
        for stage, depth in enumerate(depths):
            for number in range(depth):
                blocks.append(block(before, width << stage, 2 if stage and not number else 1))
                before = blocks[-1].after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (rows, classes) of images (rows, channels, height, width)."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after))


class Block(nn.Module):
    """Convolutions beside a shortcut, which is a 1x1 convolution where shapes differ."""

    after: int

    def __init__(self, before: int, convolutions: Sequence[nn.Module], after: int, stride: int) -> None:
        super().__init__()
        self.after = after
        steps = [step for convolution in convolutions for step in (convolution, nn.ReLU())]
        self.path = nn.Sequential(*steps[:-1])
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else _convolution(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; half the resolution with a stride of 2."""
        return F.relu(self.path(x) + self.shortcut(x))


class Basic(Block):
    """Two 3x3 convolutions."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__(before, [_convolution(before, width, 3, stride), _convolution(width, width, 3)], width, stride)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions; the last has four times ``width`` channels."""

    widening = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        inner = width * self.widening
        middle = _convolution(inner, inner, 3, stride)
        super().__init__(
            before, [_convolution(before, inner, 1), middle, _convolution(inner, 4 * width, 1)], 4 * width, stride
        )


class WideBottleneck(Bottleneck):
    """Twice the inner channels (1605.07146)."""

    widening = 2
