"""Unpack a CIFAR archive into image folders: `python tools/cifar.py ARCHIVE DEST`.

The archive is cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, as its authors publish them
(https://www.cs.toronto.edu/~kriz/cifar.html). Its images become DEST/train/CLASS/*.png and
DEST/val/CLASS/*.png (val: the archive's test images), and are indexed. The archives for Python are
refused, because they hold pickles, which can run any code.
"""

import argparse
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tetdist.apps.cli.common import documented_parser, run_command
from tetdist.apps.images.arrays import Split, check_new, write_root
from tetdist.errors import UserError
from tetdist.storage.files import open_file

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Kind:
    """The contents of one of the two archives."""

    files: dict[str, tuple[str, ...]]  # of each split
    names: str  # text file of the classes' names, in the order of their numbers
    label_bytes: int  # before the pixels of each image; the last of them is the class
    num_classes: int


CIFAR10 = Kind(
    {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "val": ("test_batch.bin",)},
    "batches.meta.txt",
    1,
    10,
)
# The byte before the class names one of 20 groups of classes.
CIFAR100 = Kind({"train": ("train.bin",), "val": ("test.bin",)}, "fine_label_names.txt", 2, 100)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return run_command(
        lambda: make(options.archive, options.dest, options.per_class),
        interrupted="stopped; the same command starts over",
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = documented_parser("cifar", __doc__)
    parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="CIFAR's binary .tar.gz")
    parser.add_argument("dest", metavar="DEST", type=Path, help="new data root")
    parser.add_argument(
        "--per-class",
        metavar="TRAIN,VAL",
        type=_two_numbers,
        help="take only the first images of each class, for a quick study: 500,100",
    )
    return parser.parse_args(arguments)


def _two_numbers(text: str) -> dict[str, int]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers above 0, such as 500,100")
    return dict(zip(("train", "val"), map(int, numbers), strict=True))


def make(archive: Path, dest: Path, per_class: dict[str, int] | None) -> None:
    """Write the images of an archive as a data root."""
    check_new(dest)
    kind, files = read(archive)
    classes = _classes(kind, files[kind.names], archive)
    splits = {
        split: _split(kind, [files[name] for name in names], f"{archive}: {split}")
        for split, names in kind.files.items()
    }
    write_root(dest, classes, splits, per_class)


def read(archive: Path) -> tuple[Kind, dict[str, bytes]]:
    """Return the archive's kind, and the contents of its files by base name.

    Nothing is unpacked to the disk, so a path in the archive cannot escape the folder.
    """
    known = {name for kind in (CIFAR10, CIFAR100) for name in _names(kind)}
    files: dict[str, bytes] = {}
    try:
        with open_file(archive) as file, tarfile.open(fileobj=file) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                name = PurePosixPath(member.name).name
                if name not in known:
                    continue
                stream = tar.extractfile(member)
                assert stream is not None, "it is a file"
                files[name] = stream.read()
            assert tar.fileobj is not None, "it is open"
            tar.fileobj.read(-1)  # up to the checksum at the end
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or no tar; get it again"
        raise UserError(f"{archive} cannot be read as a tar archive: {reason}") from error
    for kind in (CIFAR10, CIFAR100):
        if _names(kind) <= files.keys():
            return kind, files
    some = CIFAR100 if _names(CIFAR100) & files.keys() else CIFAR10
    raise UserError(
        f"{archive} lacks {', '.join(sorted(_names(some) - files.keys()))}; take "
        "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, not the archives for Python, which "
        "hold pickles"
    )


def _names(kind: Kind) -> set[str]:
    return {kind.names, *(name for names in kind.files.values() for name in names)}


def _classes(kind: Kind, text: bytes, archive: Path) -> list[str]:
    """Return the class names, each usable as a folder name."""
    names = text.decode(errors="replace").split()
    plain = all(name.replace("_", "").isalnum() and name.isascii() for name in names)
    if len(set(names)) != kind.num_classes or len(names) != kind.num_classes or not plain:
        raise UserError(f"{archive}: {kind.names} does not hold {kind.num_classes} class names")
    return names


def _split(kind: Kind, files: list[bytes], place: str) -> Split:
    """Return the images of a split, in the archive's order."""
    records: Any = np.frombuffer(b"".join(files), np.uint8)
    size = kind.label_bytes + _PIXELS
    if not len(records) or any(len(file) % size for file in files):
        raise UserError(f"{place} has a file that ends within an image")
    records = records.reshape(-1, size)
    labels = records[:, kind.label_bytes - 1]
    if labels.max() >= kind.num_classes:
        raise UserError(
            f"{place} has the label {labels.max()}; the largest class is {kind.num_classes - 1}"
        )
    pixels = records[:, kind.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(pixels, labels)
