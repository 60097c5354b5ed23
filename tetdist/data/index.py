"""The index of one split: each file's place, class and size, found out once and verified.

Training reads the index and never scans a directory tree; crop windows are computed from its sizes;
and a file that would kill the DALI pipeline in the night is found and named when it is built. The
split lies on disk as `<root>/<split>/<class>/<file>`, the layout of torchvision's ImageFolder.
"""

import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tetdist.errors import UserError

Kind = Literal["images", "events"]
Progress = Callable[[int, int], None]

# The list of torchvision's ImageFolder, compared without regard to case.
_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "images": (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    "events": (".npy",),
}
# What PIL's decoders and DALI's have in common; PIL alone opens many more, whatever the suffix.
_PIL_FORMATS = {"JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"}
_EXIF_ORIENTATION = 0x0112

_FORMAT_VERSION = 1
_FILES_PER_TASK = 64
_SAMPLED_FILES = 10_000
# What reading an .npz raises where its bytes are not what was written.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class BadFile(NamedTuple):
    """A file that cannot be used: its path relative to the data root, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Index:
    """One split of a data set, N samples in K classes, sorted by class and then by file name.

    Attributes:
        kind: "images", or "events" for pre-binned tensors of shape (T, 2, H, W).
        split: name of the split and of its folder under the data root.
        classes: the K class names, sorted; a label is a position in it.
        labels: (N,).
        heights: (N,) pixels, as stored: not turned by an EXIF orientation.
        widths: (N,) pixels, likewise.
        file_sizes: (N,) bytes.
        path_blob: all paths, relative to the data root, one after another in the file system's
            encoding. A list of 1.28M str would take 130 MB, this takes 50.
        path_offsets: (N + 1,) where each path begins in the blob.
        class_mtimes_ns: (K,) when the listing of each class folder last changed.
        skipped: paths of the files that were left out because they cannot be used.
        timesteps: T of event tensors; None for images.
        dtype: "uint8" or "float16" for event tensors; None for images.
        fingerprint: SHA-256, in hex, of everything above that is the same in a copy of the data.
    """

    kind: Kind
    split: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    file_sizes: npt.NDArray[np.int64]
    path_blob: npt.NDArray[np.uint8]
    path_offsets: npt.NDArray[np.int64]
    class_mtimes_ns: npt.NDArray[np.int64]
    skipped: tuple[str, ...]
    timesteps: int | None
    dtype: str | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Path of sample `i`, relative to the data root."""
        start, end = self.path_offsets[i : i + 2]
        return os.fsdecode(self.path_blob[start:end].tobytes())


_ARRAYS = (
    "labels",
    "heights",
    "widths",
    "file_sizes",
    "path_blob",
    "path_offsets",
    "class_mtimes_ns",
)
_META = ("kind", "split", "classes", "skipped", "timesteps", "dtype", "fingerprint")


def index_file(index_dir: str | Path, split: str) -> Path:
    """Where the index of a split lies in a folder of indexes."""
    return Path(index_dir, f"{split}.npz")


def index_command(root: str | Path, split: str, kind: Kind = "images") -> str:
    """The command line that builds the index, for messages."""
    events = "--events " if kind == "events" else ""
    return f"python tools/images.py index {events}{shlex.quote(str(root))} --splits {split}"


