"""Schedules: what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_schedules import Thresholded

import fused_losses as fl
from fused_losses.schedules import LogitBiasSchedule, ThresholdSchedule

pytestmark = pytest.mark.any_cpu  # no kernel


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ThresholdSchedule(fl.MAELoss(), steps=3),
            TypeError,
            "module must have an attribute 'threshold', MAELoss",
        ),
        (lambda: ThresholdSchedule(Thresholded((2.0, 3.0)), steps=3), TypeError, "to be scheduled, got tuple"),
        (lambda: ThresholdSchedule(Thresholded()), ValueError, "steps must be an integer >= 1 .*, got None"),
        (lambda: ThresholdSchedule(Thresholded(), steps=0), ValueError, "steps must be an integer >= 1 .*, got 0"),
        (lambda: ThresholdSchedule(Thresholded(), steps=3, mode="plateau"), ValueError, "steps must be left out"),
        (
            lambda: ThresholdSchedule(Thresholded(), steps=3, mode="step"),
            ValueError,
            "mode must be 'linear', 'cosine', 'peak' or 'plateau', got 'step'",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(), 0.0, 2.0, 3),
            ValueError,
            "start must satisfy 0 < value < inf, got 0.0",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(), 1.0, -1.0, 3),
            ValueError,
            "end must satisfy 0 < value < inf, got -1.0",
        ),
        (lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, -1e300, 3), ValueError, r"end must be between .*, got -1e\+300"),
        (lambda: LogitBiasSchedule(fl.MAELoss(), math.inf, 0.0, 3), ValueError, "start must be between .*, got inf"),
        (
            lambda: LogitBiasSchedule(fl.MAELoss(logit_bias="auto"), steps=3),
            ValueError,
            "start must be between .*, got nan; module.logit_bias is no number",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(torch.ones(3)), torch.ones(2), 2.0, 3),
            ValueError,
            r"start must be a number or have the shape \(3,\) of module.threshold, got shape \(2,\)",
        ),
        (
            lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3, factor=1.0),
            ValueError,
            "factor must satisfy .*, got 1.0",
        ),
        (lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3, patience=-1), ValueError, "patience must be .*, got -1"),
        (
            lambda: LogitBiasSchedule(fl.MAELoss(), "1", steps=3),
            TypeError,
            "start must be a tensor, an array or a list",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(), mode="peak", steps=0),
            ValueError,
            "steps must be an integer >= 1 .* 0",
        ),
        (lambda: ThresholdSchedule(Thresholded(), steps=2.5), ValueError, "steps must be an integer >= 1 .*, got 2.5"),
        (lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3, min_delta=-1), ValueError, "min_delta must .*, got -1"),
        (lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, mode="peak", maximize="min"), TypeError, "maximize must be True"),
        (
            lambda: LogitBiasSchedule(fl.ZErrorCrossEntropyLoss(base=fl.MAELoss()), 1.0, steps=3),
            TypeError,
            r"module must hold the logit_bias that counts, which is that of its base: pass MAELoss",
        ),
    ],
)
def test_constructor_rejects(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_step_and_state_reject_what_does_not_fit() -> None:
    plateau = LogitBiasSchedule(fl.MAELoss(), 1.0, mode="plateau")
    linear = LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3)
    with pytest.raises(TypeError, match=r"step\(\) needs a metric with mode='plateau', got None"):
        plateau.step()
    with pytest.raises(TypeError, match=r"step\(\) takes no metric with mode='linear', got 0.5"):
        linear.step(0.5)
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        linear.load_state_dict({"fraction": 0.5})
    with pytest.raises(TypeError, match="state_dict must be a dictionary, got list"):
        linear.load_state_dict([("fraction", 0.5)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state_dict\['start'\] must be a tensor, an array or a list of numbers"):
        linear.load_state_dict({**linear.state_dict(), "start": None})
    per_class = ThresholdSchedule(Thresholded(torch.ones(3)), steps=3).state_dict()
    with pytest.raises(ValueError, match=r"must have shape \(\), got \(3,\)"):
        linear.load_state_dict(per_class)
    for name, value, message in [
        ("start", torch.tensor(math.nan), "start must .*, got nan"),
        ("fraction", 7.0, "fraction must satisfy 0 <= value <= 1, got 7.0"),
        ("fraction", math.nan, "fraction must .*, got nan"),
        ("best", math.nan, "best must be a number, got nan"),
        ("step_count", -1, "step_count must be an integer >= 0, got -1"),
        ("num_bad_steps", 0.5, "num_bad_steps must be an integer >= 0, got 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear.load_state_dict({**linear.state_dict(), name: value})
    with pytest.raises(TypeError, match="fraction must be a number"):
        linear.load_state_dict({**linear.state_dict(), "fraction": "half"})
    assert linear.value == 1.0 and plateau.step_count == 0
    at_once = ThresholdSchedule(Thresholded(3.0), math.inf, 2.0, mode="peak")
    with pytest.raises(ValueError, match=r"fraction must be 0 or 1 where start or end is inf, got 0\.5"):
        at_once.load_state_dict({**at_once.state_dict(), "fraction": 0.5})
    assert at_once.value == math.inf
