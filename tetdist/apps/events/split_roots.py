"""Data roots of named splits: tensors linked into train/ and val/, with index and description."""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from filecmp import cmp
from pathlib import Path
from typing import Any

import tetdist
from tetdist.apps.events import splits
from tetdist.apps.events.folders import Part, Source
from tetdist.apps.events.tensors import Record, Settings, tensor_file
from tetdist.datasets import recorded_split
from tetdist.datasets.index import check_fresh, index_file, index_splits, load_index
from tetdist.datasets.recorded_split import DATASET_FILE
from tetdist.errors import UserError
from tetdist.storage.files import explaining, made_aside, write_json

_PARTS: tuple[Part, Part] = ("train", "val")
# Errors of a file system without hard links, and of a file with the maximum number of links.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


def make_split(
    dest: Path,
    sources: Sequence[Source],
    records: dict[str, Record],
    settings: Settings,
    *,
    name: str,
    seed: int,
    bad: int,
    workers: int,
) -> Path:
    """Make DEST/splits/NAME, a data root with train/ (except for all-to-val), val/ and indexes.

    It is written under a temporary name and renamed; an equal existing split is left unchanged.

    Args:
        sources: All recordings, including bad ones, in order.
        name: One of `splits.NAMES`.
        bad: Number of recordings, or pieces, that were left out.
    """
    parts = splits.assign(sources, name, seed)
    members: dict[Part, list[Record]] = {part: [] for part in _PARTS}
    for record in records.values():
        if record.source in parts:
            members[parts[record.source]].append(record)
    full_name = splits.split_name(name, seed, settings.simulation is not None)
    if name == splits.ALL_TO_VAL:
        del members["train"]
    else:
        _check_classes(sources, members, full_name)
    description = _description(full_name, seed, members, settings, bad)
    root = dest / "splits" / full_name
    links = {
        root / part / f"{record.key}.npy": tensor_file(dest, record.key)
        for part in members
        for record in members[part]
    }
    if _holds(root, description, links):
        return root
    # No further sync is needed: the linked files are on the disk, and the index and the description
    # are written with sync.
    with explaining(root), made_aside(root, sync=False) as aside:
        for link, file in links.items():
            linked = aside / link.relative_to(root)
            linked.parent.mkdir(parents=True, exist_ok=True)
            _link(file, linked)
        index_splits(aside, members, workers, kind="events")
        write_json(aside / DATASET_FILE, description)
        if root.exists():
            shutil.rmtree(root)
    return root


def _check_classes(sources: Sequence[Source], members: dict[Part, list[Record]], name: str) -> None:
    """Check that train and val have all classes, so that labels have the same meaning."""
    classes = {piece.class_name for source in sources for piece in source.pieces}
    for part in _PARTS:
        missing = sorted(classes - {record.class_name for record in members[part]})
        if missing:
            raise UserError(
                f"the split {name!r} has no usable recording of class {missing[0]!r} in {part}; "
                "add some, remove the class (training needs two) or choose another --split"
            )


def _description(
    name: str, seed: int, members: dict[Part, list[Record]], settings: Settings, bad: int
) -> dict[str, Any]:
    digest = hashlib.sha256(name.encode())
    for part in members:
        for record in sorted(members[part], key=lambda record: record.key):
            digest.update(f"\n{part} {record.key} {record.sha256}".encode())
    return {
        "split": name,
        "simulated": settings.simulation is not None,
        "seed": seed,
        "tool": "tools/prebin_dvs.py",
        "tetdist": tetdist.__version__,
        "parameters": settings.as_dict(),
        "sensor": str(next(record.sensor for of in members.values() for record in of)),
        "recordings": {part: len(members.get(part, ())) for part in _PARTS},
        "left_out": bad,
        "fingerprint": digest.hexdigest(),
    }


def _holds(root: Path, description: dict[str, Any], links: dict[Path, Path]) -> bool:
    """Return whether the split exists with the same tensors and up-to-date indexes."""
    if not root.is_dir():
        return False
    try:
        if recorded_split.description(root) != description:
            return False
        for part in description["recordings"]:
            if not description["recordings"][part]:
                continue
            file = index_file(root / "index", part)
            check_fresh(load_index(file), root, file)
    except UserError:
        return False
    return all(
        link.samefile(file) or cmp(link, file, shallow=False) for link, file in links.items()
    )


def _link(file: Path, link: Path) -> None:
    """Make a hard link or, where that is impossible, a copy."""
    try:
        os.link(file, link)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(file, link)
