"""calibration: what its tools refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fused_losses as fl
from fused_losses.calibration import match_parameter, mean_target_error, plot_mean_target_error

pytestmark = pytest.mark.any_cpu  # no kernel


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean_target_error("gcee", 10, 0.0), ValueError, "loss must be one of .*gce.*, got 'gcee'"),
        (lambda: mean_target_error(3, 10, 0.0), TypeError, "loss must be a name, a Module or a function, got int"),
        (lambda: mean_target_error("gce", 1, 0.0), ValueError, "num_classes must be at least 2, got 1"),
        (lambda: mean_target_error("gce", 10, math.nan), ValueError, "z must be finite, got nan"),
        (lambda: mean_target_error("gce", 10, "0"), TypeError, "z must be a number, a tensor or an array, got str"),
        (lambda: mean_target_error("gce", 10, 0.0, q=-1.0), ValueError, "q must satisfy 0 < value < inf, got -1.0"),
        (lambda: mean_target_error(lambda x, y: x.sum(), 10, 0.0), ValueError, "loss must return one value per row"),
        (lambda: match_parameter("gce", "tau", 10, 5, 0.7), ValueError, "name must be one of q, logit_bias, got 'tau'"),
        (lambda: match_parameter("taylor_ce", "order", 10, 5, 2), ValueError, "got 'order', which takes integers"),
        (lambda: match_parameter("gce", "q", 10, 5, "0.7"), TypeError, "reference_value must be a number, got"),
        (lambda: match_parameter("gce", "q", 10, 5, math.nan), ValueError, "reference_value must be finite, got nan"),
        (
            lambda: match_parameter(torch.nn.MultiMarginLoss(), "margin", 10, 5, math.inf),
            ValueError,
            "reference_value must be finite, got inf",
        ),
        (
            lambda: match_parameter(torch.nn.MultiMarginLoss(), "margin", 10, 5, math.nan),
            ValueError,
            "reference_value must be finite, got nan",
        ),
        (lambda: match_parameter("gce", "q", 10, 5, 0.0), ValueError, "q must satisfy 0 < value < inf, got 0.0"),
        (
            lambda: match_parameter(torch.nn.Identity(), "q", 10, 5, 0.7),
            ValueError,
            "name must be an attribute of Ident",
        ),
        (
            lambda: match_parameter("gce", "q", 1000, 2, 1e-9),
            ValueError,
            "no value of q gives 1000 classes the mean error .* of 2 classes at q=1e-09: it stays between",
        ),
    ],
)
def test_tools_reject(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


NO_ROW_LOSSES = [
    lambda: fl.LogitNorm("gce"),
    lambda: fl.LogitClip("gce", 1.0),
    lambda: fl.GlobalMean(fl.GCELoss()),
    lambda: fl.LinearLoss(5, 10),
    lambda: fl.ELRLoss(100, 10),
    lambda: fl.GJSLoss((0.5, 0.5)),
    lambda: fl.SmallLoss(fl.GCELoss(), 0.5),
    lambda: fl.ClippedLoss(fl.GCELoss(), 1.0),
    lambda: fl.Antidote(fl.GCELoss(), 0.5),
    lambda: fl.SuperLoss(fl.GCELoss(), 1.0),
    fl.ZErrorCrossEntropyLoss,
    fl.ZErrorBCEWithLogitsLoss,
    fl.ZMSELoss,
    lambda: torch.compile(fl.SmallLoss(fl.GCELoss(), 0.5), backend="eager"),
    lambda: fl.GCELoss,
]


@pytest.mark.parametrize("make", NO_ROW_LOSSES, ids=range(len(NO_ROW_LOSSES)))
def test_tools_refuse_what_is_no_loss_of_single_rows(make: Any) -> None:
    loss = make()
    calls: list[Any] = [
        lambda: mean_target_error(loss, 10, 0.0),
        lambda: match_parameter(loss, "q", 10, 5, 0.7),
        lambda: match_parameter(loss, "logit_bias", 10, 5, 0.7),
        lambda: plot_mean_target_error(loss, 10, np.zeros(1)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"loss must be a name, a.*Module.*got"):
            call()


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (fl.GCELoss(), "foo", 1),
        (fl.GCELoss(), "forward", 1),
        (fl.GCELoss(), "stem", "mae"),
        (fl.GCELoss(), "training", False),
        (torch.nn.CrossEntropyLoss(), "foo", 1),
        (torch.nn.CrossEntropyLoss(), "forward", 1),
        (torch.nn.CrossEntropyLoss(), "logit_bias", 1.0),
        ("gce", "foo", 1),
        (fl.functional.gce_loss, "foo", 1),
    ],
)
def test_unknown_parameters_are_named(loss: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"(has no parameter|unexpected keyword argument) '{name}'"):
        mean_target_error(loss, 10, 0.0, **{name: value})
    with pytest.raises(ValueError, match=f"name must be .*got '{name}'"):
        match_parameter(loss, name, 10, 5, 0.5)


def test_corrections_are_losses_of_single_rows() -> None:
    matrix = 0.9 * torch.eye(10) + 0.01
    assert mean_target_error(fl.BackwardCorrectionLoss(matrix), 10, 0.0) < 0.0
    with pytest.raises(ValueError, match="logit_bias must be"):
        mean_target_error(fl.GCELoss(), 10, 0.0, logit_bias="x")  # type: ignore[arg-type]
