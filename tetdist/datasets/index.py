"""The index of one split: the verified bytes, class and size of each sample.

Training reads the index and never scans a directory tree or a tar file, and computes crop windows
from its sizes. Building it finds and names any file that would crash the DALI pipeline later.
layouts.py describes the layouts of a split on disk.
"""

import hashlib
import json
import logging
import mmap
import os
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from tetdist.datasets.archives import BadFile, ByteRange
from tetdist.datasets.class_folders import (
    Kind,
    first_difference,
    list_class,
    list_classes,
    root_advice,
)
from tetdist.datasets.journal import probe_with_journal
from tetdist.datasets.layouts import Listing, is_there, list_split
from tetdist.datasets.probe import Probe, probe_batches, probe_image, probe_tensor
from tetdist.datasets.processes import ReportProgress
from tetdist.errors import UserError, typed
from tetdist.storage.files import explaining, open_file, parse_json, replacing
from tetdist.wording import are, counted, meant_path

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig
    from tetdist.config.sections.data import DataSection

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2
_SAMPLED_FILES = 10_000
# Exceptions of reading a damaged .npz.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class _Mapping(mmap.mmap):
    file: Path


@dataclass(frozen=True, eq=False)
class Index:
    """One split of a data set, N samples in K classes, sorted by class and then by name.

    A sample is a separate file, or part of one of A tar files, the archives.

    Attributes:
        kind: "images", or "events" for pre-binned tensors of shape (T, 2, H, W).
        classes: The K class names; a label is a position among them. Those of class folders are
            sorted.
        labels: (N,).
        heights, widths: (N,) pixels as stored, without any EXIF orientation.
        file_sizes: (N,) bytes of each sample.
        offsets: (N,) bytes before each sample in its archive; 0 for a separate file.
        archive_ids: (N,) number of the archive; -1 for a separate file.
        archives: The A archives' paths, relative to the data root.
        archive_sizes: (A,) bytes.
        path_blob: All samples' paths relative to the data root, or names in their archive, joined
            in the file system's encoding. It takes 50 MB for 1.28M samples; a list of str would
            take 130.
        path_offsets: (N + 1,) start of each path in the blob.
        class_mtimes_ns: (K,) modification time of each class folder; (0,) with archives.
        skipped: Paths of the files that were left out because they cannot be used.
        options: Options of tools/images.py that built it, besides those of every split.
        timesteps: T of event tensors; None for images.
        dtype: "uint8" or "float16" for event tensors; None for images.
        fingerprint: SHA-256, in hex, of what training depends on: kind, split, classes, labels and
            sizes in order; for event tensors, which all have one size, also the paths. Copies, and
            shards packed from a folder, have the same fingerprint.
        maker: A function and its arguments that make the same index in another process; None: its
            arrays are pickled.
    """

    maker: ClassVar[tuple[Callable[..., "Index"], tuple[Any, ...]] | None] = None
    kind: Kind
    split: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    file_sizes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    archive_ids: npt.NDArray[np.int32]
    archives: tuple[str, ...]
    archive_sizes: npt.NDArray[np.int64]
    path_blob: npt.NDArray[np.uint8]
    path_offsets: npt.NDArray[np.int64]
    class_mtimes_ns: npt.NDArray[np.int64]
    skipped: tuple[str, ...]
    options: str
    timesteps: int | None
    dtype: str | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.maker or super().__reduce_ex__(protocol)

    def made_by(self, function: Callable[..., "Index"], *arguments: Any) -> Self:
        """Return this index, with `function(*arguments)` as its maker."""
        object.__setattr__(self, "maker", (function, arguments))
        return self

    def whole(self) -> Self:
        """Return this index, before its arrays are read: the file behind them may have been cut.

        Reading past the end of a mapped file ends the process without a message.
        """
        mapping = getattr(self.path_blob.base, "obj", None)
        if isinstance(mapping, _Mapping) and (size := mapping.size()) != len(mapping):
            raise UserError(
                f"the index {mapping.file} has {size} bytes instead of {len(mapping)}, since it "
                "was overwritten while in use; build it again, and start again"
            )
        return self

    @property
    def frames_shape(self) -> tuple[int, int, int, int]:
        """(T, 2, H, W) of every event tensor."""
        assert self.timesteps is not None
        return self.timesteps, 2, int(self.whole().heights[0]), int(self.widths[0])

    def frames(self, data: "DataSection") -> tuple[int, int, int, int] | None:
        """Return the shape (T, 2, H, W) of a network's input; None if that is an image."""
        if (conversion := data.images_as_events) is not None:
            return conversion.timesteps, 2, data.image_size, data.image_size
        return None if self.timesteps is None else self.frames_shape

    def path(self, i: int) -> str:
        """Return the path of sample `i` from the data root, as if its archive were a folder."""
        start, end = self.path_offsets[i : i + 2]
        name = os.fsdecode(self.path_blob[start:end].tobytes())
        return f"{self.archives[self.archive_ids[i]]}/{name}" if self.archives else name

    def byte_range(self, i: int) -> ByteRange:
        """Return the place of sample `i`'s bytes."""
        index = self.whole()
        file = self.archives[index.archive_ids[i]] if self.archives else index.path(i)
        return ByteRange(file, int(self.offsets[i]), int(self.file_sizes[i]))

    def command(self, root: str | Path) -> str:
        """Return the command that builds this index again, for messages."""
        return index_command(root, self.split, self.kind) + self.options


