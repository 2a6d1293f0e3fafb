"""The training driver: a few steps on each layout, processes that equal one, its options."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_layouts as layouts
from training_runs import MARKS, ROOT, SMALL, weights

import fused_losses as fl

pytest.importorskip("lightning", reason="the training driver needs Lightning")
pytest.importorskip("sklearn", reason="its digits are the data")

from benchmarks.training import engine
from benchmarks.training.__main__ import main
from benchmarks.training.criterion import PlainLoss, make_loss
from benchmarks.training.networks import make_network
from benchmarks.training.options import Options, parse
from benchmarks.training.report import compare
from benchmarks.training.sources import load
from fused_losses.calibration import solve_logit_bias

pytestmark = MARKS

LAYOUTS: list[tuple[str, Callable[[Path], object] | None, list[str]]] = [
    ("fashion-mnist", layouts.mnist, ["--model", "small_cnn", "--noise", "asymmetric"]),
    ("cifar10", layouts.cifar10, ["--model", "small_cnn", "--augment", "crop-flip", "--noise", "instance"]),
    ("cifar10", layouts.cifar10_python, ["--model", "resnet32", "--channels-last", "--optimizer", "sgd"]),
    ("cifar100", layouts.cifar100, ["--model", "small_cnn", "--loss", "gce", "--logit-bias", "auto"]),
    ("imagefolder", layouts.image_folder, ["--model", "small_cnn", "--image-size", "32", "--workers", "1"]),
    ("webvision", layouts.webvision, ["--model", "small_cnn", "--image-size", "32", "--classes", "3"]),
    ("digits", None, ["--loss", "hem", "--loss-args", "margin=plus", "--log", "json,csv,tensorboard"]),
    ("digit-strings", None, ["--samples", "200", "--loss", "mae", "--logit-bias", "3", "--bias-schedule", "linear"]),
    ("synthetic", None, ["--samples", "8", "--classes", "5", "--model", "small_cnn", "--amp", "bf16", "--plain"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "build", "more"), LAYOUTS, ids=[f"{name}-{more[1]}" for name, _, more in LAYOUTS])
def test_a_few_steps_on_each_layout(
    dataset: str,
    build: Callable[[Path], object] | None,
    more: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "tensorboard" in more[-1]:
        pytest.importorskip("tensorboard")
    arguments = ["--dataset", dataset, "--device", "cpu", "--out", str(tmp_path / "out"), "--batch-size", "4"]
    if build is not None:
        (tmp_path / "data").mkdir()
        build(tmp_path / "data")
        arguments += ["--data", str(tmp_path / "data")]
    main([*arguments, "--epochs", "2", "--max-steps", "3", *more])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["settings"]["dataset"] == dataset and result["world_size"] == 1
    if result["training_samples"] <= 12:  # an epoch ended within three steps
        assert "top-1" in printed and 0.0 <= result["best"]["top1"] <= 1.0
        lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert math.isfinite(lines[0]["train_loss"]) and lines[0]["samples_per_s"] > 0
    if dataset != "synthetic":
        with (tmp_path / "out" / "samples.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == result["training_samples"]
        assert sum(row["mean_probability"] != "" for row in rows) == min(12, result["training_samples"] // 4 * 4)
        assert ("q000" in rows[0]["source"]) == (dataset == "webvision")


@pytest.mark.slow
def test_training_learns_logs_and_finds_wrong_labels(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = dataclasses.replace(SMALL, samples=None, epochs=12, out=out, loss="mae", log="json,csv")
    result = engine.run(options)
    assert result["last"]["top1"] > 0.8 and result["best"]["top1"] >= result["last"]["top1"]
    assert [epoch["epoch"] for epoch in result["history"]] == list(range(12))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["top1"] for line in lines] == pytest.approx([epoch["top1"] for epoch in result["history"]])
    with (out / "csv" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    found = result["wrong_labels"]
    assert found["by_probability"]["precision"] > 0.6 and found["wrong"] == pytest.approx(0.36 * 1257, rel=0.1)
    with (out / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = rows[: found["wrong"]]
    precision = sum(row["label"] != row["true_label"] for row in first) / len(first)
    assert precision == pytest.approx(found["by_probability"]["precision"])
    assert float(first[0]["mean_probability"]) <= float(rows[-1]["mean_probability"])


# With 2 processes the sums over a batch are rounded differently. Adam divides gradients by their size, so the error
# stays small beside each weight's step, which is at most the learning rate of 1e-3.
PROCESSES_TOLERANCE = 1e-5
PROCESSES = """
import dataclasses, pathlib, sys, torch
from benchmarks.training import engine
from test_training_driver import PROCESS_RUNS
from training_runs import MARKS, SMALL
torch.set_num_threads(1)
for name, changes in PROCESS_RUNS.items():
    engine.run(dataclasses.replace(SMALL, **changes, out=pathlib.Path(sys.argv[1]) / name))