def save_index(index: Index, file: str | Path) -> None:
    """Write the index as an uncompressed .npz: aside first, synced, then renamed into place."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    meta = {"version": _FORMAT_VERSION} | {name: getattr(index, name) for name in _META}
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as stream:
            np.savez(stream, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def load_index(file: str | Path) -> Index:
    """Read what `save_index` wrote.

    Raises:
        UserError: if the file is missing, damaged, or of another version of the format.
    """
    file = Path(file)
    # The default place is <root>/index/<split>.npz; elsewhere the root is the user's to fill in.
    command = (
        index_command(file.parent.parent, file.stem)
        if file.parent.name == "index"
        else f"python tools/images.py index ROOT --out {file.parent} --splits {file.stem}"
    )
    if not file.is_file():
        raise UserError(f"there is no index {file}: build it with `{command}`")
    try:
        with zipfile.ZipFile(file) as archive:
            meta = json.loads(_read_array(archive, "meta").tobytes())
            version = meta["version"]
            if version != _FORMAT_VERSION:
                raise UserError(
                    f"the index {file} has format {version} and this tetdist reads format"
                    f" {_FORMAT_VERSION}: build it again with `{command}`"
                )
            values: dict[str, Any] = {name: meta[name] for name in _META}
            values |= {name: _read_array(archive, name) for name in _ARRAYS}
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise UserError(
            f"the index {file} is damaged ({e}): build it again with `{command}`"
        ) from e
    values["classes"] = tuple(values["classes"])
    values["skipped"] = tuple(values["skipped"])
    return Index(**values)


def _read_array(archive: zipfile.ZipFile, name: str) -> Any:
    # zipfile checks the CRC of what it reads to the end; np.load would do the same, but takes a
    # file that is not a zip for a pickle.
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def build_index(
    root: str | Path,
    split: str,
    workers: int,
    decode: bool = True,
    progress: Progress | None = None,
) -> tuple[Index, list[BadFile]]:
    """Index a split of images.

    Files are taken by suffix, as torchvision's ImageFolder does, except that hidden ones (a name
    that begins with a dot) are passed over.

    Args:
        root: the data root, which holds the split's folder.
        split: the folder's name.
        workers: processes that open and decode images. With more than one, the calling script
            must guard its main part with `if __name__ == "__main__"`.
        decode: decode every image completely, so that damage is found now; else only its header
            is read.
        progress: called with the number of files done and of all files, now and then.

    Returns:
        The index of the good files, and the bad ones in order.

    Raises:
        UserError: if a folder is missing or empty, or there are fewer than two classes.
    """
    files = _list_files(root, split, "images")
    found = _probe_all(_probe_images, (decode,), root, files.paths, workers, progress)
    return _assemble("images", split, files, found)


def build_event_index(
    root: str | Path, split: str, workers: int, progress: Progress | None = None
) -> tuple[Index, list[BadFile]]:
    """Index a split of event tensors, .npy files of one shape (T, 2, H, W) and one type.

    Arguments, returned values and errors are those of `build_index`. A file whose shape or type is
    not that of the first good one counts as bad.
    """
    files = _list_files(root, split, "events")
    found = _probe_all(_probe_events, (), root, files.paths, workers, progress)
    return _assemble("events", split, files, found)


class Probe(NamedTuple):
    """What was found out about one good file. Images have neither timesteps nor type."""

    size: int
    height: int
    width: int
    timesteps: int | None = None
    dtype: str | None = None


class _Files(NamedTuple):
    """A split's files as listed: paths relative to the root, sorted by class, then by name."""

    classes: tuple[str, ...]
    class_mtimes_ns: list[int]
    labels: list[int]
    paths: list[str]


def list_classes(root: str | Path, split: str) -> tuple[str, ...]:
    """The sorted class names of a split: its folders, without hidden ones.

    Raises:
        UserError: if the split's folder is missing or holds fewer than two class folders.
    """
    folder = Path(root, split)
    if not Path(root).is_dir():
        raise UserError(f"there is no data folder {root}")
    if not folder.is_dir():
        raise UserError(f"the data folder {root} has no folder {split!r} in it")
    classes = _listing(folder, lambda entry: entry.is_dir())
    if len(classes) < 2:
        what = f"only one class folder, {classes[0]!r}" if classes else "no class folders"
        raise UserError(f"{folder} holds {what}: it must hold one folder of files for each class")
    return classes


def check_same_classes(classes: Mapping[str, tuple[str, ...]]) -> None:
    """Make sure that a label means the same in several splits.

    Args:
        classes: the class names of each split.

    Raises:
        UserError: if they differ; it names the first difference.
    """
    (first, expected), *others = classes.items()
    for split, names in others:
        if names != expected:
            difference = _first_difference(set(expected), set(names))
            raise UserError(
                f"the class folder {difference.name!r} is {difference.where(first, split)}: both"
                " must have the same class folders, or labels would not mean the same"
            )