_NAMES = ("classes", "archives", "skipped")
_META = (*_NAMES, "kind", "split", "options", "timesteps", "dtype", "fingerprint")
_ARRAYS = [one.name for one in fields(Index) if one.name not in _META]


def index_file(index_dir: str | Path, split: str) -> Path:
    """Return the path of a split's index in a folder of indexes."""
    return Path(index_dir, f"{split}.npz")


def index_command(root: str | Path, split: str, kind: Kind = "images") -> str:
    """Return the command that builds the index, for messages."""
    events = "--events " if kind == "events" else ""
    return f"{typed('images')} index {events}{shlex.quote(str(root))} --splits {split}"


def without_validation(root: str | Path) -> str:
    """Return what to do with training data alone, for messages."""
    return (
        f"there is no validation split in {root}; add val/ and index it, or hold out training "
        "samples: data.held_out=0.1"
    )


def find_index(data: "DataSection", split: str, made_by: str = "") -> Path:
    """Return the file of a split's index.

    Args:
        made_by: Command that makes the data, if known.

    Raises:
        UserError: There is no data set, or no such index.
    """
    root = Path(data.root)
    check_root(root, made_by, "set data.root=FOLDER")
    file = index_file(data.index_dir, split)
    if file.is_file():
        return file
    if advice := root_advice(root, split, data.kind):
        raise UserError(f"there is no index {file}; {advice}")
    command = index_command(root, split, data.kind)
    indexed = sorted(one.stem for one in data.index_dir.glob("*.npz"))
    if not indexed or is_there(root, split):
        if not indexed and (split == "train" or not is_there(root, split)):
            command = command.removesuffix(f" --splits {split}")  # all that are there
        raise UserError(f"there is no index {file}; make it with `{command}`")
    if (indexed, split) == (["train"], "val"):
        raise UserError(without_validation(root))
    raise UserError(
        f"{root} has no split {split!r}, only {', '.join(indexed)}, which `{typed('eval')} --split "
        f"{indexed[-1]}` evaluates"
    )


def check_root(root: Path, made_by: str, give: str) -> None:
    """Refuse a missing data set; for ``made_by`` see `find_index`."""
    if not root.is_dir():
        way_out = f"make it with `{made_by}`, or {give}" if made_by else meant_path(root, give)
        raise UserError(f"data.root: there is no folder {root}; {way_out}")


def check_indexed(config: "RunConfig", made_by: str) -> None:
    """Refuse a missing data set, or one without the indexes that training reads."""
    for split in ("train",) if config.data.held_out else ("train", "val"):
        find_index(config.data, split, made_by)


