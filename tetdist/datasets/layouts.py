"""Layouts of a split on disk, and the list of its samples: class folders, shards, official tars.

| layout | train | val |
|---|---|---|
| class folders | ROOT/train/CLASS/FILE | ROOT/val/CLASS/FILE |
| WebDataset shards | ROOT/train/*.tar, or ROOT/*-train-*.tar | the same with val or validation |
| official tars | ROOT/ILSVRC2012_img_train.tar | ROOT/ILSVRC2012_img_val.tar and the devkit |
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tetdist.datasets import archives
from tetdist.datasets.archives import BadFile, ByteRange, Member
from tetdist.datasets.class_folders import (
    SUFFIXES,
    Kind,
    PassedOver,
    check_root,
    fewest_classes,
    first_difference,
    folders_called,
    is_folder,
    is_held_out,
    list_class,
    list_classes,
    names_in,
)
from tetdist.datasets.processes import ReportProgress, run_tasks
from tetdist.errors import UserError
from tetdist.storage.files import read_text
from tetdist.wording import and_more, counted

# Names of a split in public shards.
_ALIASES = {"val": ("val", "validation")}
CLASSES_FILE = "classes.txt"
_DEVKIT_FILE = "ILSVRC2012_devkit_t12.tar.gz"
IMAGENET = "imagenet-1k"


@dataclass(kw_only=True)
class Listing:
    """A split's samples as listed, N of them, sorted by label, then by name.

    Attributes:
        classes: The class names; a label is a position among them.
        names: Paths relative to the data root, or names in an archive.
        class_mtimes_ns: Modification time of each class folder; empty with archives.
        archives: The tar files that hold the samples, sorted; empty with class folders.
        bad: Samples that cannot be used, such as those without a label.
        passed_over: Other files among the samples, except hidden ones.
        options: Command-line options that list the split again.
    """

    kind: Kind
    split: str
    classes: tuple[str, ...]
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    byte_ranges: list[ByteRange] = field(default_factory=list)
    class_mtimes_ns: list[int] = field(default_factory=list)
    archives: tuple[str, ...] = ()
    bad: list[BadFile] = field(default_factory=list)
    passed_over: PassedOver = field(default_factory=PassedOver)
    options: str = ""

    def path(self, i: int) -> str:
        """Return the path of sample `i` for messages, with its archive's name first."""
        return f"{self.byte_ranges[i].file}/{self.names[i]}" if self.archives else self.names[i]


def list_split(
    root: str | Path,
    split: str,
    kind: Kind,
    workers: int = 1,
    class_names: str | None = None,
    progress: ReportProgress | None = None,
) -> Listing:
    """List a split in any of the layouts.

    Args:
        workers: Number of processes that read tar files.
        class_names: Class names in the order of the shards' labels: a text file with one name per
            line, or "imagenet-1k" for its 1,000 WordNet ids.
        progress: Called with the number of tar files or class folders listed, and of all.
    """
    root = Path(root)
    if not in_tars(root, split, kind):
        return _list_folder(root, split, kind, progress)
    if _shards_of(root, split):
        return _list_shards(root, split, workers, class_names, progress)
    if split == "train":
        return _list_training_tar(root, _official_tar(split), split, workers, progress)
    return _list_validation_tar(root, _official_tar(split), split)


def in_tars(root: Path, split: str, kind: Kind) -> bool:
    """Return whether a split is read from tar files, not from class folders."""
    check_root(root)
    return kind == "images" and (
        bool(_shards_of(root, split))
        or (not (root / split).is_dir() and (root / _official_tar(split)).is_file())
    )


def _official_tar(split: str) -> str:
    return f"ILSVRC2012_img_{split}.tar"


def default_splits(root: Path) -> tuple[str, ...]:
    """Return the default splits: train and val.

    Without training data, the default is "val" alone, or a folder with another usual name for it;
    without validation data and such a folder, it is "train" alone.
    """
    check_root(root)
    if not is_there(root, "train") and not folders_called(root, "train"):
        others = ("val",) if is_there(root, "val") else folders_called(root, "val")
        if len(others) == 1:
            return others
    elif not is_there(root, "val") and not folders_called(root, "val"):
        return ("train",)
    return ("train", "val")