def check_fresh(index: Index, root: str | Path, file: str | Path | None = None) -> None:
    """Make sure that the files are still those of the index.

    A class folder whose modification time is the recorded one lists the same names, so nothing of
    it is read; where the time differs, as in a copy, the names are compared. File sizes are
    compared for at most 10,000 files, evenly spread, and with ``file`` (the index's own) their
    modification times, too.

    Raises:
        UserError: if they are not; it names the first difference and the command to index again.
    """
    again = f"index the data again with `{index_command(root, index.split, index.kind)}`"
    present = list_classes(root, index.split)
    if present != index.classes:
        first = _first_difference(set(index.classes), set(present))
        raise UserError(
            f"the class folder {index.split}/{first.name} is {first.where('the index', str(root))}:"
            f" {again}"
        )
    bounds = np.searchsorted(index.labels, np.arange(len(index.classes) + 1))
    for label, name in enumerate(index.classes):
        folder = Path(root, index.split, name)
        if folder.stat().st_mtime_ns == index.class_mtimes_ns[label]:
            continue
        prefix = f"{index.split}/{name}/"
        known = {index.path(i) for i in range(bounds[label], bounds[label + 1])}
        known |= {path for path in index.skipped if path.startswith(prefix)}
        listed = {prefix + file for file in _list_class(folder, index.kind)}
        if known != listed:
            first = _first_difference(known, listed)
            raise UserError(f"{first.name} is {first.where('the index', str(root))}: {again}")
    sample = np.unique(np.linspace(0, len(index) - 1, min(len(index), _SAMPLED_FILES), dtype=int))
    for i in sample:
        path = index.path(i)
        try:
            status = Path(root, path).stat()
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}): {again}") from e
        size = status.st_size
        if size != index.file_sizes[i]:
            raise UserError(
                f"{path} has {size} bytes where the index says {index.file_sizes[i]}: {again}"
            )
        if file is not None and status.st_mtime_ns > Path(file).stat().st_mtime_ns:
            raise UserError(
                f"{path} is newer than the index {file}: {again}, or, if the files were only"
                f" copied, `touch {shlex.quote(str(file))}`"
            )


class _Difference(NamedTuple):
    name: str
    only_in_first: bool

    def where(self, first: str, second: str) -> str:
        has, lacks = (first, second) if self.only_in_first else (second, first)
        return f"in {has} but not in {lacks}"


def _first_difference(first: set[str], second: set[str]) -> _Difference:
    name = min(first ^ second)
    return _Difference(name, name in first)


def _listing(folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.name[0] != "." and wanted(e)))


def _list_class(folder: Path, kind: Kind) -> tuple[str, ...]:
    """Sorted names of a class folder's files that have a suffix of the kind."""
    folders = _listing(folder, lambda entry: entry.is_dir())
    if folders:
        raise UserError(
            f"{folder} holds a folder, {folders[0]!r}: files must lie directly in the class folder"
        )
    return _listing(folder, lambda entry: entry.name.lower().endswith(_SUFFIXES[kind]))


def _list_files(root: str | Path, split: str, kind: Kind) -> _Files:
    files = _Files(list_classes(root, split), [], [], [])
    for label, name in enumerate(files.classes):
        folder = Path(root, split, name)
        # Taken before the listing: a file added in between must make the index stale, not fresh.
        files.class_mtimes_ns.append(folder.stat().st_mtime_ns)
        names = _list_class(folder, kind)
        if not names:
            wanted = ", ".join(_SUFFIXES[kind])
            raise UserError(f"the class folder {folder} holds no {kind} ({wanted})")
        files.labels.extend([label] * len(names))
        files.paths.extend(f"{split}/{name}/{file}" for file in names)
    return files


def _probe_all(
    probe: Callable[..., list[Probe | str]],
    arguments: tuple[Any, ...],
    root: str | Path,
    paths: list[str],
    workers: int,
    progress: Progress | None,
) -> list[Probe | str]:
    """Probe every file, in order; a str is the reason why a file is bad."""
    tasks = [
        (probe, str(root), paths[i : i + _FILES_PER_TASK], arguments)
        for i in range(0, len(paths), _FILES_PER_TASK)
    ]
    found: list[Probe | str] = []
    for results in _run_tasks(tasks, workers):
        found.extend(results)
        if progress is not None:
            progress(len(found), len(paths))
    return found


