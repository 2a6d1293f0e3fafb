"""Images in files: what becomes of their pixels, paths and damages, and shares without a row."""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import training_layouts as layouts

from benchmarks.training import transforms
from benchmarks.training.options import Options
from benchmarks.training.report import SampleReport
from benchmarks.training.samples import EpochBatches, FileSamples, Request
from benchmarks.training.sources import adapt, load
from fused_losses.diagnostics import OutlierTracker

pytestmark = pytest.mark.any_cpu
image = pytest.importorskip("PIL.Image")


def samples_of(*files: Path, size: int = 8) -> FileSamples:
    return FileSamples(files, torch.zeros(len(files), dtype=torch.int64), transforms.for_validation(size), size)


def read(file: Path, size: int = 8) -> torch.Tensor:
    return samples_of(file, size=size)[Request(0, torch.tensor([0]))].inputs[0]


def test_a_process_without_a_row_of_the_last_batch_gets_an_empty_one(tmp_path: Path) -> None:
    layouts.image_folder(tmp_path)
    data = load(Options(dataset="imagefolder", data=tmp_path, image_size=16))
    shares = [EpochBatches(3, 2, shuffle=False, rank=rank, world_size=2) for rank in range(2)]
    rows = [[len(data.validation[request].inputs) for request in share] for share in shares]
    assert rows == [[1, 1], [1, 0]]
    empty = data.validation[Request(0, torch.arange(0))]
    assert empty.inputs.shape == (0, 3, 16, 16) and empty.inputs.dtype == torch.uint8 and len(empty.target) == 0


@pytest.mark.parametrize("name", ["Stra\u00dfe \u4e2d.png", os.fsdecode(b"caf\xe9.png")])
def test_paths_may_have_any_characters(name: str, tmp_path: Path) -> None:
    layouts.image_folder(tmp_path)
    (tmp_path / "train" / "cat" / "0.jpg").rename(tmp_path / "train" / "cat" / name)
    data = load(Options(dataset="imagefolder", data=tmp_path, image_size=16))
    assert len(data.train[Request(0, torch.arange(len(data.train)))].inputs) == 6
    SampleReport(OutlierTracker(6), data.train.target, None, data.names).save(tmp_path / "samples.csv")
    assert os.fsencode(name) in (tmp_path / "samples.csv").read_bytes()