def save_index(index: Index, file: str | Path) -> None:
    """Write the index as an uncompressed .npz, atomically.

    Raises:
        UserError: It cannot be written; an older one stays unchanged.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    meta = {"version": _FORMAT_VERSION} | {name: getattr(index, name) for name in _META}
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    with explaining(file), replacing(file) as stream:
        np.savez(stream, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)


def load_index(file: str | Path, fingerprint: str | None = None) -> Index:
    """Map an index written by `save_index` into memory, where it cannot be written to.

    All processes of a machine share one copy of its arrays, also those that it is sent to.

    Args:
        fingerprint: The fingerprint that the index must have.
    """
    file = Path(file)
    # The default place is <root>/index/<split>.npz; elsewhere the root is unknown.
    command = (
        index_command(file.parent.parent, file.stem)
        if file.parent.name == "index"
        else f"{typed('images')} index ROOT --out {file.parent} --splits {file.stem}"
    )
    if not file.is_file():
        raise UserError(f"there is no index {file}: build it with `{command}`")
    try:
        with open_file(file) as stream, zipfile.ZipFile(stream) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} differs")
            # It stays when `images index` replaces the file.
            mapping = _Mapping(stream.fileno(), 0, access=mmap.ACCESS_READ)
            mapping.file = file
            meta = parse_json(_mapped(archive, mapping, "meta").tobytes())
            version = meta["version"]
            if version != _FORMAT_VERSION:
                raise UserError(
                    f"the index {file} has format {version}, but this version reads format"
                    f" {_FORMAT_VERSION}: build it again with `{command}`"
                )
            values: dict[str, Any] = {name: meta[name] for name in _META}
            values |= {name: _mapped(archive, mapping, name) for name in _ARRAYS}
        index = Index(**values | {name: tuple(values[name]) for name in _NAMES})
        if ((index.labels < 0) | (index.labels >= len(index.classes))).any():
            raise ValueError(f"a label is outside 0 to {len(index.classes) - 1}")
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(
            f"the index {file} is damaged ({error}): build it again with `{command}`"
        ) from error
    if fingerprint not in (None, index.fingerprint):
        raise UserError(f"the index {file} was replaced while it was in use; start again")
    # Another process may have another working directory.
    return index.made_by(load_index, file.absolute(), index.fingerprint)


def _mapped(archive: zipfile.ZipFile, mapping: mmap.mmap, name: str) -> npt.NDArray[Any]:
    """Return an array of an .npz file as a view of the mapped file."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    count = int(np.prod(shape))
    stored = header + count * dtype.itemsize == info.compress_size == info.file_size
    if version != (1, 0) or len(shape) != 1 or not stored:
        raise ValueError(f"{name} is not an uncompressed array of one dimension")
    # In front of a member are 30 bytes, its name and another field; the lengths end the 30 bytes.
    lengths = np.frombuffer(mapping, "<u2", 2, info.header_offset + 26)
    start = info.header_offset + 30 + int(lengths.sum()) + header
    return np.frombuffer(mapping, dtype, count, start)


def build_index(
    root: str | Path,
    split: str,
    workers: int,
    decode: bool = True,
    progress: ReportProgress | None = None,
    kind: Kind = "images",
) -> tuple[Index, list[BadFile]]:
    """List and index a split; see `list_split` and `index_listing`."""
    listing = list_split(root, split, kind, workers)
    return index_listing(root, listing, workers, decode, progress)


def index_splits(
    root: str | Path, splits: Iterable[str] = ("train", "val"), workers: int = 1, **options: Any
) -> None:
    """Index splits without bad samples in ROOT/index, with options of `build_index`."""
    for split in splits:
        index, bad = build_index(root, split, workers, **options)
        assert not bad, bad[0]
        save_index(index, index_file(Path(root, "index"), split))


def index_listing(
    root: str | Path,
    listing: Listing,
    workers: int,
    decode: bool = True,
    progress: ReportProgress | None = None,
    journal: Path | None = None,
) -> tuple[Index, list[BadFile]]:
    """Open every sample of a listing and make the index of the good ones.

    Event tensors with another shape or type than the first good one count as bad.

    Args:
        workers: Number of processes. With more than one, the calling script must guard its main
            part with `if __name__ == "__main__"`.
        decode: Decode every image completely, to find damage now; otherwise only read its header.
        journal: File that keeps what was found until the index is written; see journal.py.

    Returns:
        The index of the good samples, and the bad ones in order.
    """
    probe = probe_tensor if listing.kind == "events" else probe_image
    options = () if listing.kind == "events" else (decode,)
    places = listing.byte_ranges
    results = (
        chain.from_iterable(probe_batches(probe, options, root, places, workers, progress))
        if journal is None
        else probe_with_journal(journal, probe, options, root, places, workers, progress)
    )
    return assemble(root, listing, results)


def check_fresh(index: Index, root: str | Path, file: str | Path | None = None) -> None:
    """Check that the files are still those of the index.

    For archives, sizes are compared. For class folders, names are compared if a folder's
    modification time differs from the recorded one, as in a copy; sizes are compared for at most
    10,000 files, evenly spread. With ``file``, the path of the index, files must not be newer.

    Raises:
        UserError: They differ; it names the first difference and the command to index again.
    """
    again = f"index the data again with `{index.command(root)}`"
    if index.archives:
        known = list(zip(index.archives, index.archive_sizes.tolist(), strict=True))
    else:
        _check_names(index, root, again)
        count = min(len(index), _SAMPLED_FILES)
        sample = np.unique(np.linspace(0, len(index) - 1, count, dtype=int)).tolist()
        known = [(index.path(i), int(index.file_sizes[i])) for i in sample]
    indexed_ns = None if file is None else Path(file).stat().st_mtime_ns
    for path, size in known:
        try:
            status = Path(root, path).stat()
        except OSError as error:
            raise UserError(
                f"{path} in {root} cannot be read ({error.strerror}): {again}"
            ) from error
        if status.st_size != size:
            raise UserError(
                f"{path} has {status.st_size} bytes instead of the index's {size}: {again}"
            )
        if indexed_ns is not None and status.st_mtime_ns > indexed_ns:
            raise UserError(
                f"{path} is newer than the index {file}: {again}; if the files were only copied,"
                f" `touch {shlex.quote(str(file))}` is enough"
            )


