"""Image data sets that are published as arrays of pixels, written as class folders."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tetdist.datasets.index import index_splits
from tetdist.errors import UserError
from tetdist.storage.files import explaining, made_aside, remove
from tetdist.tracking.progress import sample_bar
from tetdist.wording import counted


class Split(NamedTuple):
    """Images of a split: pixels (N, H, W) or (N, H, W, 3), uint8, labels (N,), and file names
    without suffix; None: five digits of their numbers."""

    pixels: Any
    labels: Any
    names: Sequence[str] | None = None


def check_new(dest: Path) -> None:
    """Refuse a data root that has files already, before its source is read."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} exists and is not empty; name another folder or move it")


def write_root(
    dest: Path,
    classes: Sequence[str],
    splits: Mapping[str, Split],
    per_class: Mapping[str, int] | None = None,
) -> None:
    """Write a data root of PNG files and its indexes, in a temporary folder that is then renamed.

    Args:
        classes: A folder's name for each label; sorted, so that indexes keep the labels.
        splits: Images of train and val.
        per_class: The number of images of each class to take, for each split.
    """
    for leftover in dest.parent.glob(f".{dest.name}.*.tmp"):
        if not Path("/proc", leftover.name.split(".")[-2]).exists():  # of a killed process
            remove(leftover)
    with explaining(dest), made_aside(dest, sync=False) as aside:
        counts = {
            name: _write(aside / name, classes, split, (per_class or {}).get(name))
            for name, split in splits.items()
        }
        index_splits(aside, workers=len(os.sched_getaffinity(0)))
        # Flush the files to disk before the rename declares them complete.
        os.sync()
    print(
        f"{dest}: {counts['train']:,} images to train and {counts['val']:,} to validate, in "
        f"{counted(len(classes), 'class')}, and their indexes"
    )


def _write(folder: Path, classes: Sequence[str], split: Split, per_class: int | None) -> int:
    """Write the first images of each class, or all, and return their number."""
    written = [0] * len(classes)
    with sample_bar(len(split.labels), folder.name, silent=False) as bar:
        for number, label in enumerate(split.labels):
            bar.update()
            if written[label] == per_class:
                continue
            written[label] += 1
            name = split.names[number] if split.names else f"{number:05d}"
            file = folder / classes[label] / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(split.pixels[number])).save(file)
    return sum(written)