def check_splits(root: Path, splits: Sequence[str]) -> None:
    """Refuse to index a training split with an evaluation split that training would not find."""
    others = [split for split in splits if is_held_out(split)]
    if "train" in splits and others and "val" not in splits and not is_there(root, "val"):
        name, link = shlex.quote(others[0]), shlex.quote(str(root / "val"))
        raise UserError(
            f"--splits: training needs 'train' and 'val', and would not find {others[0]!r}: rename"
            f" or link it, `ln -s {name} {link}`, and leave out --splits; or, for evaluation only,"
            f" index {others[0]!r} alone"
        )


def is_there(root: Path, split: str) -> bool:
    """Return whether a split is there, in any layout, or a link to it, which may lead nowhere."""
    return (
        (root / split).is_dir()
        or (root / split).is_symlink()
        or (root / _official_tar(split)).is_file()
        or bool(_shards_of(root, split))
    )


def check_same_classes(classes: Mapping[str, tuple[str, ...]]) -> None:
    """Check that a label means the same in several splits."""
    (first, expected), *others = classes.items()
    for split, names in others:
        if names != expected:
            if set(names) == set(expected):
                raise UserError(
                    f"the classes of {first} and {split} are in different orders: name them in one"
                    " order with --classes"
                )
            name, where = first_difference(expected, names, (first, split))
            lacking = split if name in expected else first
            raise UserError(
                f"the class {name!r} is {where}: both splits must have the same classes; rename it,"
                f" move some of its files into {lacking}/{name} (for shards, name the classes with"
                " --classes), or index --splits train alone, and train with data.held_out=0.1"
            )


def _list_folder(
    root: Path, split: str, kind: Kind, progress: ReportProgress | None = None
) -> Listing:
    listing = Listing(kind=kind, split=split, classes=list_classes(root, split, kind))
    empty = list[str]()
    for name in names_in(root / split, lambda entry: not is_folder(entry)):
        listing.passed_over.add(f"{split}/{name}", " outside class folders")
    for label, name in enumerate(listing.classes):
        folder = root / split / name
        # The time is read first: a file added after it must make the index outdated.
        listing.class_mtimes_ns.append(folder.stat().st_mtime_ns)
        samples, others = list_class(folder, kind)
        for file in others:
            listing.passed_over.add(f"{split}/{name}/{file}")
        if not samples:
            empty.append(f"{split}/{name}")
        listing.labels.extend([label] * len(samples))
        listing.names.extend(f"{split}/{name}/{file}" for file in samples)
        if progress is not None:
            progress(label + 1, len(listing.classes))
    none = f"no {kind} ({', '.join(SUFFIXES[kind])})"
    if not listing.names:
        there = f", but {listing.passed_over}" if listing.passed_over else ""
        add = "index tensors with --events" if " .npy" in there else "add some"
        raise UserError(f"the class folders of {root / split} hold {none}{there}; {add}")
    listing.bad = [BadFile(one, f"the folder holds {none}; add some or remove it") for one in empty]
    listing.byte_ranges = [ByteRange(name) for name in listing.names]
    return listing


def _list_shards(
    root: Path, split: str, workers: int, class_names: str | None, progress: ReportProgress | None
) -> Listing:
    files = _shards_of(root, split)
    paths = [root / file for file in files]
    samples = list(run_tasks(archives.shard_samples, paths, workers, progress))
    labels = {label for found in samples for label in found.labels}
    if not labels:
        raise UserError(
            f"the shards of {split} in {root} hold no image with a label (KEY.jpg with KEY.cls or"
            " KEY.json): check that they are WebDataset shards"
        )
    classes = _shard_classes(root, split, max(labels), class_names)
    listing = _of_archives(split, classes, files)
    if class_names:
        listing.options = f" --classes {shlex.quote(class_names)}"
    for file, found in zip(files, samples, strict=True):
        _add(listing, file, found.members, found.labels)
        listing.bad.extend(BadFile(f"{file}/{path}", reason) for path, reason in found.bad)
    return _sorted(listing)


def _shards_of(root: Path, split: str) -> list[str]:
    """Find a split's shards by their names, as sorted paths relative to the root."""
    if (root / split).is_dir():
        files = [f"{split}/{name}" for name in names_in(root / split, _is_tar)]
    else:
        words = "|".join(_ALIASES.get(split, (re.escape(split),)))
        name = re.compile(rf"(.*[-_.])?({words})[-_.]\d.*")
        files = [file for file in names_in(root, _is_tar) if name.fullmatch(file)]
    _check_no_gaps(root, files)
    return files


