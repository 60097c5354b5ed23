"""Recordings in a folder: their classes, their order, and their published split."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tetdist.datasets.class_folders import USUAL_NAMES, PassedOver
from tetdist.errors import UserError, typed
from tetdist.wording import and_more, counted, meant_path

Part = Literal["train", "val"]

# Names (in lower case) of folders that define the part of the published split.
_PARTS: dict[str, Part] = {
    **{name: part for part, names in USUAL_NAMES.items() for name in names},
    "n-cars_train": "train",
    "n-cars_test": "val",
}
_LABELS = "_labels.csv"
_COLUMNS = ("class", "startTime_usec", "endTime_usec")
_TRIALS: dict[Part, str] = {"train": "trials_to_train.txt", "val": "trials_to_test.txt"}


@dataclass(frozen=True)
class Piece:
    """Source of one tensor: a recording, or a labelled part of one.

    Attributes:
        name: Name of the tensor, without suffix; unique within the class.
        window: Its start and end in microseconds; None: the whole recording.
    """

    class_name: str
    name: str
    window: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        return f"{self.class_name}/{self.name}"


@dataclass(frozen=True)
class Source:
    """File with a recording.

    Attributes:
        path: Path relative to the folder, with slashes.
        part: Part of the published split, if there is one.
        problem: Why it cannot be used, if the listing already shows this.
    """

    path: str
    pieces: tuple[Piece, ...]
    part: Part | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Listing:
    """Recordings in a folder.

    Attributes:
        sources: The recordings, sorted by part, class and name; numbers in names by value.
        passed_over: Files in class folders without a suffix of recordings, and recordings outside
            of class folders.
    """

    sources: tuple[Source, ...]
    passed_over: PassedOver


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them: cutter_2 before cutter_10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]


def list_sources(root: Path, suffixes: Sequence[str]) -> Listing:
    """List the recordings of a folder, in one of three layouts.

    These are: CLASS/FILE; PART/CLASS/FILE, if all PARTs are in _PARTS and there is a train or a
    test part (N-MNIST, N-CARS; beside both, other folders, such as index/, are ignored); or FILEs
    with a FILE_labels.csv that has the columns class, startTime_usec, endTime_usec (DVS128 Gesture;
    its trials_to_train.txt and trials_to_test.txt are the published split).

    Args:
        suffixes: Suffixes of recordings, in lower case.
    """
    if not root.is_dir():
        near = meant_path(root, "give the folder of the recordings")
        raise UserError(f"there is no folder {root}; {near}")
    passed_over = PassedOver()
    loose = _files(root, suffixes)
    if any(root.glob(f"*{_LABELS}")):
        sources, loose = _labelled(root, loose), []
    else:
        folders = _folders(root)
        parts = {folder.name: _PARTS.get(folder.name.lower()) for folder in folders}
        if {"train", "val"} <= set(parts.values()) or _are_only_parts(folders, parts):
            sources = [
                source
                for folder in folders
                if parts[folder.name]
                for source in _classes(root, folder, suffixes, parts[folder.name], passed_over)
            ]
        else:
            sources = _classes(root, root, suffixes, None, passed_over)
    if passed_over and not sources and not loose:
        raise UserError(
            f"{root} holds no recordings ({', '.join(suffixes)}), but {passed_over}; save events as"
            " .npz with the arrays x, y, t and p, or index tensors (T, 2, H, W) with "
            f"`{typed('images')} index --events`"
        )
    _check(root, sources, loose, suffixes)
    for file in loose:
        passed_over.add(file.name, " outside class folders")
    return Listing(tuple(sources), passed_over)


def _are_only_parts(folders: list[Path], parts: dict[str, Part | None]) -> bool:
    """Return whether all folders have names of parts of a split and hold class folders."""
    return bool(folders) and all(parts[path.name] and _folders(path) for path in folders)


def _folders(folder: Path) -> list[Path]:
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(folders, key=lambda path: natural_key(path.name))


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = [path for path in _all_files(folder) if path.suffix.lower() in suffixes]
    return sorted(files, key=lambda path: natural_key(path.name))


def _all_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name[0] != "." and not path.is_dir()]


def _classes(
    root: Path, folder: Path, suffixes: Sequence[str], part: Part | None, passed_over: PassedOver
) -> list[Source]:
    sources = []
    for class_folder in _folders(folder):
        inner = _folders(class_folder)
        if inner:
            raise UserError(
                f"{class_folder} holds a folder, {inner[0].name!r}; arrange the recordings as"
                " CLASS/FILE, or as train/CLASS/FILE and test/CLASS/FILE"
            )
        for other in sorted(_all_files(class_folder)):
            if other.suffix.lower() not in suffixes:
                passed_over.add(other.relative_to(root).as_posix())
        for file in _files(class_folder, suffixes):
            # Both parts may have a recording of the same name.
            name = file.stem if part is None else f"{folder.name}-{file.stem}"
            piece = Piece(class_folder.name, name)
            sources.append(Source(file.relative_to(root).as_posix(), (piece,), part))
    return sources


def _labelled(root: Path, files: list[Path]) -> list[Source]:
    parts = _listed_parts(root)
    sources = []
    for file in files:
        labels = file.with_name(f"{file.stem}{_LABELS}")
        pieces: tuple[Piece, ...] = ()
        problem = None
        if not labels.is_file():
            problem = f"its labels are missing: there is no {labels.name}"
        else:
            try:
                pieces = _read_labels(labels, file.stem)
            except (OSError, ValueError, csv.Error) as error:
                problem = f"{labels.name}: {error}"
        if parts and file.name not in parts and problem is None:
            problem = f"it is neither in {' nor in '.join(_TRIALS.values())}"
        sources.append(Source(file.name, pieces, parts.get(file.name), problem))
    return sources + _missing(root, parts, {file.name for file in files})


def _missing(root: Path, parts: dict[str, Part], present: set[str]) -> list[Source]:
    """Return missing recordings that the lists of the split name, or that have labels."""
    missing = {
        name: f"it is listed in {_TRIALS[part]}, but there is no such file"
        for name, part in parts.items()
        if name not in present
    }
    stems = {Path(name).stem for name in (*present, *missing)}
    for labels in root.glob(f"*{_LABELS}"):
        stem = labels.name.removesuffix(_LABELS)
        if stem not in stems:
            missing[stem] = f"there is {labels.name}, but no recording of this name"
    return [
        Source(name, (), parts.get(name), problem)
        for name, problem in sorted(missing.items(), key=lambda item: natural_key(item[0]))
    ]


def _read_labels(file: Path, stem: str) -> tuple[Piece, ...]:
    pieces = []
    with file.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            number_of, start, end = (_whole(row, column) for column in _COLUMNS)
            if start >= end:
                raise ValueError(f"gesture {number} ends at {end} us, before its start {start}")
            pieces.append(Piece(str(number_of), f"{stem}-{number}", (start, end)))
    if not pieces:
        raise ValueError("it has no rows")
    return tuple(pieces)


def _whole(row: dict[str, str], column: str) -> int:
    if column not in row:
        raise ValueError(f"there is no column {column}")
    if not re.fullmatch(r"\s*-?\d+\s*", row[column] or ""):
        raise ValueError(f"{column} {row[column]!r} is not an integer")
    return int(row[column])


def _listed_parts(root: Path) -> dict[str, Part]:
    """Return the part of each file in the lists of the published split; empty without lists."""
    lists = {part: root / name for part, name in _TRIALS.items()}
    if not all(file.is_file() for file in lists.values()):
        return {}
    return {
        name.strip(): part
        for part, file in lists.items()
        for name in file.read_text(encoding="utf-8").splitlines()
        if name.strip()
    }


def _check(
    root: Path, sources: Sequence[Source], loose: list[Path], suffixes: Sequence[str]
) -> None:
    pieces = [piece for source in sources for piece in source.pieces]
    if not pieces:
        if problems := [f"{one.path}: {one.problem}" for one in sources if one.problem]:
            rule = f"FILE{_LABELS} needs integers in the columns {', '.join(_COLUMNS)}"
            shown = f"{'; '.join(problems[:3])}{and_more(problems, 3)}"
            raise UserError(f"{root}: {shown}; {rule}")
        content = f"no recordings ({', '.join(suffixes)})"
        if loose:
            content = f"{counted(len(loose), 'recording')}, not in class folders"
            beside = [_files(one, suffixes) for one in _folders(root.absolute().parent)]
            if len(beside) > 1 and all(beside):
                raise UserError(f"{root} is a class folder itself: give {root.absolute().parent}")
        raise UserError(
            f"{root} holds {content}; arrange them as CLASS/FILE, as"
            " train/CLASS/FILE and test/CLASS/FILE, or as FILE with FILE_labels.csv (to evaluate"
            " them only: CLASS/FILE and --split all-to-val)"
        )
    key, times = Counter(piece.key for piece in pieces).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{root} holds {times} recordings {key!r} that differ only in their suffix; keep one"
        )
