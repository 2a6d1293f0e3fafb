"""WebVision 1.0: its lists and folders (1708.02862)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = 1000
VALIDATION_FOLDERS = ("val_images_256", "val_images_resized", "val_images", "val")


@dataclass
class Lists:
    """Files and labels of both halves; ``describe`` says where a training sample comes from."""

    train: tuple[list[Path], Tensor]
    validation: tuple[list[Path], Tensor]
    describe: Callable[[int], str]


def read(root: Path, parts: Sequence[str], num_classes: int | None) -> Lists:
    """The lists of ``parts`` ("google", "flickr") and the validation list.

    Each line of ``train_filelist_<part>.txt`` is a path below ``root`` and a label, of ``val_filelist.txt`` a name in
    the folder of validation images and a label; the lists lie in ``root/info`` or in ``root``. Only the first
    ``num_classes`` classes are kept, as in the "mini" subset, which is the first 50 of Google's. Where
    ``train_meta_list_<part>.txt`` is there too, each sample is described by its file of metadata and its place in it.
    """
    unknown = set(parts) - {"google", "flickr"}
    if unknown:
        raise SystemExit(f"--webvision-parts must be of google, flickr, got {', '.join(sorted(unknown))}")
    kept_classes = CLASSES if num_classes is None else num_classes
    if kept_classes > CLASSES:
        raise SystemExit(f"--classes must be at most the {CLASSES} of WebVision, got {num_classes}")
    paths: list[Path] = []
    labels: list[int] = []
    metadata: list[str] = []
    for part in parts:
        rows = _read_labels(root, f"train_filelist_{part}.txt")
        notes = _read_list(root, f"train_meta_list_{part}.txt", required=False) or [("", 0)] * len(rows)
        if len(notes) != len(rows):
            raise SystemExit(
                f"train_meta_list_{part}.txt must have the {len(rows)} lines of its list, got {len(notes)}"
            )
        for (name, label), (file, position) in zip(rows, notes, strict=True):
            if label < kept_classes:
                paths.append(root / name)
                labels.append(label)
                # The metadata of google/q0001/... are in google_json/q0001.json.
                metadata.append(f" {file.replace(part, f'{part}_json', 1)}#{position}" if file else "")
    folder = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        raise SystemExit(f"{root} must have a folder of validation images: {', '.join(VALIDATION_FOLDERS)}")
    kept = [row for row in _read_labels(root, "val_filelist.txt") if row[1] < kept_classes]
    if not paths or not kept:
        counts = f"{len(paths)} to train on and {len(kept)} to validate"
        raise SystemExit(f"{root} must have samples of the first {kept_classes} classes, got {counts}")
    validation = ([folder / name for name, _ in kept], torch.tensor([label for _, label in kept]))

    def describe(i: int) -> str:
        path = paths[i].relative_to(root) if paths[i].is_relative_to(root) else paths[i]
        return f"{path}{metadata[i]}"

    return Lists((paths, torch.tensor(labels)), validation, describe)


def _read_labels(root: Path, name: str) -> list[tuple[str, int]]:
    rows = _read_list(root, name)
    for number, (_, label) in enumerate(rows, 1):
        if label >= CLASSES:
            raise SystemExit(f"{name}:{number} must have a label in [0, {CLASSES}), got {label}")
    return rows


def _read_list(root: Path, name: str, required: bool = True) -> list[tuple[str, int]]:
    path = next((place / name for place in (root / "info", root) if (place / name).is_file()), None)
    if path is None:
        if required:
            raise SystemExit(f"{name} must be in {root / 'info'} or {root}")
        return []
    rows = []
    # utf-8-sig: a mark at the file's start is no part of the first path.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise SystemExit(f"{path}:{number} must be a path and a number, got {line!r}")
        rows.append((name, int(label)))
    return rows
