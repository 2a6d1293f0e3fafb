"""Helpers that work on the CPU do not follow torch's default device and dtype, nor modes without derivatives."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fused_losses as fl

LABELS = torch.arange(60) % 4
LOGITS = torch.linspace(-3.0, 3.0, 60)


def collect():
    collector = fl.CutoffCollector()
    collector.update(LOGITS, LABELS % 2)
    collector.load_state_dict(collector.merge(collector).state_dict())
    return collector.logits, collector.labels, collector.logit_cutoff_from_gaussians()


def remember_on_the_host():
    loss = fl.ELRLoss(60, 4, memory="host")
    logits = LOGITS[:, None].expand(60, 4).clone()
    weight = torch.ones_like(LOGITS).requires_grad_()  # of which the kernel has no derivative
    values = [loss(logits, LABELS, torch.arange(60, device="cpu"), weight).detach() for _ in range(2)]
    return *values, loss.state_dict()["memory"]


CALLS = {
    "symmetric": lambda: fl.noise.symmetric(LABELS, 0.4, 4),
    "symmetric to others": lambda: fl.noise.symmetric(LABELS, 0.4, 4, redraw=False),
    "from_matrix": lambda: fl.noise.from_matrix(LABELS, torch.full((4, 4), 0.25, dtype=torch.float64, device="cpu")),
    "instance_dependent": lambda: fl.noise.instance_dependent(LOGITS[:, None], LABELS, 0.4, 4),
    "mean_target_error": lambda: fl.calibration.mean_target_error("gce", 10, 0.5),
    "mean_target_error of a sample": lambda: fl.calibration.mean_target_error(fl.NCELoss(), 10, 0.5),
    "match_parameter": lambda: fl.calibration.match_parameter("gce", "q", 20, 10, 0.7),
    "cut-offs": collect,
    "memory on the host": remember_on_the_host,
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_defaults(name):
    right = CALLS[name]()
    for others in (torch.device("meta"), default_dtype(torch.float64), torch.inference_mode(), torch.no_grad()):
        with others:
            found = CALLS[name]()
        torch.testing.assert_close(found, right, rtol=1e-6, atol=0)
