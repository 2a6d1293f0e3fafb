"""What test_properties.py draws: a loss with everything that is passed to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from conftest import loss_and_grad


@dataclass(frozen=True)
class Problem:
    """A loss with everything that is passed to it. ``random`` is for what a test adds to it."""

    entry: Any
    parameters: dict[str, float]
    logits: torch.Tensor
    target: torch.Tensor
    upstream: torch.Tensor
    options: dict[str, Any]
    random: torch.Generator

    def run(self, function=None, **changes):
        """Loss and gradient; ``upstream`` weighs the gradients where there is one loss per row."""
        own = {"logits": self.logits, "target": self.target, "upstream": self.upstream}
        given = own | self.parameters | self.options | changes
        logits, target, upstream = (given.pop(name) for name in own)
        upstream = upstream if given["reduction"] == "none" else None
        return loss_and_grad(function or self.entry.function, logits, target, upstream, **given)

    def on(self, device: str) -> Problem:
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        tensors = {name: getattr(self, name).to(device) for name in ("logits", "target", "upstream")}
        return replace(self, **tensors, options=options)

    @property
    def class_dim(self) -> int:
        return min(1, self.logits.dim() - 1)

    @property
    def num_classes(self) -> int:
        return self.logits.shape[self.class_dim]

    @property
    def per_row(self) -> dict[str, torch.Tensor]:
        tensors = {"logits": self.logits, "target": self.target, "upstream": self.upstream}
        samples = self.options["sample_weight"]
        return tensors if samples is None else tensors | {"sample_weight": samples}

    @property
    def ignored(self) -> torch.Tensor:
        return self.target == self.options["ignore_index"]

    def row_weights(self) -> torch.Tensor:
        weight, sample_weight = self.options["weight"], self.options["sample_weight"]
        weights = torch.ones_like(self.target, dtype=torch.float64)
        if weight is not None:
            weights *= weight.double()[torch.where(self.ignored, 0, self.target)]
        if sample_weight is not None:
            weights *= sample_weight
        return torch.where(self.ignored, 0.0, weights)

    def one_hot(self) -> torch.Tensor:
        """In the dtype and shape of the logits; ignored rows are zero."""
        index = torch.where(self.ignored, 0, self.target).unsqueeze(self.class_dim)
        ones = (~self.ignored).unsqueeze(self.class_dim).to(self.logits.dtype)
        return torch.zeros_like(self.logits).scatter(self.class_dim, index, ones)
