"""Images in one folder a class, found as torchvision's ImageFolder finds them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read(root: Path) -> dict[str, list[Path]]:
    """The images of each class, a folder in ``root``, at any depth. Hidden folders and files are none of it.

    Raises:
        SystemExit: a class has no images, or there is no class.
    """
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found: dict[str, list[Path]] = {}
    left_out: list[Path] = []
    for name in classes:
        paths = _visible_files(root / name)
        found[name] = [path for path in paths if path.suffix.lower() in SUFFIXES]
        left_out += [path for path in paths if path.suffix.lower() not in SUFFIXES]
        if not found[name]:
            raise SystemExit(f"{root / name} must have images ({', '.join(SUFFIXES)}), got {len(paths)} other files")
    if not classes:
        raise SystemExit(f"{root} must have a folder with images for each class, got no folder")
    if left_out:
        warnings.warn(f"{root}: {len(left_out)} files are no images by their suffix, as {left_out[0]}", stacklevel=2)
    return found


def _visible_files(folder: Path) -> list[Path]:
    """In order of their paths, those behind links included."""
    files = []
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)
