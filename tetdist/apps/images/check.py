"""Faults of a data set: damage, duplicates, wrong names and labels, missing files.

Every image is read, decoded and checksummed once. Results are written to a journal, so that a
stopped check continues where it was.
"""

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

import numpy as np

from tetdist.datasets.archives import WORDNET_ID
from tetdist.datasets.index import assemble, check_fresh, index_file, load_index
from tetdist.datasets.layouts import Listing, imagenet_classes
from tetdist.datasets.probe import Probe, probe_batches, probe_image
from tetdist.datasets.processes import ReportProgress
from tetdist.errors import UserError
from tetdist.storage.files import whole_lines
from tetdist.wording import and_more, counted

FindingKind = Literal[
    "bad", "label", "overlap", "missing", "index", "misnamed", "duplicate", "passed over"
]
# Harmless findings; with any other, a data set should not be trained on as it is.
NOTES: frozenset[FindingKind] = frozenset({"misnamed", "duplicate", "passed over"})

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
_VAL_PER_CLASS = 50
_TRAIN_PER_CLASS = (732, 1300)
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+")

_JOURNAL_VERSION = 1


class Finding(NamedTuple):
    """A fault or peculiarity of a data set.

    Attributes:
        kind: "bad": cannot be decoded or has no label; "label": the name has another class;
            "overlap": in two splits; "missing": compared with ImageNet-1k; "index": the index is
            not of these files; "misnamed": the format differs from the suffix; "duplicate": twice
            in one split; "passed over": ignored for its suffix (the first file of each suffix).
        path: Path of the sample, relative to the data root, or of another file or folder.
    """

    kind: FindingKind
    path: str
    text: str


class Examined(NamedTuple):
    """A sample that decodes, and the checksum of its bytes, in hex."""

    probe: Probe
    checksum: str


def examine_split(
    root: str | Path, listing: Listing, journal: Path, workers: int, progress: ReportProgress | None
) -> list[Examined | str]:
    """Decode and checksum every sample of a listing of images, except those in the journal.

    Args:
        journal: File of results, which the next call continues.

    Returns:
        Each sample's result, or the reason why it cannot be used.
    """
    found = _resume(Path(root), listing, journal)
    remaining = [i for i in range(len(listing.byte_ranges)) if i not in found]
    ranges = [listing.byte_ranges[i] for i in remaining]
    left = iter(remaining)
    with journal.open("a", encoding="utf-8") as stream:
        for results in probe_batches(_examine, (), root, ranges, workers):
            for result in results:
                i = next(left)
                found[i] = result
                stream.write(json.dumps([i, result]) + "\n")
            stream.flush()
            if progress is not None:
                progress(len(found), len(listing.byte_ranges))
    return [found[i] for i in range(len(listing.byte_ranges))]


def _examine(stream: IO[bytes], size: int) -> Examined | str:
    data = stream.read()
    probe = probe_image(io.BytesIO(data), size, decode=True)
    if isinstance(probe, str):
        return probe
    return Examined(probe, hashlib.blake2b(data, digest_size=16).hexdigest())


def _resume(root: Path, listing: Listing, journal: Path) -> dict[int, Examined | str]:
    """Read the journal's results for this listing; a journal of another one is started anew."""
    identity = _identity(root, listing)
    lines = whole_lines(journal)
    header = json.loads(lines[0]) if lines else {}
    if (header.get("version"), header.get("listing")) != (_JOURNAL_VERSION, identity):
        header = {"version": _JOURNAL_VERSION, "listing": identity, "begun_ns": time.time_ns()}
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    found: dict[int, Examined | str] = {}
    for i, result in map(json.loads, lines[1:]):
        if listing.archives or _unchanged(root / listing.byte_ranges[i].file, header["begun_ns"]):
            found[i] = result if isinstance(result, str) else Examined(Probe(*result[0]), result[1])
    return found


def _identity(root: Path, listing: Listing) -> str:
    """Compute a checksum of the samples' names and byte ranges, and of the archives' state."""
    digest = hashlib.sha256()
    for name, (_, offset, size) in zip(listing.names, listing.byte_ranges, strict=True):
        digest.update(f"{name}\0{offset}\0{size}\n".encode(errors="surrogateescape"))
    for file in listing.archives:
        status = (root / file).stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _unchanged(file: Path, since_ns: int) -> bool:
    try:
        return file.stat().st_mtime_ns <= since_ns
    except OSError:
        return False