"""
PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "hem": {"loss": "hem", "epochs": 2, "accumulate": 2, "clip": 1.0},
    "z": {"loss": "gce", "z_threshold": 1.0, "z_anneal": 0.1},
    "average": {"logit_bias": "auto", "bias_schedule": "linear", "ema": 0.9},
    "fsdp": {"loss": "hem", "strategy": "fsdp", "epochs": 2},
}


@pytest.mark.long
def test_two_processes_equal_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    subprocess.run(
        [*launcher, "--standalone", str(script), str(tmp_path / "two")], cwd=ROOT, env=environment, check=True,
        capture_output=True, timeout=1800,
    )  # fmt: skip
    for name, changes in PROCESS_RUNS.items():
        alone = {**changes, "strategy": "auto"}
        result = engine.run(dataclasses.replace(SMALL, **alone, out=tmp_path / "one" / name))
        saved = json.loads((tmp_path / "two" / name / "result.json").read_text())
        assert saved["world_size"] == 2 and saved["wrong_labels"] == result["wrong_labels"]
        assert saved["last"]["top1"] == result["last"]["top1"]
        assert saved["last"]["train_loss"] == pytest.approx(result["last"]["train_loss"], rel=1e-5)
        a, b = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        b = {key.replace("loss.loss.", "loss."): value for key, value in b.items()}  # GlobalMean is around a loss
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=PROCESSES_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        # torchvision's counts for 1000 classes
        ("resnet34", (3,), 1000, 21_797_672),
        ("resnet50", (3,), 1000, 25_557_032),
        ("wide_resnet101_2", (3,), 1000, 126_886_696),
        # 464,154 of 1512.03385's shortcuts without parameters, and 1x1 convolutions with normalisation for two of them
        ("resnet32", (3, 32, 32), 10, 464_154 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
        ("mlp:256", (1, 8, 24), 1000, 193 * 256 + 257 * 256 + 257 * 1000),
    ],
)
def test_networks_have_the_published_size(name: str, shape: tuple[int, ...], classes: int, parameters: int) -> None:
    with torch.device("meta"):
        network = make_network(name, shape, classes, seed=0)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_weights_follow_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (make_network("small_cnn", (1, 28, 28), 10, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    pairs = [list(zip(first.parameters(), net.parameters(), strict=True)) for net in (same, other)]
    assert all(torch.equal(a, b) for a, b in pairs[0]) and not all(torch.equal(a, b) for a, b in pairs[1])


def test_timm_models_have_the_asked_classes() -> None:
    pytest.importorskip("timm")
    network = make_network("timm:resnet18", (1, 28, 28), 7, seed=0)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    with pytest.raises(SystemExit, match="timm:resnetx is no model of timm"):
        make_network("timm:resnetx", (3,), 7, seed=0)


def loss_of(**changes: Any) -> Any:
    return make_loss(Options(**changes), torch.arange(100) % 10, 10, steps=20)


def test_options_make_the_loss() -> None:
    loss, schedules = loss_of(loss="agce", loss_args=("a=1", "q=.5"), logit_bias="auto")
    assert isinstance(loss, fl.AGCELoss) and (loss.a, loss.q, loss.logit_bias) == (1, 0.5, "auto") and not schedules
    loss, _ = loss_of(loss="hem", loss_args=("margin=auto",))
    assert loss.margin == pytest.approx(math.sqrt(2000 / 100))
    loss, _ = loss_of(loss="hem", loss_args=("margin=plus",))
    assert loss.margin.tolist() == pytest.approx([math.sqrt(2000 / (10 * 10))] * 10)
    loss, (schedule,) = loss_of(loss="mae", logit_bias="auto", bias_schedule="linear")
    assert schedule.value == pytest.approx(solve_logit_bias(10))
    for _ in range(20):
        schedule.step()
    assert float(loss.logit_bias) == 0.0
    loss, (schedule,) = loss_of(loss="gce", z_threshold=1.5, z_statistic="loss", z_anneal=0.5)
    assert isinstance(loss, fl.ZErrorCrossEntropyLoss) and loss.statistic == "loss" and loss.sided == "lower"
    assert isinstance(loss.base, fl.GCELoss) and float(loss.threshold) == 10.0
    for _ in range(10):
        schedule.step()
    assert float(loss.threshold) == 1.5


def test_losses_of_more_than_a_row_train_too() -> None:
    loss, _ = loss_of(loss="gce", wrap="logit_norm=.5")
    assert isinstance(loss, fl.LogitNorm) and loss.t == 0.5 and isinstance(loss.loss, fl.GCELoss)
    few = Options(device="cpu", quiet=True, samples=200, batch_size=50, epochs=1)
    _, model = engine.fit(dataclasses.replace(few, loss="elr", loss_args=("beta=.9",)))
    remembered = model.loss.memory.abs().sum(1)
    assert model.loss.memory.shape == (200, 10) and bool((remembered > 0.0).all()), "every sample was seen"
    first, alone = (
        engine.fit(dataclasses.replace(few, loss="cores", epochs=1, cross_entropy_epochs=epochs))[1]
        for epochs in (1, 0)
    )
    cross_entropy = engine.fit(few)[1]
    assert first.history[0]["train_loss"] == cross_entropy.history[0]["train_loss"] != alone.history[0]["train_loss"]
    runs = [engine.fit(dataclasses.replace(few, epochs=3, l1=l1))[1] for l1 in (0.0, 0.1)]
    plain, small = (sum(float(p.detach().abs().sum()) for p in model.network.parameters()) for model in runs)
    assert small < 0.9 * plain


def test_data_that_are_given_are_those_of_the_options() -> None:
    options = dataclasses.replace(SMALL, epochs=1, seed=3, augment="crop-flip")
    given = engine.run(options, load(SMALL))
    assert given["history"][0]["train_loss"] == engine.run(options)["history"][0]["train_loss"]


def test_the_plain_loss_is_the_same_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(8, 10, generator=generator), torch.arange(8)
    plain, _ = loss_of(loss="gce", logit_bias="1.5", plain=True)
    assert isinstance(plain, PlainLoss)
    fused = fl.functional.gce_loss(logits, target, logit_bias=1.5)
    torch.testing.assert_close(plain(logits, target), fused)
    torch.testing.assert_close(plain.eval()(logits, target), fl.functional.gce_loss(logits, target))


def test_flags_are_compared_with_wrong_labels() -> None:
    wrong = torch.tensor([True, True, False, False, True])
    assert compare(torch.tensor([0, 2]), wrong) == {"precision": 0.5, "recall": 1 / 3, "f1": 0.4}
    assert compare(torch.tensor([], dtype=torch.int64), wrong) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_the_command_line_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]) == Options()
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(Options))
    given = parse(["--loss-args", "q=.5", "a=2", "--no-z-running", "--data", "folder", "--z-threshold", "2"])
    assert given.loss_args == ("q=.5", "a=2") and not given.z_running and given.data == Path("folder")
