"""Write Fashion-MNIST as image folders: `python tools/fashion_mnist.py DEST`.

60,000 images to train and 10,000 to validate become DEST/train/CLASS/*.png and DEST/val/CLASS/*.png
and are indexed. They are read from the Debian package dataset-fashion-mnist, or with --source from
a folder with the four IDX files, compressed or not.
"""

import argparse
import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from tetdist.apps.cli.common import documented_parser, run_command
from tetdist.apps.images.arrays import Split, check_new, write_root
from tetdist.errors import UserError
from tetdist.storage.files import open_file

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of the uncompressed files. MNIST has the same names and sizes.
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# A class's folder begins with its number, so that indexes have the published labels.
_CLASSES = (
    *("0-t-shirt-top", "1-trouser", "2-pullover", "3-dress", "4-coat", "5-sandal", "6-shirt"),
    *("7-sneaker", "8-bag", "9-ankle-boot"),
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return run_command(
        lambda: make(options.source, options.dest),
        interrupted="stopped; the same command starts over",
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = documented_parser("fashion_mnist", __doc__)
    parser.add_argument("dest", metavar="DEST", type=Path, help="new data root")
    parser.add_argument(
        "--source",
        metavar="DIR",
        type=Path,
        default=DEBIAN,
        help=f"folder with the IDX files, {', '.join(_SHA256)} (or .gz); default: {DEBIAN}",
    )
    return parser.parse_args(arguments)


def make(source: Path, dest: Path) -> None:
    """Write the images as a data root."""
    check_new(dest)
    splits = {}
    for split, part in (("train", "train"), ("val", "t10k")):
        pixels, labels = (
            np.frombuffer(_content(source, f"{part}-{file}-ubyte")[header:], np.uint8)
            for file, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
        splits[split] = Split(pixels.reshape(-1, 28, 28), labels)
    write_root(dest, _CLASSES, splits)


def _content(source: Path, name: str) -> bytes:
    """Return an uncompressed file of Fashion-MNIST, after a comparison with its checksum."""
    plain, compressed = source / name, source / f"{name}.gz"
    file = plain if plain.exists() else compressed
    if not file.exists():
        raise UserError(
            f"{source} has neither {name} nor {name}.gz; install the Debian package "
            "dataset-fashion-mnist, or name the folder of the IDX files with --source"
        )
    try:
        with open_file(file) as opened:
            content = opened.read() if file == plain else gzip.decompress(opened.read())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}); get it again") from error
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise UserError(
            f"{file} is incomplete or from another data set (its SHA-256 is not "
            f"{_SHA256[name][:16]}...); get Fashion-MNIST's file again"
        )
    return content
