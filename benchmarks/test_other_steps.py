"""Steps of `other_steps` on small inputs: each computes a loss and a gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks.other_steps import Step, probability_targets, row_statistics, wrapped

pytestmark = pytest.mark.any_cpu


def test_every_step_computes_a_gradient() -> None:
    target, leaf = torch.tensor([0, 2, 1]), torch.randn(3, 4, requires_grad=True)
    steps = {**probability_targets((3, 4), target), **row_statistics(target), **wrapped((3, 4), target)}
    assert len(steps) == 7 + 6 + 7
    for name, loss in steps.items():
        step = Step(loss, [leaf])
        step.run(0, step.prepare(0))
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0, name
