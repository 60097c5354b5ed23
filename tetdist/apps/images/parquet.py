"""Shards of images in Parquet, the form in which the Hugging Face hub gives them out.

A file has the columns image, a struct of bytes and path, and label, an integer. One pass
decodes each image, to find damage, and copies its bytes. Samples are numbered by label and name, so
that the shards are the same data set as class folders. Each file becomes a shard.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from tetdist.apps.images.check import IMAGENET_COUNTS
from tetdist.apps.images.shards import Packed, pack
from tetdist.datasets.archives import IMAGE_SUFFIXES, MOST_CLASSES, WORDNET_ID
from tetdist.datasets.index import Index
from tetdist.datasets.layouts import imagenet_classes
from tetdist.datasets.probe import probe_image
from tetdist.datasets.processes import ReportProgress, run_tasks
from tetdist.errors import UserError
from tetdist.wording import and_more

# Names of a split in the hub's files.
_ALIASES = {"val": "val|validation"}
# The hub's ImageNet appends the class to each name, which changes their order.
_CLASS_AT_END = re.compile(r"_n\d{8}(?=\.\w+$)")


class Table(NamedTuple):
    """A Parquet file without its images: label and name of each, and the hub's class names."""

    file: Path
    samples: list[tuple[int, str]]
    classes: tuple[str, ...]


def read_tables(root: Path, split: str, workers: int) -> list[Table]:
    """Read everything of a split but its images, from files in ROOT or ROOT/data."""
    folder = root / "data" if (root / "data").is_dir() else root
    name = re.compile(rf"(?:{_ALIASES.get(split, re.escape(split))})(?:[-_.].*)?\.parquet")
    files = sorted(file for file in folder.glob("*.parquet") if name.fullmatch(file.name))
    first = re.fullmatch(r"(.*-)(\d+)(-of-(\d+).*)", files[0].name) if files else None
    count, width = (int(first[4]), len(first[2])) if first else (0, 0)
    names = [f"{first[1]}{i:0{width}d}{first[3]}" for i in range(count) if first]
    missing = [file for file in names if not (folder / file).is_file()]
    if missing or not files:
        file = missing[0] + and_more(missing) if missing else f"{split}-00000-of-N.parquet"
        raise UserError(f"there is no {file} in {folder}: fetch it, or name other --splits")
    tables = list(run_tasks(_read_table, files, workers))
    if not any(table.samples for table in tables):
        raise UserError(f"the files of {split} in {folder} have no rows: fetch them again")
    return tables


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            yield opened
    except UserError:
        raise
    except Exception as error:  # A damaged file may raise any.
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is damaged, or not Parquet ({reason}): fetch it again") from error


def _read_table(file: Path) -> Table:
    with _opened(file) as opened:
        columns = [opened.schema.column(i).path for i in range(len(opened.schema))]
        if not {"image.bytes", "image.path", "label"} <= set(columns):
            raise UserError(
                f"{file} has the columns {', '.join(columns)}, but image.bytes, image.path and"
                " label are needed: give a data set of images with one label each"
            )
        rows = opened.read(["image.path", "label"]).to_pylist()
        about = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        of_label = about.get("info", {}).get("features", {}).get("label", {})
        names = tuple(map(str, of_label.get("names", ())))
    paths = ((row["image"] or {}).get("path") or "image" for row in rows)
    samples = [
        (row["label"], PurePosixPath(str(path)).name) for row, path in zip(rows, paths, strict=True)
    ]
    if not all(isinstance(label, int) and label >= 0 for label, _ in samples):
        raise UserError(f"{file} has rows without a class: leave its split out of --splits")
    if (most := max((label for label, _ in samples), default=0)) >= MOST_CLASSES:
        raise UserError(f"{file} has the label {most}, but labels must be below {MOST_CLASSES:,}")
    return Table(file, samples, names)


def class_names(
    root: Path, splits: Mapping[str, list[Table]], *, subset: bool = False
) -> tuple[str, ...]:
    """Return ImageNet-1k's classes if the files' names contain them, else the hub's, else numbers.

    ImageNet-1k must be complete, and its labels must be those of the names, unless a ``subset``,
    perhaps with labels of its own, is wanted.
    """
    known, tables = imagenet_classes(), [*chain.from_iterable(splits.values())]
    samples = [sample for table in tables for sample in table.samples]
    ids = [(*sample, match[0]) for sample in samples if (match := WORDNET_ID.search(sample[1]))]
    wrong = [(name, k) for k, name, of_name in ids if known[k : k + 1] != (of_name,)]
    if 2 * len(wrong) >= len(ids) or (wrong and subset):
        of_hub, last = tables[0].classes, max(samples)[0]
        numbers = tuple(f"{k:0{len(str(last))}d}" for k in range(last + 1))
        return of_hub if len(set(of_hub)) == len(of_hub) > last else numbers
    if wrong:
        raise UserError(
            f"{len(wrong):,} of {len(ids):,} images in {root} have the label of another class of"
            f" ImageNet-1k, such as {wrong[0][0]} with {wrong[0][1]}: fetch the files from their"
            " original source, or give --subset to keep these labels"
        )
    for split, of_split in splits.items():
        number = sum(len(table.samples) for table in of_split)
        if number != (complete := IMAGENET_COUNTS.get(split, number)) and not subset:
            raise UserError(
                f"{root} has {number:,} images of {split}, but ImageNet-1k has {complete:,}: fetch"
                " the missing files, or give --subset to pack a part of it"
            )
    return known


def shard_tables(
    split: str,
    tables: list[Table],
    classes: tuple[str, ...],
    dest: Path,
    workers: int,
    progress: ReportProgress | None = None,
) -> Index:
    """Pack a split; see `shards.pack`."""
    rows = [(k, _CLASS_AT_END.sub("", name)) for table in tables for k, name in table.samples]
    numbers = np.empty(len(rows), int)
    numbers[sorted(range(len(rows)), key=rows.__getitem__)] = range(len(rows))
    left = zip(numbers.tolist(), rows, strict=True)
    plan = [(table.file, list(islice(left, len(table.samples)))) for table in tables]
    sizes = [table.file.stat().st_size for table in tables]
    settings = {"parquet": hashlib.sha256(json.dumps([rows, sizes]).encode()).hexdigest()}
    return pack(dest, split, classes, settings, plan, sizes, _read, workers, progress)


def _read(task: tuple[Path, list[tuple[int, tuple[int, str]]]]) -> Iterator[Packed]:
    """Yield the images of a file with number, label and name, if they decode."""
    file, samples = task
    with _opened(file) as opened:
        batches = opened.iter_batches(64, columns=["image.bytes"])
        images = (image for batch in batches for image in batch["image"].field("bytes"))
        for (number, (label, name)), image in zip(samples, images, strict=True):
            data = image.as_py() or b""
            probe = probe_image(io.BytesIO(data), len(data), decode=True)
            if isinstance(probe, str):
                raise UserError(f"{name} in {file} cannot be used ({probe}): fetch the file again")
            if not name.lower().endswith(IMAGE_SUFFIXES):
                name += ".jpg" if probe.format in ("JPEG", "MPO") else f".{probe.format}"
            yield Packed(number, name, label, data)
