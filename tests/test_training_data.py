"""Data of the training driver: the published layouts, label noise from files, order and augmentation of samples."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_layouts as layouts
from torch.utils.data import DataLoader

from benchmarks.training import transforms
from benchmarks.training.binary_formats import read_mnist
from benchmarks.training.label_files import read_labels
from benchmarks.training.labels import apply_noise
from benchmarks.training.options import Options
from benchmarks.training.samples import EpochBatches, FileSamples, Request, TensorSamples, crop_and_flip, random_bits
from benchmarks.training.sources import load

pytestmark = pytest.mark.any_cpu


@pytest.mark.parametrize("name", layouts.IN_MEMORY)
def test_images_in_memory_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    dataset, build = layouts.IN_MEMORY[name]
    images, labels = build(tmp_path)
    data = load(Options(dataset=dataset, data=tmp_path))
    batch = data.train[Request(0, torch.tensor([3, 0]))]
    assert torch.equal(batch.inputs.flatten(1), images[[3, 0]].flatten(1)) and batch.inputs.dim() == 4
    assert torch.equal(data.train.target, labels) and batch.numbers.tolist() == [3, 0]
    assert data.num_classes == (100 if dataset == "cifar100" else 10) and data.pairs == dataset


def test_idx_files_need_not_be_compressed(tmp_path: Path) -> None:
    images, labels = layouts.mnist(tmp_path, suffix="")
    found = read_mnist(tmp_path, "train")
    assert torch.equal(found[0], images) and torch.equal(found[1], labels)


@pytest.mark.parametrize("name", layouts.IN_FILES)
def test_images_in_files(name: str, tmp_path: Path) -> None:
    dataset, build = layouts.IN_FILES[name]
    files, labels = build(tmp_path)
    data = load(Options(dataset=dataset, data=tmp_path, image_size=16, classes=3 if name == "webvision" else None))
    assert isinstance(data.train, FileSamples)
    assert [name.decode() for name in data.train.names] == [str(file) for file in files]
    assert torch.equal(data.train.target, labels) and data.num_classes == int(labels.max()) + 1
    batch = data.train[Request(0, torch.arange(len(files)))]
    assert batch.inputs.shape == (len(files), 3, 16, 16) and batch.inputs.dtype == torch.uint8
    again = data.train[Request(0, torch.arange(len(files)).flip(0))].inputs.flip(0)
    other = data.train[Request(1, torch.arange(len(files)))].inputs
    assert torch.equal(batch.inputs, again) and not torch.equal(batch.inputs, other)
    whole = data.validation[Request(0, torch.tensor([0]))].inputs
    assert torch.equal(whole, data.validation[Request(5, torch.tensor([0]))].inputs)


def test_webvision_describes_its_samples_and_has_a_mini_subset(tmp_path: Path) -> None:
    layouts.webvision(tmp_path)
    both = load(Options(dataset="webvision", data=tmp_path))
    assert both.num_classes == 1000 and not both.labels_are_true and len(both.train) == 9
    assert both.names(1) == "google/q0000/image 1.jpg google_json/q0000.json#1"
    assert both.names(8) == "flickr/q0002/image 0.jpg flickr_json/q0002.json#0"
    mini = load(Options(dataset="webvision", data=tmp_path, webvision_parts="google", classes=2))
    assert mini.num_classes == 2 and mini.train.target.tolist() == [0, 0, 1, 1] and len(mini.validation) == 2


def test_digit_strings_are_three_digits_side_by_side(tmp_path: Path) -> None:
    layouts.mnist(tmp_path)
    images, labels = read_mnist(tmp_path, "train")
    data = load(Options(dataset="digit-strings", data=tmp_path, samples=50))
    assert isinstance(data.train, TensorSamples) and data.train.inputs.shape == (50, 1, 28, 84)
    assert data.num_classes == 1000 and len(data.validation) == 5000
    for string, value in zip(data.train.inputs[:10, 0], data.train.target[:10].tolist(), strict=True):
        for digit, part in zip(f"{value:03}", string.split(28, dim=1), strict=True):
            same = (images / 255.0 == part).all((1, 2)).nonzero().flatten()
            assert labels[same].tolist() == [int(digit)]


def write_cifar_n(folder: Path, labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[str]:
    """Human labels as published for CIFAR-10N: a dictionary of arrays."""
    content = {"clean_label": labels, "worse_label": (labels + 1) % 10}
    torch.save(content, folder / "CIFAR-10_human.pt")
    np.savetxt(folder / "labels.txt", content["worse_label"], fmt="%d")
    torch.save(torch.from_numpy(content["worse_label"]), folder / "labels.pt")
    torch.save(content["worse_label"].tolist(), folder / "list.pt")
    np.save(folder / "labels.npy", content["worse_label"])
    (folder / "v1.2:a").mkdir()
    np.save(folder / "v1.2:a" / "labels.npy", content["worse_label"].astype(np.uint8))
    np.savetxt(folder / "labels", content["worse_label"], fmt="%d")
    return [
        "CIFAR-10_human.pt:worse_label",
        "labels.txt",
        "labels.pt",
        "list.pt",
        "labels.npy",
        "v1.2:a/labels.npy",
        "labels",
    ]


def test_noise_comes_from_files(tmp_path: Path) -> None:
    _, labels = layouts.cifar10(tmp_path)
    for name in write_cifar_n(tmp_path, labels.numpy()):
        options = Options(dataset="cifar10", data=tmp_path, noise=str(tmp_path / name))
        data = load(options)
        true = apply_noise(data, options)
        assert true is not None and torch.equal(true, labels)
        assert torch.equal(data.train.target, (labels + 1) % 10), name


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    import os
    import pickle

    class Bad:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"clean_label": Bad()}, tmp_path / "bad.pt")
    np.save(tmp_path / "bad.npy", {"clean_label": Bad()})  # type: ignore[arg-type]
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bad()))
    for name in ("bad.pt", "bad.npy", "pickle.npy"):
        with pytest.raises(SystemExit, match=rf"{name} must hold labels in a \.pt file, an array of numbers"):
            read_labels(tmp_path / name, "clean_label")
    layouts.cifar10_python(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({b"data": Bad()}))
    with pytest.raises(pickle.UnpicklingError, match="is not expected"):
        load(Options(dataset="cifar10", data=tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["symmetric", "symmetric-excluding", "asymmetric", "instance"])
def test_kinds_of_noise(kind: str, tmp_path: Path) -> None:
    layouts.mnist(tmp_path)
    options = Options(dataset="fashion-mnist", data=tmp_path, noise=kind, noise_rate=0.5)
    data = load(options)
    true = apply_noise(data, options)
    first = data.train.target
    apply_noise(data, options)
    assert torch.equal(first, data.train.target), "noise is added to the published labels, not to itself"
    assert true is not None and 0 < (first != true).sum() < 60
    options.seed = 1
    apply_noise(data, options)
    assert not torch.equal(first, data.train.target)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_batches_of_one(world_size: int) -> None:
    def batches(rank: int, size: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
        sampler = EpochBatches(50, 12, shuffle=shuffle, seed=3, rank=rank, world_size=size)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        return [request.numbers.tolist() for request in sampler]

    for epoch in (0, 5):
        whole = batches(0, 1, epoch)
        parts = [batches(rank, world_size, epoch) for rank in range(world_size)]
        assert [list(chain(*rows)) for rows in zip(*parts, strict=True)] == whole
        assert len(whole) == 4 and len({row for batch in whole for row in batch}) == 48
    assert batches(0, 1, 0) != batches(0, 1, 5)
    validation = chain(*(chain(*batches(rank, world_size, 0, shuffle=False)) for rank in range(world_size)))
    assert sorted(validation) == list(range(50))


def test_a_resumed_epoch_has_the_batches_that_are_left() -> None:
    sampler = EpochBatches(50, 10, shuffle=True, seed=1)
    sampler.set_epoch(2)
    whole = [request.numbers.tolist() for request in sampler]
    fresh = EpochBatches(50, 10, shuffle=True, seed=1)
    fresh.resume(2, 3)
    assert [request.numbers.tolist() for request in fresh] == whole[3:] and len(fresh) == 5
    fresh.set_epoch(3)
    assert len(list(fresh)) == 5


def test_orders_are_permutations_that_look_random() -> None:
    bits = random_bits(0, 0, torch.arange(20_000), 2)
    shares = (bits[:, :, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(axis=0)
    # Each bit is 1 half of the time, up to five standard deviations of a share.
    assert abs(shares - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)
    for other in (random_bits(1, 0, torch.arange(20_000), 2), random_bits(0, 1, torch.arange(20_000), 2)):
        same = (~(bits ^ other)[:, :, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean()
        assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(bits.size * 64)


def test_augmentation_shifts_and_flips_each_image_by_its_own_draw() -> None:
    images = torch.arange(6 * 2 * 8 * 8, dtype=torch.float32).view(6, 2, 8, 8)
    bits = np.array([[4, 4, 0], [0, 8, 0], [4, 4, 1], [8, 0, 1], [13, 5, 2], [7, 2, 3]], dtype=np.uint64)
    found = crop_and_flip(images, bits)
    for image, result, (down, right, flip) in zip(images, found, bits.tolist(), strict=True):
        padded = torch.nn.functional.pad(image, (4,) * 4)
        top, left = down % 9, right % 9
        part = padded[:, top : top + 8, left : left + 8]
        assert torch.equal(result, part.flip(2) if flip % 2 else part)
    assert torch.equal(found[0], images[0])


def test_workers_change_nothing() -> None:
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = TensorSamples(images, torch.arange(40), augment=True, seed=4)

    def epoch(workers: int) -> list[torch.Tensor]:
        sampler = EpochBatches(40, 8, shuffle=True, seed=4)
        return [batch[0] for batch in DataLoader(samples, sampler=sampler, batch_size=None, num_workers=workers)]

    alone, helped = epoch(0), epoch(2)
    assert len(alone) == 5 and all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_own_transforms_do_what_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    ramp = np.add.outer(np.arange(60), np.arange(90)).astype(np.uint8)
    photo = image.fromarray(np.stack([ramp, ramp // 2, 255 - ramp], axis=2))
    results = []
    for torchvision in (False, True) if transforms.has_torchvision() else (False,):
        monkeypatch.setattr(transforms, "has_torchvision", lambda answer=torchvision: answer)
        results.append(transforms.for_validation(28)(photo))
        torch.manual_seed(0)
        parts = torch.stack([transforms.for_training(28)(photo) for _ in range(200)])
        assert parts.shape == (200, 3, 28, 28) and parts.dtype == torch.uint8
        flipped = (parts[:, 0, :, 0].float().mean(1) > parts[:, 0, :, -1].float().mean(1)).float().mean()
        assert 0.35 < flipped < 0.65  # half, with a standard deviation of 3.5 %
        # Distances between columns say how wide a part was cut: from 8 % of the area to all of it.
        slope = (parts[:, 2, 14, 20].float() - parts[:, 2, 14, 8].float()).abs() / 12
        assert slope.min() < 1.0 and slope.max() > 1.9
    for result in results:
        assert (result.float() - results[0].float()).abs().max() <= 2  # roundings of two resizings
    middle = results[0][0].float()
    assert middle[14, 14] == pytest.approx(float(ramp[30, 45]), abs=3)


BAD = [
    ({"dataset": "fashion-mnist", "data": "{}"}, "--data must be a folder with train-images-idx3-ubyte"),
    ({"dataset": "digits", "data": "{}"}, "--data must be a folder with train-images-idx3-ubyte(?!.*fashion)"),
    ({"dataset": "webvision", "data": "{}", "classes": 1001}, "--classes must be at most the 1000 of WebVision"),
    ({"dataset": "cifar10"}, "--dataset cifar10 needs --data"),
    ({"dataset": "cifar100", "data": "{}"}, "neither train.bin nor train in"),
    ({"dataset": "imagefolder", "data": "{}"}, "must have folders train and val"),
    ({"dataset": "webvision", "data": "{}"}, "train_filelist_google.txt must be in"),
    ({"dataset": "webvision", "data": "{}", "webvision_parts": "bing"}, "must be of google, flickr, got bing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_missing_files_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {name: Path(value.format(tmp_path)) if name == "data" else value for name, value in changes.items()}
    with pytest.raises(SystemExit, match=message):
        load(Options(**given))  # type: ignore[arg-type]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    layouts.mnist(tmp_path, suffix="")
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte must hold 47040 bytes"):
        read_mnist(tmp_path, "train")
    path.write_bytes(b"\x89PNG....")
    with pytest.raises(SystemExit, match="is no idx file"):
        read_mnist(tmp_path, "train")
    layouts.cifar100(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"12345")
    with pytest.raises(SystemExit, match="must hold a multiple of 3074 bytes, got 5"):
        load(Options(dataset="cifar100", data=tmp_path))
    layouts.webvision(tmp_path)
    (tmp_path / "info" / "val_filelist.txt").write_text("val000000.jpg\n")
    with pytest.raises(SystemExit, match=r"val_filelist\.txt:1 must be a path and a number"):
        load(Options(dataset="webvision", data=tmp_path))
    (tmp_path / "flickr" / "q0000" / "image 0.jpg").write_bytes(b"no image")
    samples = FileSamples([tmp_path / "flickr/q0000/image 0.jpg"], torch.zeros(1), transforms.for_validation(8), 8)
    with pytest.raises(RuntimeError, match=r"image 0\.jpg cannot be read as an image"):
        samples[Request(0, torch.tensor([0]))]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("wrong", "--noise must be one of none, symmetric"),
        ("{}/none.npy", "none.npy is missing"),
        ("{}/CIFAR-10_human.pt", "append :KEY, one of clean_label, worse_label"),
        ("{}/CIFAR-10_human.pt:bad", "append :KEY, one of clean_label, worse_label"),
        ("{}/labels.npy:worse_label", "has no 'worse_label'"),
        ("{}/short.txt", "must hold 50 labels, got 1"),
        ("{}/high.npy", r"must hold labels in \[0, 10\), got 0 to 90"),
    ],
)
def test_bad_noise_is_named(noise: str, message: str, tmp_path: Path) -> None:
    _, labels = layouts.cifar10(tmp_path)
    write_cifar_n(tmp_path, labels.numpy())
    (tmp_path / "short.txt").write_text("1\n")
    np.save(tmp_path / "high.npy", 10 * labels.numpy())
    options = Options(dataset="cifar10", data=tmp_path, noise=noise.format(tmp_path))
    with pytest.raises(SystemExit, match=message):
        apply_noise(load(options), options)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npy", lambda path: np.save(path, np.arange(50) + 0.7), r"whole numbers of shape \(N,\), got float64"),
        ("a.npy", lambda path: np.save(path, np.eye(50, dtype=int)), r"got int64 of shape \(50, 50\)"),
        ("a.npy", lambda path: np.save(path, np.zeros((50, 1), int)), r"got int64 of shape \(50, 1\)"),
        ("a.npy", lambda path: np.save(path, np.arange(50) > 3), "got bool"),
        ("a.npy", lambda path: np.save(path, ["a"] * 50), "got <U1"),
        ("a.npz", lambda path: np.savez(path, np.arange(50)), "one whole number a line: "),
        ("a.npy", lambda path: path.write_bytes(b"junk"), "a.npy must hold labels in .*: "),
        ("a.pt", lambda path: path.write_bytes(b"junk"), "a.pt must hold labels in .*: "),
        ("a.pt", lambda path: torch.save(torch.arange(50) + 0.7, path), "got float32"),
        ("a.pt", lambda path: torch.save([[1], [2, 3]], path), "got object"),
        ("a.txt", lambda path: path.write_text("cat\n" * 50), "one whole number a line: .*'cat'"),
        ("a.txt", lambda path: path.write_text("1.0\n" * 50), "one whole number a line: .*'1.0'"),
        ("a.csv", lambda path: path.write_text("0,1\n" * 50), "one whole number a line: .*'0,1'"),
        ("a.txt", lambda path: path.write_text("0 1\n" * 25), r"got int64 of shape \(25, 2\)"),
        ("a.txt", lambda path: path.write_text("0 1\n"), r"got int64 of shape \(1, 2\)"),
        ("a.txt", lambda path: path.write_text(""), "must hold 50 labels, got 0"),
    ],
)
def test_files_that_hold_no_labels_are_refused(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    layouts.cifar10(tmp_path)
    write(tmp_path / name)
    options = Options(dataset="cifar10", data=tmp_path, noise=str(tmp_path / name))
    with pytest.raises(SystemExit, match=message):
        apply_noise(load(options), options)
