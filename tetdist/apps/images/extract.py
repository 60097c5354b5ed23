"""Unpack shards or the official tars into class folders."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tetdist.datasets.archives import ByteRange, read
from tetdist.datasets.layouts import Listing
from tetdist.datasets.processes import ReportProgress, run_on_samples
from tetdist.errors import UserError
from tetdist.storage.files import check_space, explaining, only_writer, replacing

_NUMBER = re.compile(r"^\d{8}-(?=.)")


def extract_split(
    root: str | Path,
    listing: Listing,
    dest: Path,
    workers: int,
    progress: ReportProgress | None = None,
) -> None:
    """Write each sample of a listing to DEST/SPLIT/CLASS/NAME, without the folders in its name.

    Existing files are kept, so a stopped extraction continues.
    """
    if not listing.archives:
        raise UserError(f"{listing.split} in {root} has class folders already; use it as it is")
    files = _file_names(listing)
    folder = dest / listing.split
    with only_writer(folder):
        for name in listing.classes:
            (folder / name).mkdir(exist_ok=True)
        missing = [
            byte_range.size or 0
            for byte_range, file in zip(listing.byte_ranges, files, strict=True)
            if not _is_there(folder / file, byte_range)
        ]
        check_space(folder, sum(missing))
        work = functools.partial(_extract, root, folder)
        samples = list(zip(listing.byte_ranges, files, strict=True))
        for _ in run_on_samples(work, samples, workers, progress):
            pass
        # One wait for all files: waiting after each would take hours.
        os.sync()


def _file_names(listing: Listing) -> list[str]:
    """Return the path CLASS/NAME of each sample."""
    for name in listing.classes:
        if "/" in name or "\0" in name or name.startswith("."):
            raise UserError(
                f"the class name {name!r} is not a valid folder name: give others with --classes"
            )
    names = [PurePosixPath(name).name for name in listing.names]
    # Names in tetdist's own shards begin with the sample's number. It is removed only if the order
    # of files stays the same, since a run could not be resumed otherwise.
    plain = [_NUMBER.sub("", name) for name in names]
    in_order = list(zip(listing.labels, plain, strict=True))
    if in_order == sorted(set(in_order)):
        names = plain
    seen: dict[str, str] = {}
    for i, (label, name) in enumerate(zip(listing.labels, names, strict=True)):
        file = f"{listing.classes[label]}/{name}"
        if file in seen:
            raise UserError(f"{listing.path(i)} and {seen[file]} would both become {file}")
        seen[file] = listing.path(i)
    return list(seen)


def _is_there(file: Path, byte_range: ByteRange) -> bool:
    """Return whether the file has been extracted before."""
    size = file.stat().st_size if file.exists() else 0
    # A file gets its name when it is complete, but a power cut soon after may leave it empty.
    if size not in (0, byte_range.size):
        raise UserError(f"{file} exists with other contents: choose another folder")
    return size == byte_range.size


def _extract(root: str | Path, folder: Path, samples: Sequence[tuple[ByteRange, str]]) -> None:
    for byte_range, name in samples:
        file = folder / name
        if _is_there(file, byte_range):
            continue
        data = read(Path(root, byte_range.file), byte_range)
        if len(data) != byte_range.size:
            raise UserError(f"{byte_range.file} in {root} is now shorter: fetch it again")
        with explaining(file), replacing(file, sync=False) as stream:
            stream.write(data)