def _check_names(index: Index, root: str | Path, again: str) -> None:
    present = list_classes(root, index.split, index.kind)
    if present != index.classes:
        name, where = first_difference(index.classes, present, ("the index", str(root)))
        raise UserError(f"the class folder {index.split}/{name} is {where}: {again}")
    bounds = np.searchsorted(index.labels, np.arange(len(index.classes) + 1))
    for label, name in enumerate(index.classes):
        folder = Path(root, index.split, name)
        if folder.stat().st_mtime_ns == index.class_mtimes_ns[label]:
            continue
        prefix = f"{index.split}/{name}/"
        known = {index.path(i) for i in range(bounds[label], bounds[label + 1])}
        known |= {path for path in index.skipped if path.startswith(prefix)}
        listed = {prefix + file for file in list_class(folder, index.kind)[0]}
        if known != listed:
            path, where = first_difference(known, listed, ("the index", str(root)))
            raise UserError(f"{path} is {where}: {again}")


def assemble(
    root: str | Path, listing: Listing, found: Iterable[Probe | str]
) -> tuple[Index, list[BadFile]]:
    """Make the index of a listing's good samples, and return the bad ones, too.

    Args:
        found: Facts about each sample, or the reason why it cannot be used.
    """
    good: list[Probe] = []
    rows: list[int] = []
    bad = list(listing.bad)
    for i, probe in enumerate(found):
        if isinstance(probe, str):
            bad.append(BadFile(listing.path(i), probe))
        elif listing.kind == "events" and good and probe[1:] != good[0][1:]:
            first = listing.path(rows[0])
            reason = f"{_describe(probe)}, but {first} has {_describe(good[0])}"
            bad.append(BadFile(listing.path(i), reason))
        else:
            good.append(probe)
            rows.append(i)
    if turned := sum(probe.is_turned for probe in good):
        text = "%s: %s to be turned for display, by EXIF; training sees all images as stored"
        logger.warning(text, listing.split, f"{counted(turned, 'image')} {are(turned)}")
    names = [os.fsencode(listing.names[i]) for i in rows]
    archive_ids = {file: number for number, file in enumerate(listing.archives)}
    values: dict[str, Any] = {
        "labels": np.array([listing.labels[i] for i in rows], np.int32),
        "heights": np.array([probe.height for probe in good], np.int32),
        "widths": np.array([probe.width for probe in good], np.int32),
        "file_sizes": np.array([probe.size for probe in good], np.int64),
    }
    timesteps = good[0].timesteps if good else None
    dtype = good[0].dtype if good else None
    meta = [_FORMAT_VERSION, listing.kind, listing.split, listing.classes, timesteps, dtype]
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name in sorted(values):
        digest.update(values[name].tobytes())
    if listing.kind == "events":
        digest.update(b"\0".join(names))
    ranges = [listing.byte_ranges[i] for i in rows]
    index = Index(
        kind=listing.kind,
        split=listing.split,
        classes=listing.classes,
        offsets=np.array([r.offset for r in ranges], np.int64),
        archive_ids=np.array([archive_ids.get(r.file, -1) for r in ranges], np.int32),
        archives=listing.archives,
        archive_sizes=np.array([Path(root, f).stat().st_size for f in listing.archives], np.int64),
        path_blob=np.frombuffer(b"".join(names), np.uint8),
        path_offsets=np.cumsum([0, *map(len, names)], dtype=np.int64),
        class_mtimes_ns=np.array(listing.class_mtimes_ns, np.int64),
        skipped=tuple(file.path for file in bad),
        options=listing.options + " --skip-bad" * bool(bad),
        timesteps=timesteps,
        dtype=dtype,
        fingerprint=digest.hexdigest(),
        **values,
    )
    return index, bad


def _describe(probe: Probe) -> str:
    return f"shape ({probe.timesteps}, 2, {probe.height}, {probe.width}) of {probe.dtype}"