def _run_tasks(tasks: list[Any], workers: int) -> Iterator[list[Probe | str]]:
    if workers == 1 or len(tasks) == 1:
        yield from map(_run_task, tasks)
        return
    # Not fork: a caller may have threads (DALI's, torch's), whose locks a fork would copy.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _ignore_interrupt)
    try:
        yield from pool.map(_run_task, tasks)
    except BrokenProcessPool as e:
        raise UserError(
            "a worker process died, most often for lack of memory: use fewer workers"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone says so and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_task(task: tuple[Callable[..., Any], str, list[str], tuple[Any, ...]]) -> Any:
    probe, root, paths, arguments = task
    return probe([f"{root}/{path}" for path in paths], *arguments)


def _probe_images(paths: list[str], decode: bool) -> list[Probe | str]:
    return [probe_image(path, decode) for path in paths]


def probe_image(path: str, decode: bool) -> Probe | str:
    """The size of an image as stored, or the reason why it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        size = Path(path).stat().st_size
        if size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            if image.format not in _PIL_FORMATS:
                return f"a {image.format} file, which DALI does not decode"
            # PIL alone turns these, and DALI alone cannot leave them as they are.
            if image.format == "TIFF" and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                return "a TIFF file with an orientation: save it upright"
            width, height = image.size
            if decode:
                image.load()
    except UnidentifiedImageError:
        return "not an image"
    except Exception as e:  # PIL's decoders raise whatever their format's parser stumbles over.
        return f"does not decode: {e}" if decode else f"cannot be read: {e}"
    return Probe(size, height, width)


def _probe_events(paths: list[str]) -> list[Probe | str]:
    return [_probe_tensor(path) for path in paths]


def _probe_tensor(path: str) -> Probe | str:
    """Shape and type of a (T, 2, H, W) .npy file, or the reason why it cannot be used."""
    try:
        with Path(path).open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                return f"a .npy file of version {version[0]}.{version[1]} instead of 1.0"
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            start = stream.tell()
            size = os.fstat(stream.fileno()).st_size
    except (OSError, ValueError) as e:
        return f"not a .npy file: {e}"
    if len(shape) != 4 or shape[1] != 2 or 0 in shape:
        return f"shape {shape} instead of (T, 2, H, W)"
    if dtype not in (np.dtype("u1"), np.dtype("<f2")):
        return f"type {dtype} instead of uint8 or float16"
    if fortran_order:
        return "stored in Fortran order instead of C order"
    wanted = start + dtype.itemsize * int(np.prod(shape))
    if size != wanted:
        return f"{size} bytes where its shape {shape} and type {dtype} need {wanted}"
    return Probe(size, shape[2], shape[3], shape[0], dtype.name)


def _assemble(
    kind: Kind, split: str, files: _Files, found: Iterable[Probe | str]
) -> tuple[Index, list[BadFile]]:
    good: list[Probe] = []
    labels: list[int] = []
    paths: list[bytes] = []
    bad: list[BadFile] = []
    first_path = ""
    for path, label, probe in zip(files.paths, files.labels, found, strict=True):
        if isinstance(probe, Probe) and kind == "events":
            if not good:
                first_path = path
            elif probe[1:] != good[0][1:]:
                probe = f"{_describe(probe)}, but {first_path} has {_describe(good[0])}"
        if isinstance(probe, str):
            bad.append(BadFile(path, probe))
            continue
        good.append(probe)
        labels.append(label)
        paths.append(os.fsencode(path))
    arrays: dict[str, Any] = {
        "labels": np.array(labels, np.int32),
        "heights": np.array([probe.height for probe in good], np.int32),
        "widths": np.array([probe.width for probe in good], np.int32),
        "file_sizes": np.array([probe.size for probe in good], np.int64),
        "path_blob": np.frombuffer(b"".join(paths), np.uint8),
        "path_offsets": np.cumsum([0, *map(len, paths)], dtype=np.int64),
    }
    timesteps = good[0].timesteps if good else None
    dtype = good[0].dtype if good else None
    digest = hashlib.sha256(
        json.dumps([_FORMAT_VERSION, kind, split, files.classes, timesteps, dtype]).encode()
    )
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    index = Index(
        kind=kind,
        split=split,
        classes=files.classes,
        class_mtimes_ns=np.array(files.class_mtimes_ns, np.int64),
        skipped=tuple(file.path for file in bad),
        timesteps=timesteps,
        dtype=dtype,
        fingerprint=digest.hexdigest(),
        **arrays,
    )
    return index, bad


def _describe(probe: Probe) -> str:
    return f"shape ({probe.timesteps}, 2, {probe.height}, {probe.width}) of {probe.dtype}"
