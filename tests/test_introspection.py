"""Every public object survives being looked at, copied and pickled, as debuggers, tracers and data loaders do."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_losses as fl
from fused_losses._common import Criterion
from fused_losses.integrations import huggingface, mmengine, timm

pytestmark = pytest.mark.any_cpu

NAMESPACES: list[ModuleType] = [
    fl,
    fl.calibration,
    fl.cutoffs,
    fl.diagnostics,
    fl.functional,
    fl.reference,
    fl.schedules,
    fl.scores,
    huggingface,
    mmengine,
    timm,
]
PUBLIC = {f"{space.__name__}.{name}": getattr(space, name) for space in NAMESPACES for name in space.__all__}
DEFINITIONS = {name: thing for name, thing in PUBLIC.items() if not isinstance(thing, ModuleType)}


def z_moments(loss: Any) -> Any:
    loss(torch.randn(8, 3), torch.arange(8) % 3)
    return loss


def remembering(loss: Any) -> Any:
    loss(torch.randn(8, 3), torch.arange(8) % 3, torch.arange(8))
    return loss


def tracker() -> fl.OutlierTracker:
    result = fl.OutlierTracker(3)
    result.update([0, 2], [True, False], [0.5, -3.0], prob=[0.9, 0.1])
    return result


def collector() -> fl.CutoffCollector:
    result = fl.CutoffCollector()
    result.update(torch.randn(4), torch.tensor([0, 1, 0, 1]))
    return result


INSTANCES: dict[str, Callable[[], Any]] = {
    **{stem: entry.module for stem, entry in fl.LOSSES.items()},
    "weighted": lambda: fl.GCELoss(weight=torch.rand(3), logit_bias=torch.tensor(0.5)),
    "margins": lambda: fl.HEMLoss(margin=torch.rand(3)),
    "z_mse": fl.ZMSELoss,
    "z_mse running": lambda: fl.ZMSELoss(running=True),
    "z_bce": fl.ZErrorBCEWithLogitsLoss,
    "z_bce running": lambda: fl.ZErrorBCEWithLogitsLoss(running=True),
    "z_ce": fl.ZErrorCrossEntropyLoss,
    "z_ce around a Module": lambda: fl.ZErrorCrossEntropyLoss(base=fl.GCELoss(q=0.5)),
    "z_ce running": lambda: z_moments(fl.ZErrorCrossEntropyLoss(running=True)),
    "LogitNorm": lambda: fl.LogitNorm("gce", torch.tensor(0.5)),
    "LogitClip": lambda: fl.LogitClip(fl.GCELoss(q=0.5), 2.0),
    "SmallLoss": lambda: z_moments(fl.SmallLoss("gce", torch.tensor(0.5), running=True)),
    "ClippedLoss": lambda: fl.ClippedLoss("cross_entropy", 2.0),
    "Antidote": lambda: z_moments(fl.Antidote("cross_entropy", 0.5, running=True)),
    "SuperLoss": lambda: z_moments(fl.SuperLoss("gce", running=True)),
    "ELRLoss": lambda: remembering(fl.ELRLoss(8, 3, memory="host")),
    "ForwardCorrectionLoss": lambda: fl.ForwardCorrectionLoss(torch.eye(3)),
    "BackwardCorrectionLoss": lambda: fl.BackwardCorrectionLoss(torch.eye(3), weight=torch.rand(3)),
    "learnt correction": lambda: fl.ForwardCorrectionLoss(fl.TransitionMatrix(3)),
    "GJSLoss": lambda: fl.GJSLoss((0.5, 0.25, 0.25)),
    "GlobalMean": lambda: fl.GlobalMean(fl.GCELoss()),
    "OutlierTracker": tracker,
    "CutoffCollector": collector,
    "ClassStatistics": lambda: fl.class_statistics(torch.randn(4), torch.tensor([0, 0, 1, 1]), 3),
    "ZErrorResult": lambda: fl.ZErrorResult(torch.ones(()), torch.ones(2) > 0, torch.ones(2)),
    "ThresholdSchedule": lambda: fl.ThresholdSchedule(fl.ZErrorCrossEntropyLoss(), steps=3),
    "LogitBiasSchedule": lambda: fl.LogitBiasSchedule(fl.MAELoss(), 1.0, mode="plateau"),
    "huggingface.compute_loss": lambda: huggingface.compute_loss(fl.GCELoss()),
    "timm.MixupLoss": lambda: timm.MixupLoss(fl.GCELoss()),
    "mmengine.FusedLoss": lambda: mmengine.FusedLoss("gce", class_weight=[1.0, 2.0]),
}


def look_at_everything(thing: Any) -> None:
    inspect.getmembers(thing)
    for name in dir(thing):
        hasattr(thing, name)  # raises whatever is not an AttributeError
    assert repr(thing)
    assert pydoc.render_doc(thing)


def state(thing: Any) -> Any:
    """What equal objects of a kind have in common, in a form that can be compared."""
    if isinstance(thing, Tensor):
        return thing.dtype, thing.nan_to_num(-1e9).tolist()
    if isinstance(thing, (dict, tuple, list)):
        pairs = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return type(thing), [(key, state(value)) for key, value in pairs]
    if isinstance(thing, nn.Module):
        return type(thing), repr(thing), state(thing.state_dict())
    if type(thing).__module__.startswith("fused_losses") and hasattr(thing, "__dict__"):
        return type(thing), state(vars(thing))
    return thing


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda thing, n=n: pickle.loads(pickle.dumps(thing, n)) for n in (2, pickle.HIGHEST_PROTOCOL)},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_can_be_looked_at(name: str) -> None:
    look_at_everything(PUBLIC[name])


@pytest.mark.parametrize("name", DEFINITIONS)
def test_public_names_can_be_copied(name: str) -> None:
    thing = DEFINITIONS[name]
    for how, make in COPIES.items():
        copied = make(thing)
        if isinstance(thing, dict):
            assert copied.keys() == thing.keys(), how
        else:
            assert copied is thing, how


@pytest.mark.parametrize("name", DEFINITIONS)
def test_public_names_say_where_they_are(name: str) -> None:
    thing = DEFINITIONS[name]
    if callable(thing):
        if not inspect.isbuiltin(thing):  # compiled functions have theirs in the docstring
            inspect.signature(thing)
        assert inspect.getdoc(thing)
        assert thing.__module__.split(".")[0] == "fused_losses"


@pytest.mark.parametrize("name", INSTANCES)
def test_instances_can_be_looked_at(name: str) -> None:
    look_at_everything(INSTANCES[name]())


UNUSUAL: dict[str, Any] = {
    "reduction": "sum", "ignore_index": 7, "logit_bias": 0.5, "running": True, "min_count": 5, "small_class": "drop",
    "per_task": True, "memory": "host", "memory_dtype": torch.bfloat16, "shard": (0, 2), "momentum": 0.5,
    "weight": torch.ones(3), "chunk_bytes": 1 << 20, "skip_rows": True, "accumulate_dtype": torch.float64,
}  # fmt: skip
NEEDED: dict[str, Any] = {"loss": "gce", "keep": 0.5, "c": 2.0, "delta": 0.5, "num_samples": 8, "num_classes": 3}
NEEDED |= {"weights": (0.5, 0.5), "transition": torch.eye(3), "tau": 2.0, "in_features": 2}
KINDS = [kind for kind in vars(fl).values() if isinstance(kind, type) and issubclass(kind, Criterion)]
KINDS.remove(fl.GlobalMean)  # it has no options, and takes no name of a loss


def first_line(module: nn.Module) -> str:
    """Of the Module itself, without those inside."""
    return f"{type(module).__name__}({module.extra_repr()})"


@pytest.mark.parametrize("kind", KINDS)
def test_repr_names_every_option_that_is_not_the_default(kind: type[nn.Module]) -> None:
    parameters = inspect.signature(kind).parameters
    needed = {name: NEEDED[name] for name, p in parameters.items() if p.default is p.empty and name in NEEDED}
    usual = first_line(kind(**needed))
    for name in parameters.keys() & UNUSUAL.keys():
        given = UNUSUAL[name]
        shown = f"Tensor{list(given.shape)}" if isinstance(given, Tensor) else repr(given)
        assert f"{name}={shown}" in first_line(kind(**needed, **{name: given}))
        assert f"{name}=" not in usual


@pytest.mark.parametrize("stem", fl.LOSSES)
def test_repr_of_defaults_shows_the_own_parameters_alone(stem: str) -> None:
    kind, defaults = fl.LOSSES[stem].module, fl.LOSSES[stem].parameters
    own = ", ".join(f"{name}={defaults[name]!r}" for name in inspect.signature(kind).parameters if name in defaults)
    assert repr(kind()) == f"{kind.__name__}({own})"


def test_repr_of_a_default_that_depends_on_a_parameter() -> None:
    assert "reduction" not in repr(fl.MultiMarginLoss(mean_above_zero=True))
    assert "reduction='mean'" in repr(fl.MultiMarginLoss(mean_above_zero=True, reduction="mean"))


@pytest.mark.parametrize("name", INSTANCES)
def test_instances_without_memory_have_a_repr(name: str) -> None:
    thing = INSTANCES[name]()
    if isinstance(thing, nn.Module):
        assert repr(thing.to("meta"))


@pytest.mark.parametrize("name", INSTANCES)
def test_instances_can_be_copied(name: str) -> None:
    thing = INSTANCES[name]()
    before = str(state(thing))
    for how, make in COPIES.items():
        copied = make(thing)
        assert copied is not thing, how
        assert str(state(copied)) == before == str(state(thing)), how


@pytest.mark.parametrize(
    "name", [n for n in INSTANCES if n in fl.LOSSES or n.startswith(("z_ce", "weighted", "margins"))]
)
def test_copies_compute_the_same(name: str) -> None:
    module = INSTANCES[name]()
    logits, target = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    copies = [make(module) for make in COPIES.values()]
    expected = module(logits, target)
    for copied in copies[1:]:  # a shallow copy shares the buffers that running statistics are kept in
        assert torch.equal(copied(logits, target), expected)


def test_an_unknown_integration_is_an_attribute_error() -> None:
    import fused_losses.integrations as integrations

    assert not hasattr(integrations, "keras")
    assert {"huggingface", "mmengine", "timm"} <= {*dir(integrations)}
