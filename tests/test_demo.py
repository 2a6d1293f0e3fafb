"""The demo and the info command, run as a user would."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_losses as fl
from fused_losses import __main__ as command
from fused_losses import demo
from fused_losses._demo_data import Detection
from fused_losses._demo_losses import Z_SETTINGS, LossChoice, anneal_threshold, parse_losses
from fused_losses._demo_report import Result, save_numbers
from fused_losses.calibration import solve_logit_bias
from fused_losses.diagnostics import OutlierTracker

pytestmark = pytest.mark.any_cpu  # trainings; other tests judge the kernels

SHORT = ["--epochs", "2", "--seeds", "1", "--batch-size", "256"]


def png_size(path: Path) -> tuple[int, int]:
    image = pytest.importorskip("matplotlib.image")
    height, width, _ = image.imread(path).shape
    return int(width), int(height)


def test_demo_trains_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new folder" / "plot.png"
    assert command.main(["demo", "--losses", "ce,MAE*", *SHORT, "--seeds", "2", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert " CE " in printed and " MAE* " in printed and "+-" in printed and str(out) in printed
    assert 'logit_bias="auto", here 0.52' in printed
    assert "about 36% of the labels are wrong" in " ".join(printed.split())
    assert png_size(out) == (1350, 750)

    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["settings"]["seeds"] == 2 and numbers["settings"]["noise"] == 0.4
    assert [loss["name"] for loss in numbers["losses"]] == ["CE", "MAE*"]
    for loss in numbers["losses"]:
        curves = loss["test_accuracy_per_seed_and_epoch"]
        assert [len(curve) for curve in curves] == [2, 2]
        assert all(0.0 <= value <= 1.0 for curve in curves for value in curve)
        assert loss["best_test_accuracy"] == [max(curve) for curve in curves]
        assert loss["last_test_accuracy"] == [curve[-1] for curve in curves]
        assert loss["fused_microseconds_per_step"] > 0 and loss["plain_microseconds_per_step"] > 0
        assert len(loss["wrong_labels_ranked"]) == 2
        assert all(found["precision"] == found["recall"] > 0.4 for found in loss["wrong_labels_ranked"])  # chance: 0.36
    falls = [
        statistics.fmean(loss["best_test_accuracy"]) - statistics.fmean(loss["last_test_accuracy"])
        for loss in numbers["losses"]
    ]
    assert ("loses most" in " ".join(printed.split())) == (max(falls) >= 0.0005)  # as it is printed
    assert "logit_bias" not in numbers["losses"][0]
    assert numbers["losses"][1]["logit_bias"] == pytest.approx(solve_logit_bias(10))


def test_a_folder_gets_the_default_names(tmp_path: Path) -> None:
    assert demo.main(["--losses", "mae", *SHORT, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fused_losses_demo.json",
        "fused_losses_demo.png",
    ]


@pytest.mark.long
def test_losses_that_drop_rows_report_the_wrong_labels_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = ["--losses", "ce,hem,z_ce,z_ce_default"]
    assert demo.main([*losses, "--epochs", "12", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "OutlierTracker" in printed and "Z-CE default" in printed and "threshold=1.0" in printed
    assert "not for wrong labels" in printed and "about 36% of the labels are wrong" in printed
    numbers = json.loads((tmp_path / "fused_losses_demo.json").read_text())["losses"]
    assert ["wrong_labels_found" in loss for loss in numbers] == [False, False, True, True]
    tuned, default = (loss["wrong_labels_found"] for loss in numbers[2:])
    assert len(tuned) == len(default) == 2
    assert all(found["precision"] > 0.8 and found["recall"] > 0.5 for found in tuned)
    assert all(found["recall"] < 0.2 for found in default)
    assert numbers[2]["threshold"] == 1.0 and numbers[2]["running"] is True


def test_one_loss_is_not_compared_and_nothing_flagged_has_no_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--losses", "z_ce_default", *SHORT, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "ends highest" not in capsys.readouterr().out
    (loss,) = json.loads((tmp_path / "fused_losses_demo.json").read_text())["losses"]
    assert loss["wrong_labels_found"] == [{"precision": None, "recall": 0.0, "f1": 0.0}]


@pytest.mark.parametrize("stem", Z_SETTINGS)
def test_the_tracker_sees_wrong_labels_dropped_more_often(stem: str) -> None:
    (choice,) = parse_losses(stem)
    data = demo.load_data()
    recipe = demo.Recipe(noise=0.3, epochs=15, batch_size=128)
    target, _ = demo.plant_wrong_labels(data, recipe.noise, seed=5)
    tracker = OutlierTracker(len(target))
    demo.train_one(choice.module(), data, recipe, seed=5, on_epoch=lambda: None, tracker=tracker)
    assert tracker.times_seen.tolist() == [15] * len(target)
    wrong = target != data.train_target
    rate = tracker.flag_rate()
    assert rate[wrong].mean() > 2.0 * rate[~wrong].mean()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (9, 3), (60, 10)])
def test_the_threshold_comes_down_in_the_first_epochs(epochs: int, steps: int) -> None:
    loss = parse_losses("z_ce")[0].module()
    schedule = anneal_threshold(loss, epochs)
    assert schedule is not None and float(loss.threshold) == 10.0
    values = []
    for _ in range(steps + 1):
        schedule.step()
        values.append(float(loss.threshold))
    assert values[-2:] == [1.0, 1.0] and all(value > 1.0 for value in values[:-2])
    assert anneal_threshold(fl.MAELoss(), epochs) is None
    with pytest.raises(TypeError, match="must have a number as threshold, got Tensor"):
        anneal_threshold(loss, epochs)


def test_flags_are_compared_with_the_wrong_rows() -> None:
    wrong = torch.tensor([True, True, False, False, True])
    found = demo.compare_flags(torch.tensor([0, 2]), wrong)
    assert found == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    nothing = demo.compare_flags(torch.tensor([], dtype=torch.int64), wrong)
    assert math.isnan(nothing.precision) and nothing.recall == nothing.f1 == 0.0
    assert demo.mean_and_std([nothing.precision, 1.0]) == "-"
    assert demo.mean_and_std([1.0, 2.0], digits=1) == "1.5 +- 0.7"


def test_saved_numbers_are_strict_json(tmp_path: Path) -> None:
    result = Result(parse_losses("z_ce")[0], [[0.5]], 1.0, 2.0, [Detection(math.nan, 0.0, 0.0)])
    save_numbers([result], {}, tmp_path / "numbers.json")

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads((tmp_path / "numbers.json").read_text(), parse_constant=no_constant)["losses"]


def test_training_gives_threads_back() -> None:
    before = torch.get_num_threads()
    with demo.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("stem", [*fl.LOSSES, *Z_SETTINGS])
def test_every_registered_loss_can_be_trained_and_timed(stem: str) -> None:
    (choice,) = parse_losses(stem)
    data = demo.load_data(torch.device("cpu"))
    recipe = demo.Recipe(noise=0.4, epochs=1, batch_size=256)
    (accuracy,) = demo.train_one(choice.module(), data, recipe, seed=0, on_epoch=lambda: None)
    assert 0.0 <= accuracy <= 1.0
    fused_us, plain_us = demo.time_step(choice, batch_size=8, device=torch.device("cpu"), rounds=3)
    assert fused_us > 0 and plain_us > 0


def test_clean_labels_are_learned_and_a_seed_repeats() -> None:
    (choice,) = parse_losses("ce")
    data = demo.load_data(torch.device("cpu"))
    recipe = demo.Recipe(noise=0.0, epochs=5, batch_size=128)
    state = torch.get_rng_state()
    curves = [demo.train_one(choice.module(), data, recipe, seed=seed, on_epoch=lambda: None) for seed in (3, 3, 4)]
    assert curves[0][-1] > 0.9
    assert curves[0] == curves[1] != curves[2]
    assert torch.equal(state, torch.get_rng_state()), "the global random state must stay as it was"


@pytest.mark.parametrize(("noise", "num_classes"), [(0.0, 10), (0.4, 10), (0.4, 2), (1.0, 5)])
def test_label_noise_has_the_stated_rate_and_is_uniform(noise: float, num_classes: int) -> None:
    rows = 200_000
    target = torch.arange(rows) % num_classes
    noisy = demo.corrupt_labels(target, num_classes, noise, torch.Generator().manual_seed(1))
    assert noisy.dtype == target.dtype
    assert torch.equal(target, torch.arange(rows) % num_classes), "the given labels must not be overwritten"
    wrong = noise * (num_classes - 1) / num_classes
    tolerance = 5.0 * math.sqrt(0.25 / rows)  # five standard deviations of a share, at its largest
    assert float((noisy != target).float().mean()) == pytest.approx(wrong, abs=tolerance)
    if noise:
        shift = (noisy - target)[noisy != target] % num_classes
        shares = torch.bincount(shift, minlength=num_classes)[1:] / len(shift)
        assert shares.tolist() == pytest.approx([1.0 / (num_classes - 1)] * (num_classes - 1), abs=0.01)


def test_data_is_scaled_and_split_without_overlap() -> None:
    data = demo.load_data(torch.device("cpu"))
    assert len(data.train_inputs) + len(data.test_inputs) == 1797
    assert data.train_inputs.min() == 0.0 and data.train_inputs.max() == 1.0
    assert torch.bincount(data.test_target, minlength=10).min() > 45  # stratified: about 54 of each digit
    nearest = torch.cdist(data.test_inputs, data.train_inputs).min()
    assert nearest > 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ce", [("CE", "cross_entropy", False)]),
        ("cross_entropy, mae_loss", [("CE", "cross_entropy", False), ("MAE", "mae", False)]),
        ("MAELoss*", [("MAE*", "mae", True)]),
        ("gce,gce,gce*", [("GCE", "gce", False), ("GCE*", "gce", True)]),
        ("z_ce,Z-CE,ZErrorCrossEntropyLoss,z_error_cross_entropy", [("Z-CE", "z_ce", False)]),
        ("z_ce_default*", [("Z-CE default*", "z_ce_default", True)]),
    ],
)
def test_names_of_losses(text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert parse_losses(text) == [LossChoice(*fields) for fields in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--losses", "mse"], "unknown loss 'mse'; known: ce, z_ce, "),
        (["--losses", "mae,nonsense*"], "unknown loss 'nonsense'; known: ce, "),
        (["--losses", ","], "name at least one loss"),
        (["--noise", "1.5"], "must be a number from 0 to 1, got '1.5'"),
        (["--noise", "nan"], "must be a number from 0 to 1, got 'nan'"),
        (["--noise", "much"], "must be a number from 0 to 1, got 'much'"),
        (["--epochs", "0"], "must be a whole number from 1 to 1000000, got '0'"),
        (["--epochs", "9" * 5000], "must be a whole number from 1 to 1000000, got '9999"),
        (["--seeds", "2.5"], "must be a whole number from 1 to 1000000, got '2.5'"),
        (["--batch-size", "-1"], "must be a whole number from 1 to 1000000, got '-1'"),
        (["--batch-size", "10000000000"], "must be a whole number from 1 to 1000000, got '10000000000'"),
        (["--device", "tpu"], "must be cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--device", "cuda:x"], "must be cpu, cuda or cuda:INDEX, got 'cuda:x'"),
        (["--device", "cuda:99"], "'cuda:99' is not there: "),
        (["--out", "plot.pdf"], "must be a .png file or a folder, got 'plot.pdf'"),
    ],
)
def test_bad_options_are_explained(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["demo", *options])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert f"argument {options[0]}: {message}" in printed
    assert printed.count("\n") == 1, "one line, and no usage"


def test_a_star_needs_a_loss_with_a_logit_bias(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Entry:
        module = torch.nn.MSELoss

        @staticmethod
        def function(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return logits.sum() + target.sum()

    monkeypatch.setitem(fl.LOSSES, "unbiased", Entry())  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        demo.main(["--losses", "unbiased*"])
    assert "'unbiased' has no logit_bias, so 'unbiased*' means nothing" in capsys.readouterr().err


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_sklearn(name: str, *rest: Any) -> Any:
        return None if name == "sklearn" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_sklearn)
    with pytest.raises(SystemExit, match=r"the demo needs scikit-learn: pip install scikit-learn$"):
        demo.main([*SHORT, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/plot.png", "cannot create the folder of --out: "),
        ("taken/plot.png", "cannot write --out: .*plot.json"),  # a folder stands where the numbers would go
        ("/proc/plot.png", "cannot write --out: .*plot.png"),  # no user may, root included
    ],
)
def test_what_cannot_be_written_is_refused_before_training(
    out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "plot.json").mkdir(parents=True)

    def load_data(_: object) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(demo, "load_data", load_data)
    with pytest.raises(SystemExit, match=message) as caught:
        demo.main([*SHORT, "--out", str(tmp_path / out)])
    assert "\n" not in str(caught.value)


def test_trying_whether_files_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "folder" / "new"
    old.write_text("kept")
    demo.check_writable("--out", old, new)
    assert old.read_text() == "kept" and not new.exists()


def test_a_reader_that_leaves_ends_the_program_quietly() -> None:
    command_line = [sys.executable, "-m", "fused_losses", "info"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before the first line is written
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize(
    ("built", "running", "warns"),
    [
        ("13.0.88", "13.0", False),
        ("13.0.88", "13.2", False),
        ("13.0.88", "12.8", True),
        ("12.4.131", "13.0", True),
        ("13.0.88", None, False),
        (None, "12.8", False),
        (None, None, False),
    ],
)
def test_info_warns_of_another_cuda(
    monkeypatch: pytest.MonkeyPatch, built: str | None, running: str | None, warns: bool
) -> None:
    facts = {**fl.build_info(), "cuda": built}
    monkeypatch.setattr(fl, "build_info", lambda: facts)
    monkeypatch.setattr(torch.version, "cuda", running)
    warning = dict(command.info()).get("WARNING")
    assert (warning is not None) == warns
    if warning is not None:
        assert f"CUDA {built}" in warning and f"CUDA {running}" in warning


def test_info_lists_versions_build_devices_and_losses(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info"]) == 0
    printed = capsys.readouterr().out
    build = fl.build_info()
    expected = [
        build["version"],
        build["torch"],
        *build["isa"],
        torch.__version__,
        platform.python_version(),
        torch.backends.cpu.get_cpu_capability(),
        *fl.loss_names(),
    ]
    assert [word for word in expected if word not in printed] == []
    assert len(printed.splitlines()) == len(command.info())


@pytest.mark.parametrize("arguments", [[], ["bogus"]])
def test_a_command_is_required(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
