"""Options of the training driver and of the other commands: what they refuse, before data and training."""

from __future__ import annotations

import runpy
import sys

import pytest

pytest.importorskip("lightning", reason="the training driver needs Lightning")
pytest.importorskip("sklearn", reason="its digits are the data")

import itertools

from benchmarks.training.__main__ import main

pytestmark = pytest.mark.any_cpu

BAD: list[tuple[list[str], str]] = [
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--z-threshold", "nan"], "--z-threshold.* must .*got .*nan"),
    (["--z-threshold", "-1"], "--z-threshold.* must .*got .*-1"),
    (["--lr", "nan"], "--lr.* must .*got .*nan"),
    (["--weight-decay", "nan"], "--weight-decay.* must .*got .*nan"),
    (["--lr-batch", "0"], "--lr-batch.* must .*got .*0"),
    (["--model", "mlp:x"], "--model.* must .*got .*mlp:x"),
    (["--model", "mlp:0"], "--model.* must .*got .*mlp:0"),
    (["--seed", "-1"], "--seed.* must .*got .*-1"),
    (["--seed", "18446744073709551615"], r"--seed must satisfy 0 <= value < 2\*\*32, got 18446744073709551615"),
    (["--workers", "-1"], "--workers.* must .*got .*-1"),
    (["--out", "/proc/x"], "--out.* must .*got .*/proc/x"),
    (["--samples", "0"], "--samples.* must .*got .*0"),
    (["--classes", "0"], "--classes.* must .*got .*0"),
    (["--clip", "-1"], "--clip.* must .*got .*-1"),
    (["--momentum", "2"], "--momentum.* must .*got .*2"),
    (["--warmup", "nan"], "--warmup.* must .*got .*nan"),
    (["--l1", "-1"], "--l1.* must .*got .*-1"),
    (["--checkpoint-steps", "0"], "--checkpoint-steps.* must .*got .*0"),
    (["--noise-rate", "1.5"], "--noise-rate must be between 0 and 1, got 1.5"),
    (["--ema", "1"], "--ema must satisfy 0 < value < 1"),
    (["--log", "json,xml"], "--log must be of json, csv, tensorboard, got xml"),
    (["--loss", "mea"], "--loss must be elr or one of cross_entropy.*got 'mea'"),
    (["--loss", "gce", "--loss-args", "p=.5"], r"a parameter of gce \(q\), got 'p=.5'"),
    (["--loss", "gce", "--loss-args", "q=-1"], "--loss gce: q must satisfy 0 < value"),
    (["--loss", "mae", "--logit-bias", "much"], "--loss mae: logit_bias must be"),
    (["--model", "resnet33"], "--model must be resnet32.*got 'resnet33'"),
    (["--model", "resnet33", "--dataset", "webvision"], "--model must be resnet32.*got 'resnet33'"),  # before the data
    (["--batch-size", "2000"], "--batch-size must be at most the 1257 training samples, got 2000"),
    (["--noise", "asymmetric"], "--noise asymmetric has no pairs of classes for digits"),
    (["--loss", "elr", "--loss-args", "lam=-1"], "--loss elr: lam must"),
    (["--loss", "elr", "--logit-bias", "1"], "--loss elr excludes --logit-bias"),
    (["--wrap", "softmax=1"], "--wrap must be NAME=NUMBER of logit_norm.*got 'softmax=1'"),
    (["--wrap", "logit_clip=-1"], "--wrap must be .*got 'logit_clip=-1'"),
    (["--wrap", "logit_norm=1", "--plain"], "--wrap excludes --plain"),
    (["--strategy", "fsdp", "--ema", ".9"], "--strategy fsdp excludes --ema and --l1"),
    (["--strategy", "fsdp", "--l1", ".1"], "--strategy fsdp excludes --ema and --l1"),
    (["--plain", "--z-threshold", "2"], "--plain and --z-threshold exclude each other"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--device", "cpu", "--quiet", *arguments])


def test_batch_normalisation_over_processes_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--sync-batchnorm must be left out on the CPU"):
        main(["--device", "cpu", "--quiet", "--sync-batchnorm"])


def test_what_max_steps_reached_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--quiet", "--samples", "320", "--batch-size", "64", "--epochs", "1", "--max-steps", "3"])
    assert "top-1: last" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "command",
    [
        "benchmarks --tries 0",
        "benchmarks --minutes nan",
        "benchmarks.gpu_check --minutes -1",
        "benchmarks.linear time --repeats 0",
        "benchmarks.linear time --threads 0",
        "benchmarks.linear traffic --ranks 0",
        "benchmarks.training.experiments hem --seeds 0",
        "benchmarks.training.experiments hem --threads 0",
        "benchmarks.training.experiments hem --minutes nan",
        "benchmarks.training --lr nan",
        "benchmarks.training --loss mea --dataset cifar10",
    ],
)
def test_commands_end_with_status_2(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert caught.value.code == 2
    flag, value = next((a, b) for a, b in itertools.pairwise(arguments) if a.startswith("--"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{flag} must" in last and "got" in last and value in last