def test_lists_may_begin_with_a_mark_and_have_any_characters(tmp_path: Path) -> None:
    layouts.webvision(tmp_path)
    path = tmp_path / "info" / "train_filelist_google.txt"
    lines = path.read_bytes().replace(b"image 1.jpg 0", b"caf\xe9.jpg 0")
    path.write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "google/q0000/image 1.jpg").rename(tmp_path / "google/q0000" / os.fsdecode(b"caf\xe9.jpg"))
    data = load(Options(dataset="webvision", data=tmp_path, image_size=16))
    assert len(data.train[Request(0, torch.arange(len(data.train)))].inputs) == 9


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_images_of_16_bits_keep_their_greys(suffix: str, tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, axis=0)
    image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    image.fromarray(((ramp.astype(np.uint32) + 128) // 257).astype(np.uint8)).save(tmp_path / f"flat.{suffix}")
    deep, flat = (read(tmp_path / f"{name}.{suffix}", size=32) for name in ("deep", "flat"))
    assert torch.equal(deep, flat) and deep.min() < 40 and deep.max() > 215


def test_greys_of_unknown_range_are_refused(tmp_path: Path) -> None:
    image.fromarray(np.full((8, 8), 1e5, np.float32)).save(tmp_path / "float.tif")
    image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "int.tif")
    for name in ("float", "int"):
        with pytest.raises(RuntimeError, match=rf"{name}\.tif cannot be read .* 8 or 16 bits, got (70000|100000)"):
            read(tmp_path / f"{name}.tif")


def png(width: int, height: int, *, checksum: int = 0) -> bytes:
    """A black image; ``checksum`` damages that of its header."""

    def chunk(name: bytes, content: bytes, change: int = 0) -> bytes:
        whole = name + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole) ^ change)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), checksum)
    pixels = chunk(b"IDAT", zlib.compress(bytes((width // 8 + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [png(20_000, 20_000), png(8, 8, checksum=1), png(8, 8)[:40], b"", b"GIF89a\1\0\1\0"],
    ids=["too large", "checksum", "cut off", "empty", "header alone"],
)
def test_an_image_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"bad\.png cannot be read as an image: \w"):
        read(tmp_path / "bad.png")


def test_classes_are_visible_folders_with_images_at_any_depth(tmp_path: Path) -> None:
    layouts.image_folder(tmp_path)
    cat = tmp_path / "train" / "cat"
    for name in ("deep/er/3.BMP", "deep/4.tiff"):
        layouts.write_image(cat / name, seed=9)
    layouts.write_image(tmp_path / "train" / ".checkpoints" / "0.png", seed=9)
    layouts.write_image(cat / ".hidden" / "0.png", seed=9)
    (cat / "._0.jpg").write_bytes(b"of another system")
    (tmp_path / "linked").mkdir()
    layouts.write_image(tmp_path / "linked" / "inner" / "5.png", seed=9)
    (tmp_path / "train" / "eel").symlink_to(tmp_path / "linked")
    data = load(Options(dataset="imagefolder", data=tmp_path, image_size=16))
    names = [Path(data.names(i)).name for i in range(len(data.train))]
    assert names == ["0.jpg", "1.png", "2.png", "4.tiff", "3.BMP", "0.jpg", "1.png", "2.png", "5.png"]
    assert data.num_classes == 3 and data.train.target.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert len(data.train[Request(0, torch.arange(9))].inputs) == 9


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    layouts.image_folder(tmp_path)
    layouts.write_image(tmp_path / "train" / "cat" / "9.gif", seed=9)
    options = Options(dataset="imagefolder", data=tmp_path)
    with pytest.warns(UserWarning, match=r"train: 1 files are no images by their suffix, as .*9\.gif"):
        load(options)
    for path in (tmp_path / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(SystemExit, match=r"dog must have images \(.jpg.*\), got 3 other files"):
        load(options)


def test_classes_of_validation_are_those_of_training(tmp_path: Path) -> None:
    layouts.image_folder(tmp_path)
    layouts.write_image(tmp_path / "val" / "eel" / "0.png", seed=9)
    with pytest.raises(SystemExit, match=r"val must have classes of .*train, got eel$"):
        load(Options(dataset="imagefolder", data=tmp_path))


@pytest.mark.parametrize("name", ["train_filelist_google.txt", "val_filelist.txt"])
def test_labels_beyond_the_classes_of_webvision_are_refused(name: str, tmp_path: Path) -> None:
    layouts.webvision(tmp_path)
    path = tmp_path / "info" / name
    path.write_text(path.read_text().replace(" 2\n", " 1000\n"))
    with pytest.raises(SystemExit, match=rf"{name}:\d must have a label in \[0, 1000\), got 1000"):
        load(Options(dataset="webvision", data=tmp_path))


def test_paths_in_lists_may_be_absolute(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    layouts.webvision(tmp_path / "a")
    (tmp_path / "a" / "flickr").rename(tmp_path / "flickr")
    path = tmp_path / "a" / "info" / "train_filelist_flickr.txt"
    path.write_text(path.read_text().replace("flickr/", f"{tmp_path}/flickr/"))
    data = load(Options(dataset="webvision", data=tmp_path / "a", image_size=16))
    assert data.names(6) == f"{tmp_path}/flickr/q0000/image 0.jpg flickr_json/q0000.json#0"
    assert len(data.train[Request(0, torch.tensor([6]))].inputs) == 1


def test_loaded_samples_take_the_seed_and_augmentation_of_a_run(tmp_path: Path) -> None:
    layouts.cifar10(tmp_path)
    first = Options(dataset="cifar10", data=tmp_path)
    second = dataclasses.replace(first, seed=3, augment="crop-flip")
    data, request = load(first), Request(2, torch.arange(9))
    adapt(data, second)
    assert torch.equal(data.train[request].inputs, load(second).train[request].inputs)
    adapt(data, first)
    assert torch.equal(data.train[request].inputs, load(first).train[request].inputs)
