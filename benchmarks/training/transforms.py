"""What happens to a photograph before the network sees it: torchvision's transforms, or the same few without it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Transform = Callable[[Any], Tensor]
ENLARGED = 256 / 224  # a validation image's shorter side, over the size that is cut out of its middle


def for_training(size: int) -> Transform:
    """A random part of the image, scaled to ``size`` and flipped half of the time: uint8 (3, size, size)."""
    if has_torchvision():
        from torchvision.transforms import v2

        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        return v2.Compose(steps)
    return lambda image: _to_tensor(_random_part(image, size))


def for_validation(size: int) -> Transform:
    """The middle of the image, scaled so that its shorter side is 256 / 224 of ``size``: uint8 (3, size, size)."""
    if has_torchvision():
        from torchvision.transforms import v2

        steps = [v2.Resize(round(size * ENLARGED), antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
        return v2.Compose(steps)
    return lambda image: _to_tensor(_middle(image, size))


def has_torchvision() -> bool:
    """Whether torchvision is there and fits torch."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision.transforms.v2  # noqa: F401
    except (ImportError, RuntimeError):  # built for another torch
        return False
    return True


def _random_part(image: Any, size: int) -> Any:
    """8 to 100 % of the area, sides at 3/4 to 4/3; the middle where ten draws do not fit (as torchvision)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * (0.08 + 0.92 * float(torch.rand(())))
        ratio = math.exp((2.0 * float(torch.rand(())) - 1.0) * math.log(4.0 / 3.0))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(torch.randint(room + 1, ())) for room in (width - w, height - h))
            break
    else:
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    part = image.resize((size, size), resample=2, box=(left, top, left + w, top + h))  # 2: bilinear
    return part.transpose(0) if float(torch.rand(())) < 0.5 else part  # 0: left to right


def _middle(image: Any, size: int) -> Any:
    side = min(image.size) / ENLARGED
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((size, size), resample=2, box=(left, top, left + side, top + side))


def _to_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
