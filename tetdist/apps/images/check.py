"""Faults of a data set: damage, duplicates, wrong labels, missing files."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from tetdist.datasets.archives import WORDNET_ID
from tetdist.datasets.index import check_fresh, index_file, load_index
from tetdist.datasets.layouts import Listing, imagenet_classes
from tetdist.datasets.probe import probe_batches, probe_image
from tetdist.datasets.processes import ReportProgress
from tetdist.errors import UserError
from tetdist.wording import and_more, counted

FindingKind = Literal["bad", "label", "overlap", "missing", "index", "duplicate"]

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+")


class Finding(NamedTuple):
    """A fault or peculiarity of a data set.

    Attributes:
        kind: "bad": cannot be decoded or has no label; "label": the name has another class;
            "overlap": in two splits; "missing": compared with ImageNet-1k; "index": the index is of
            other files; "duplicate": twice in one split (harmless).
        path: Path of the sample, relative to the data root, or of another file or folder.
    """

    kind: FindingKind
    path: str
    text: str


def examine_split(
    root: str | Path, listing: Listing, workers: int, progress: ReportProgress | None = None
) -> list[bytes | str]:
    """Decode every sample of a listing of images; return its digest, or why it is unusable."""
    samples: list[bytes | str] = []
    for results in probe_batches(_examine, (), root, listing.byte_ranges, workers):
        samples.extend(results)
        if progress is not None:
            progress(len(samples), len(listing.byte_ranges))
    return samples


def _examine(stream: IO[bytes], size: int) -> bytes | str:
    data = stream.read()
    probe = probe_image(io.BytesIO(data), size, decode=True)
    return probe if isinstance(probe, str) else hashlib.blake2b(data, digest_size=16).digest()


def split_findings(listing: Listing, examined: list[bytes | str]) -> Iterator[Finding]:
    """Find unusable samples, and those with the name of another class."""
    for bad in listing.bad:
        yield Finding("bad", bad.path, bad.reason)
    wordnet = all(map(WORDNET_ID.fullmatch, listing.classes))
    for i, result in enumerate(examined):
        path, label = listing.path(i), listing.classes[listing.labels[i]]
        if isinstance(result, str):
            yield Finding("bad", path, result)
            continue
        named = _TRAIN_NAME.search(PurePosixPath(path).name) if wordnet else None
        if named and named[1] != label:
            yield Finding("label", path, f"its name has class {named[1]}, but its label is {label}")


def duplicate_findings(
    splits: Mapping[str, tuple[Listing, list[bytes | str]]],
) -> Iterator[Finding]:
    """Find samples with the same bytes as another one in the same or an earlier split."""
    first: dict[bytes, tuple[str, str, str]] = {}
    for split, (listing, examined) in splits.items():
        for i, result in enumerate(examined):
            if isinstance(result, str):
                continue
            path, label = listing.path(i), listing.classes[listing.labels[i]]
            seen = first.setdefault(result, (split, path, label))
            if seen[1] == path and seen[0] == split:
                continue
            other = "" if label == seen[2] else f", where its class is {seen[2]} instead of {label}"
            kind: FindingKind = "duplicate" if seen[0] == split else "overlap"
            yield Finding(kind, path, f"the same bytes as {seen[1]}{other}")


def imagenet_findings(listing: Listing) -> Iterator[Finding]:
    """Find what "train" or "val" lacks of ImageNet-1k, if the classes are WordNet ids."""
    total = IMAGENET_COUNTS.get(listing.split)
    if total is None or not all(map(WORDNET_ID.fullmatch, listing.classes)):
        return
    counts, known = Counter(listing.classes[label] for label in listing.labels), imagenet_classes()
    fewest, most = (732, 1300) if listing.split == "train" else (50, 50)
    wrong = [name for name in known if not fewest <= counts[name] <= most]
    for text, names in (
        ("classes that are not in ImageNet-1k", sorted(counts.keys() - set(known))),
        (f"classes with fewer images than {fewest} or more than {most:,}", wrong),
    ):
        if names:
            some = ", ".join(f"{name} ({counts[name]:,})" for name in names[:5])
            yield Finding("missing", listing.split, f"{text}: {some}{and_more(names, 5)}")
    if len(listing.labels) != total:
        number = counted(len(listing.labels), "image")
        yield Finding("missing", listing.split, f"{number} where ImageNet-1k has {total:,}")


def index_findings(root: str | Path, index_dir: Path, split: str) -> Iterator[Finding]:
    """Find an index of a split that is outdated, if there is one."""
    file = index_file(index_dir, split)
    try:
        if file.is_file():
            check_fresh(load_index(file), root, file)
    except UserError as error:
        yield Finding("index", str(file), str(error))
