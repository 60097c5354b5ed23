"""Class folders, SPLIT/CLASS/FILE: their samples, and the files that are ignored."""

import os
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import Literal

from tetdist.datasets import archives
from tetdist.errors import UserError, typed
from tetdist.wording import and_more, meant, meant_path

Kind = Literal["images", "events"]

# Suffixes of images are those of torchvision's ImageFolder, in any case.
SUFFIXES: dict[Kind, tuple[str, ...]] = {"images": archives.IMAGE_SUFFIXES, "events": (".npy",)}
# Usual names of the folders of both splits, in lower case.
USUAL_NAMES: dict[Literal["train", "val"], tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "testing"),
}


@dataclass
class PassedOver:
    """Ignored files: for each suffix and place, their number and the first of them."""

    suffixes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, path: str, place: str = "") -> None:
        """Count a file."""
        suffix = (PurePath(path).suffix.lower() or "no suffix") + place
        number, first = self.suffixes.get(suffix, (0, path))
        self.suffixes[suffix] = number + 1, first

    def __len__(self) -> int:
        return sum(number for number, _ in self.suffixes.values())

    def __str__(self) -> str:
        return ", ".join(
            f"{number} with {suffix} ({first}{', ...' if number > 1 else ''})"
            for suffix, (number, first) in sorted(self.suffixes.items())
        )


def list_classes(root: str | Path, split: str, kind: Kind) -> tuple[str, ...]:
    """Return the sorted class names of a split in class folders, without hidden ones."""
    folder = Path(root, split)
    check_root(Path(root))
    if not folder.is_dir():
        if folder.is_symlink():
            raise UserError(f"{folder} is a link that leads to no folder; correct or remove it")
        raise UserError(
            f"the data folder {root} has neither a folder {split!r} nor tar files of this split"
            f"{_way_out(Path(root), split, kind)}"
        )
    classes = names_in(folder, is_folder)
    if len(classes) < fewest_classes(split):
        what = f"only one class folder, {classes[0]!r}" if classes else "no class folders"
        raise UserError(f"{folder} holds {what}; make one for each class (in val/, one is enough)")
    return classes


def check_root(root: Path) -> None:
    """Refuse a data root that is no folder."""
    if not root.is_dir():
        near = meant_path(root, "give one with train/ and val/")
        raise UserError(f"there is no data folder {root}; {near}")


def list_class(folder: Path, kind: Kind) -> tuple[list[str], list[str]]:
    """List the names of a class folder's samples, and of its other files, without hidden ones."""
    folders = names_in(folder, is_folder)
    if folders:
        raise UserError(
            f"{folder} holds a folder, {folders[0]!r}: move its files into the class folder itself"
        )
    names = names_in(folder, lambda _: True)
    samples = [name for name in names if name.lower().endswith(SUFFIXES[kind])]
    return samples, sorted(set(names) - set(samples))


def names_in(folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> tuple[str, ...]:
    """Return the sorted names of a folder's wanted entries, without hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.name[0] != "." and wanted(e)))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether a path is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def folders_called(root: Path, split: str) -> tuple[str, ...]:
    """Return the names of folders that may hold "train" or "val" under another usual name."""
    names = [name for part, names in USUAL_NAMES.items() if part == split for name in names]
    return names_in(root, lambda entry: entry.name.lower() in names and is_folder(entry))


def fewest_classes(split: str) -> int:
    """Return the minimum number of classes of a split: evaluation needs one, training two."""
    return 2 if split == "train" else 1


def is_held_out(split: str) -> bool:
    """Return whether a split has a usual name of evaluation data."""
    return split.lower() in USUAL_NAMES["val"]


def root_advice(root: Path, split: str, kind: Kind) -> str | None:
    """Return the advice for a folder that is not a data root, but holds or is a part of one."""
    files = chain(root.glob("splits/*/index/*.npz"), root.glob("*/index/*.npz"))
    made = sorted({str(file.parent.parent) for file in files})
    if made:
        return f"{root} holds data roots: use {' or '.join(made[:5])}"
    if (root / "recordings.jsonl").is_file():
        return f"{root} holds binned recordings without a split: repeat `{typed('prebin_dvs')}`"
    folders = names_in(root, is_folder)
    usual = [*USUAL_NAMES["train"], *USUAL_NAMES["val"]]
    has_splits = any(name.lower() in usual for name in folders)
    deeper = [one for one in folders for part in USUAL_NAMES if folders_called(root / one, part)]
    if deeper and not has_splits:
        return f"did you mean {root / deeper[0]}?"
    if folders and not has_splits and root.name.lower() in usual:
        return f"this is a {root.name}/ folder itself: give {root.parent}"

    def holds_samples(folder: Path) -> bool:
        suffixes = SUFFIXES[kind]
        return len(names_in(folder, lambda entry: entry.name.lower().endswith(suffixes))) > 0

    if not folders and root.name.lower() not in usual and holds_samples(root):
        part = root.absolute().parent
        if part.name.lower() in usual:
            return f"this is a class folder itself: give {part.parent}"
        only = f"to evaluate only, to {root / 'val'}/CLASS, where one class is enough"
        return f"its files are in no class folders: move them to {root / 'train'}/CLASS; {only}"
    file = next(chain(root.glob("*/*/*.*"), root.glob("*/*.*")), None)
    known = (*SUFFIXES["events"], *SUFFIXES["images"])
    if kind == "events" and file and file.suffix.lower() not in known:
        command = f"{typed('prebin_dvs')} {shlex.quote(str(root))} DEST --timesteps T"
        return f"{file} is not a tensor (.npy): bin recordings first, `{command}`"
    classes = [name for name in folders if holds_samples(root / name)]
    if classes and not has_splits:
        names = ", ".join(classes[:3]) + and_more(classes, shown=3)
        return f"class folders ({names}) are in {root} itself: move them into {root / split}"
    return None


def _way_out(root: Path, split: str, kind: Kind) -> str:
    """Return the advice for a missing split: a folder with another usual name, or a new one."""
    if advice := root_advice(root, split, kind):
        return f"; {advice}"
    others = folders_called(root, split)
    if not others:
        make = f"make {root / split}, with one folder of files per class"
        make += f", or link shards, `ln -s FOLDER {root / split}`" * (kind == "images")
        return f"; {meant(split, names_in(root, is_folder), make)}"
    name, link = shlex.quote(others[0]), shlex.quote(str(root / split))
    evaluate = f"; to evaluate only, --splits {name}" if split == "val" else ""
    return (
        f"; there is {others[0]!r}: rename it to {split!r}, or link it, `ln -s {name} {link}`"
        f"{evaluate}"
    )


def first_difference(
    first: Collection[str], second: Collection[str], names: tuple[str, str]
) -> tuple[str, str]:
    """Find the first name that is in only one of two collections.

    Returns:
        The name, and "in FIRST but not in SECOND", by their ``names``, or vice versa.
    """
    name, *others = sorted(set(first) ^ set(second))
    has, lacks = names if name in first else reversed(names)
    same = [f", which has {one!r}" for one in others if one.lower() == name.lower()]
    more = f" ({len(others)} more differ)" * bool(others)
    return name, f"in {has} but not in {lacks}{same[0] if same else ''}{more}"