def _is_tar(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.name.endswith(".tar") and entry.is_file()
    except OSError:  # A link to itself.
        return False


def _check_no_gaps(root: Path, files: list[str]) -> None:
    """Refuse shards, numbered from 0, if one is missing: it was not fetched."""
    parts = [re.fullmatch(r"(.*?)(\d+)(\.tar)", file) for file in files]
    numbers = {int(part[2]) for part in parts if part}
    if len(numbers) == len(files) and files and (first := parts[0]) is not None:
        missing = sorted(set(range(max(numbers) + 1)) - numbers)
        if missing:
            name = f"{first[1]}{missing[0]:0{len(first[2])}d}{first[3]}"
            raise UserError(
                f"the shard {name}{and_more(missing)} is missing in {root}: fetch it, or number"
                " the others without a gap"
            )


def _shard_classes(
    root: Path, split: str, last_label: int, class_names: str | None
) -> tuple[str, ...]:
    """Return the class names for labels up to `last_label`; by default the numbers themselves.

    Numbers get leading zeros, so that the names sort in the same order.
    """
    beside = [root / split / CLASSES_FILE, root / CLASSES_FILE]
    file = Path(class_names) if class_names else next(filter(Path.is_file, beside), None)
    if class_names == IMAGENET:
        classes = imagenet_classes()
    elif file:
        classes = tuple(line.strip() for line in read_text(file).splitlines())
    else:
        width = len(str(last_label))
        classes = tuple(f"{label:0{width}d}" for label in range(last_label + 1))
    if len(set(classes)) != len(classes) or "" in classes:
        raise UserError(
            f"{file} names a class twice, or has an empty line: it must hold one name per line"
        )
    if len(classes) <= last_label or len(classes) < fewest_classes(split):
        raise UserError(
            f"the shards of {split} have labels up to {last_label}, but there are {len(classes)}"
            f" class names{f' in {file}' if file else ''}: name each class with --classes (training"
            " needs at least two)"
        )
    return classes


def imagenet_classes() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's 1,000 classes, sorted in the order of its labels."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo(IMAGENET).label_names())


def _list_training_tar(
    root: Path, file: str, split: str, workers: int, progress: ReportProgress | None
) -> Listing:
    tars = archives.class_tars(root / file)
    listing = _of_archives(split, sorted(tars), [file])
    if len(tars) < 2:
        raise UserError(
            f"{root / file} holds {counted(len(tars), 'tar')} of classes, but at least two are"
            " needed: fetch it again"
        )
    inner = [tars[name] for name in listing.classes]
    members = run_tasks(archives.images, inner, workers, progress)
    for label, (name, (found, others)) in enumerate(zip(listing.classes, members, strict=True)):
        for other in others:
            listing.passed_over.add(f"{file}/{name}.tar/{other}")
        if not found:
            raise UserError(f"the class {name} in {root / file} holds no images: fetch it again")
        named = [member._replace(name=f"{name}.tar/{member.name}") for member in found]
        _add(listing, file, named, [label] * len(named))
    return _sorted(listing)


def _list_validation_tar(root: Path, file: str, split: str) -> Listing:
    devkit = root / _DEVKIT_FILE
    if not devkit.is_file():
        raise UserError(f"the labels of {root / file} are missing: put {_DEVKIT_FILE} beside it")
    members, others = archives.images(ByteRange(str(root / file)))
    members.sort()
    if not members:
        raise UserError(f"{root / file} holds no images: fetch it again")
    classes, ids = archives.validation_labels(devkit, len(members))
    listing = _of_archives(split, classes, [file])
    for other in others:
        listing.passed_over.add(f"{file}/{other}")
    labels = {name: label for label, name in enumerate(classes)}
    _add(listing, file, members, [labels[one] for one in ids])
    return _sorted(listing)


def _of_archives(split: str, classes: Sequence[str], files: Sequence[str]) -> Listing:
    """Make a listing without samples."""
    return Listing(kind="images", split=split, classes=tuple(classes), archives=tuple(files))


def _add(listing: Listing, file: str, members: list[Member], labels: list[int]) -> None:
    listing.names.extend(member.name for member in members)
    listing.byte_ranges.extend(ByteRange(file, member.offset, member.size) for member in members)
    listing.labels.extend(labels)


def _sorted(listing: Listing) -> Listing:
    """Sort by class, then by name, as in class folders, so that all layouts give the same data."""
    rows = sorted(zip(listing.labels, listing.names, listing.byte_ranges, strict=True))
    listing.labels = [label for label, _, _ in rows]
    listing.names = [name for _, name, _ in rows]
    listing.byte_ranges = [byte_range for _, _, byte_range in rows]
    return listing