def split_findings(listing: Listing, examined: list[Examined | str]) -> Iterator[Finding]:
    """Find unusable samples, and those with the name of another class or the wrong suffix."""
    from PIL import Image

    for bad in listing.bad:
        yield Finding("bad", bad.path, bad.reason)
    for suffix, (number, first) in sorted(listing.passed_over.suffixes.items()):
        files = counted(number, "file")
        yield Finding("passed over", first, f"{files} with {suffix}, which is not read")
    wordnet, formats = are_wordnet_ids(listing.classes), Image.registered_extensions()
    for i, result in enumerate(examined):
        path = listing.path(i)
        if isinstance(result, str):
            yield Finding("bad", path, result)
            continue
        suffix = PurePosixPath(path).suffix.lower()
        # Pillow opens a JPEG file that holds several images as MPO.
        if formats[suffix] != ("JPEG" if result.probe.format == "MPO" else result.probe.format):
            yield Finding("misnamed", path, f"a {result.probe.format} file; it is used as it is")
        named = _TRAIN_NAME.search(PurePosixPath(path).name) if wordnet else None
        label = listing.classes[listing.labels[i]]
        if named and named[1] != label:
            yield Finding("label", path, f"its name has class {named[1]}, but its label is {label}")


def duplicate_findings(
    splits: Mapping[str, tuple[Listing, list[Examined | str]]],
) -> Iterator[Finding]:
    """Find samples with the same bytes as another one in the same or an earlier split."""
    first: dict[str, tuple[str, str, str]] = {}
    for split, (listing, examined) in splits.items():
        for i, result in enumerate(examined):
            if isinstance(result, str):
                continue
            path, label = listing.path(i), listing.classes[listing.labels[i]]
            seen = first.setdefault(result.checksum, (split, path, label))
            if seen[1] == path and seen[0] == split:
                continue
            other = "" if label == seen[2] else f", where its class is {seen[2]} instead of {label}"
            kind: FindingKind = "duplicate" if seen[0] == split else "overlap"
            yield Finding(kind, path, f"the same bytes as {seen[1]}{other}")


def are_wordnet_ids(classes: tuple[str, ...]) -> bool:
    """Return whether the classes look like ImageNet's."""
    return all(WORDNET_ID.fullmatch(name) for name in classes)


def imagenet_findings(listing: Listing) -> Iterator[Finding]:
    """Find what "train" or "val" lacks of ImageNet-1k, if the classes are WordNet ids."""
    total = IMAGENET_COUNTS.get(listing.split)
    if total is None or not are_wordnet_ids(listing.classes):
        return
    split, known = listing.split, imagenet_classes()
    counts = Counter(listing.labels)
    present = {name for label, name in enumerate(listing.classes) if counts[label]}
    unknown = sorted(present - set(known))
    if unknown:
        yield Finding("missing", split, f"classes that are not in ImageNet-1k: {_some(unknown)}")
    missing = sorted(set(known) - present)
    if missing:
        yield Finding("missing", split, f"{len(missing)} of 1,000 classes: {_some(missing)}")
    if len(listing.labels) != total:
        found = f"{counted(len(listing.labels), 'image')} where ImageNet-1k has {total:,}"
        yield Finding("missing", split, found)
    fewest, most = _TRAIN_PER_CLASS if split == "train" else (_VAL_PER_CLASS, _VAL_PER_CLASS)
    for label, name in enumerate(listing.classes):
        if name in present and not fewest <= counts[label] <= most:
            wanted = f"{fewest} to {most:,}" if fewest != most else str(fewest)
            yield Finding(
                "missing",
                f"{split}/{name}",
                f"{counted(counts[label], 'image')} instead of {wanted}",
            )
    if split == "val":
        names = (_VAL_NAME.search(PurePosixPath(name).name) for name in listing.names)
        numbers = {int(name[1]) for name in names if name}
        gone = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, total + 1) if i not in numbers]
        if numbers and gone:
            yield Finding("missing", split, f"{counted(len(gone), 'image')}: {_some(gone)}")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + and_more(names, most)


def index_findings(
    root: str | Path, index_dir: Path, listing: Listing, examined: list[Examined | str]
) -> Iterator[Finding]:
    """Find an index of the split that is outdated, if there is one."""
    file = index_file(index_dir, listing.split)
    if not file.is_file():
        return
    try:
        index = load_index(file)
        check_fresh(index, root, file)
    except UserError as error:
        yield Finding("index", str(file), str(error))
        return
    probes = [result if isinstance(result, str) else result.probe for result in examined]
    now, _ = assemble(root, listing, probes)
    attributes = ("fingerprint", "archives", "path_blob", "offsets")
    if any(not np.array_equal(getattr(index, a), getattr(now, a)) for a in attributes):
        text = f"it does not match the present files; build it again: `{index.command(root)}`"
        yield Finding("index", str(file), text)
