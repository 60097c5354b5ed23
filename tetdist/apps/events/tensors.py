"""Conversion of recordings to tensors: written atomically, recorded, verified, resumable.

    DEST/manifest.json                 parameters and versions; written first
    DEST/recordings.jsonl              a line for each tensor: checksums, statistics
    DEST/recordings/CLASS/NAME.npy     the tensors, (T, 2, H, W)
    DEST/splits/NAME/                  data roots to train on, see split_roots.py

A tensor is valid once its line exists; the line is written after the tensor.
"""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tetdist
from tetdist.apps.events.binning import Binning, bin_events
from tetdist.apps.events.folders import Listing, Source
from tetdist.apps.events.formats import read_recording
from tetdist.apps.events.recording import BadRecording, OtherSize, Sensor
from tetdist.apps.events.simulate import Simulation, simulate
from tetdist.datasets.index import BadFile
from tetdist.datasets.processes import ReportProgress, run_tasks
from tetdist.datasets.recorded_split import RECORDS_FILE
from tetdist.errors import UserError
from tetdist.storage.files import (
    explaining,
    only_writer,
    open_file,
    parse_json,
    replacing,
    whole_lines,
    write_json,
)

# Increased when the same parameters make other tensors than before.
_FORMAT_VERSION = 1

_MANIFEST, _RECORDS, _TENSORS = "manifest.json", RECORDS_FILE, "recordings"
_OURS = {_MANIFEST, _RECORDS, _TENSORS, "splits", "statistics.json"}


@dataclass(frozen=True)
class Settings:
    """Parameters of a tensor, in addition to its recording.

    Attributes:
        sensor: Size of the sensor, if the format does not store it.
        simulation: Conversion of images to recordings; None for real recordings.
    """

    binning: Binning
    sensor: Sensor | None
    simulation: Simulation | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters for the manifest."""
        size = self.binning.size
        return {
            **asdict(self.binning),
            "size": str(size) if size else None,
            "sensor": str(self.sensor) if self.sensor else None,
            "simulated": self.simulation is not None,
            "simulation": asdict(self.simulation) if self.simulation else None,
        }


@dataclass(frozen=True)
class Record:
    """Record of one tensor.

    Attributes:
        window: Start and end of the piece in microseconds; None: the whole recording.
        dropped: Number of records of the file that are not events; 0 for a piece.
        frames: T x 2.
        saturated: Number of values that were clipped to the type's maximum.
    """

    key: str
    source: str
    source_size: int
    source_mtime_ns: int
    source_sha256: str
    window: tuple[int, int] | None
    sha256: str
    sensor: Sensor
    events: int
    on_events: int
    duration_us: int
    dropped: int
    frames: int
    empty_frames: int
    saturated: int

    @property
    def class_name(self) -> str:
        return self.key.partition("/")[0]


def tensor_file(dest: Path, key: str) -> Path:
    """Return the path of a tensor."""
    return dest / _TENSORS / f"{key}.npy"


@contextmanager
def open_destination(
    dest: Path, source: Path, settings: Settings, *, overwrite: bool
) -> Iterator[None]:
    """Lock the folder of the tensors, remove what killed processes left, and check its settings.

    Args:
        overwrite: Remove all files that this tool made there before.
    """
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file; name a folder")
    inside, outside = dest.resolve(), source.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise UserError(f"{dest} and {source} contain each other; name another DEST")
    foreign = sorted({path.name for path in dest.iterdir()} - _OURS) if dest.exists() else []
    if foreign and not (dest / _MANIFEST).is_file():
        raise UserError(f"{dest} holds {foreign[0]!r}, which is not this tool's; name another DEST")
    with only_writer(dest):
        if overwrite:
            _clear(dest)
        _claim(dest, source, settings)
        yield


def _clear(dest: Path) -> None:
    # Delete the manifest last: a folder with files but without a manifest is not this tool's.
    for name in sorted(_OURS - {_MANIFEST}):
        path = dest / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (dest / _MANIFEST).unlink(missing_ok=True)


def _shown(value: Any) -> str:
    return "the recordings' value" if value is None else str(value)


def _claim(dest: Path, source: Path, settings: Settings) -> None:
    """Record the settings of the tensors, or compare them with the recorded ones."""
    # Through JSON, which turns tuples to lists, as for the recorded settings.
    parameters = json.loads(json.dumps(settings.as_dict()))
    manifest = {
        "tool": "tools/prebin_dvs.py",
        "format_version": _FORMAT_VERSION,
        "tetdist": tetdist.__version__,
        "source": str(source.resolve()),
        "parameters": parameters,
    }
    file = dest / _MANIFEST
    # Without tensors, nothing depends on the recorded settings.
    if not file.is_file() or not whole_lines(dest / _RECORDS):
        with explaining(file):
            write_json(file, manifest)
        return
    try:
        before = parse_json(file.read_text(encoding="utf-8"))
        recorded = {"format_version": before["format_version"], **before["parameters"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); {_way_out()}") from error
    current = {"format_version": _FORMAT_VERSION, **parameters}
    for name in sorted(current.keys() | recorded.keys()):
        if current.get(name) != recorded.get(name):
            raise UserError(
                f"the tensors in {dest} were made with {name}={_shown(recorded.get(name))}, not"
                f" {_shown(current.get(name))}; {_way_out()}"
            )


def _way_out() -> str:
    return "name another DEST, or give --overwrite to make all tensors again"


ShowsProgress = Callable[[str], AbstractContextManager[ReportProgress]]


def make_tensors(
    source: Path,
    dest: Path,
    listing: Listing,
    settings: Settings,
    workers: int,
    progress: ShowsProgress,
) -> tuple[dict[str, Record], list[BadFile]]:
    """Make and record the missing tensors of all pieces of all sources.

    Args:
        dest: Folder of the tensors, opened by `open_destination`.
        workers: Number of processes; with more than one, the calling script must guard its main
            part with `if __name__ == "__main__"`.
        progress: Takes a title; yields a function to call with the files done and their total.

    Returns:
        All records by key, and the bad recordings or pieces.
    """
    records = _keep(source, dest, listing, workers, progress)
    bad = [BadFile(item.path, item.problem) for item in listing.sources if item.problem]
    tasks = [
        (source, dest, item, settings)
        for item in listing.sources
        if not item.problem and not all(piece.key in records for piece in item.pieces)
    ]
    file = dest / _RECORDS
    with explaining(file), progress("bin") as advance, file.open("a", encoding="utf-8") as stream:
        for made, wrong in run_tasks(_make, tasks, workers, advance):
            stream.writelines(json.dumps(asdict(record)) + "\n" for record in made)
            stream.flush()
            records |= {record.key: record for record in made}
            bad.extend(wrong)
        os.fsync(stream.fileno())
    keys = [piece.key for item in listing.sources for piece in item.pieces]
    records, mixed = _same_sensor({key: records[key] for key in keys if key in records})
    return records, bad + mixed


def _keep(
    source: Path, dest: Path, listing: Listing, workers: int, progress: ShowsProgress
) -> dict[str, Record]:
    """Verify existing tensors, and return the records of those to keep."""
    by_source: dict[str, list[Record]] = {}
    for record in _recorded(dest, listing).values():
        by_source.setdefault(record.source, []).append(record)
    tasks = [
        (source, dest, by_source[item.path])
        for item in listing.sources
        if item.pieces and len(by_source.get(item.path, ())) == len(item.pieces)
    ]
    with progress("verify earlier tensors") as advance:
        verified = list(run_tasks(_verify, tasks, workers, advance))
    return {record.key: record for records in verified for record in records}


def _recorded(dest: Path, listing: Listing) -> dict[str, Record]:
    """Read the records of existing tensors, by key."""
    pieces = {piece.key: piece for item in listing.sources for piece in item.pieces}
    file = dest / _RECORDS
    records: dict[str, Record] = {}
    for line in whole_lines(file):
        try:
            values = parse_json(line)
            values["sensor"] = Sensor(*values["sensor"])
            values["window"] = values["window"] and tuple(values["window"])
            record = Record(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error!r}); {_way_out()}") from error
        records[record.key] = record
    for record in records.values():
        piece = pieces.get(record.key)
        if piece is None:
            raise UserError(
                f"{record.source} no longer exists, but {dest} holds its tensor {record.key};"
                f" {_way_out()}"
            )
        if piece.window != record.window:
            raise UserError(f"the labels of {record.source} have changed; {_way_out()}")
    return records


def _verify(task: tuple[Path, Path, list[Record]]) -> list[Record]:
    """Return the records of an unchanged source whose tensors are intact."""
    source, dest, records = task
    first = records[0]
    file = source / first.source
    try:
        status = file.stat()
        same = (status.st_size, status.st_mtime_ns) == (first.source_size, first.source_mtime_ns)
        # A copy has another time, so compare its contents.
        same = same or hashlib.sha256(_read(file)).hexdigest() == first.source_sha256
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {_way_out()}") from error
    if not same:
        raise UserError(f"{file} has changed since its tensor was made; {_way_out()}")
    return [record for record in records if _is_intact(dest, record)]


def _is_intact(dest: Path, record: Record) -> bool:
    try:
        data = tensor_file(dest, record.key).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == record.sha256


def _make(task: tuple[Path, Path, Source, Settings]) -> tuple[list[Record], list[BadFile]]:
    """Read a source and write its tensors."""
    source, dest, item, settings = task
    try:
        file = source / item.path
        status = file.stat()
        data = _read(file)
        if settings.simulation is not None:
            events = simulate(data, item.path, settings.simulation)
        else:
            events = read_recording(file, data, settings.sensor)
    except (BadRecording, OSError) as error:
        advice = "; correct the size in the file or, if it states none, give --sensor WIDTHxHEIGHT"
        return [], [BadFile(item.path, f"{error}{advice * isinstance(error, OtherSize)}")]
    digest = hashlib.sha256(data).hexdigest()
    records, bad = [], []
    for piece in item.pieces:
        try:
            part = events if piece.window is None else events.between(*piece.window)
            if not len(part):
                times = "{} to {} us".format(*events.t[[0, -1]])
                raise BadRecording(f"it has no events; the file's are from {times}")
            frames = bin_events(part, settings.binning)
        except MemoryError as error:
            shape = settings.binning.timesteps, settings.binning.size or events.sensor
            raise UserError(
                f"{shape[0]} frames of {shape[1]} pixels from {item.path} do not fit into memory;"
                " use fewer --timesteps, a smaller --size or fewer --workers"
            ) from error
        except BadRecording as error:
            where = f"{piece.window[0]} to {piece.window[1]} us: " if piece.window else ""
            bad.append(BadFile(item.path, f"{where}{error}"))
            continue
        records.append(
            Record(
                key=piece.key,
                source=item.path,
                source_size=len(data),
                source_mtime_ns=status.st_mtime_ns,
                source_sha256=digest,
                window=piece.window,
                sha256=_write_tensor(tensor_file(dest, piece.key), frames.tensor),
                sensor=part.sensor,
                events=len(part),
                on_events=int(part.p.sum()),
                duration_us=int(part.t[-1] - part.t[0]),
                dropped=part.dropped,
                frames=2 * len(frames.tensor),
                empty_frames=frames.empty,
                saturated=frames.saturated,
            )
        )
    return records, bad


def _read(file: Path) -> bytes:
    with open_file(file) as stream:
        return stream.read()


def _write_tensor(file: Path, tensor: npt.NDArray[Any]) -> str:
    """Write a tensor atomically, and return its file's checksum."""
    stream = io.BytesIO()
    np.save(stream, tensor, allow_pickle=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with explaining(file), replacing(file) as written:
        written.write(stream.getbuffer())
    return hashlib.sha256(stream.getbuffer()).hexdigest()


def _same_sensor(records: dict[str, Record]) -> tuple[dict[str, Record], list[BadFile]]:
    """Return the records with the most common sensor; the others are bad."""
    counts = Counter(record.sensor for record in records.values())
    if len(counts) < 2:
        return records, []
    (usual, number), *_ = counts.most_common()
    others = f"but {number} others have {usual}; bin each sensor's files into a DEST of its own"
    bad = [
        BadFile(record.source, f"its sensor is {record.sensor}, {others}")
        for record in records.values()
        if record.sensor != usual
    ]
    return {key: record for key, record in records.items() if record.sensor == usual}, bad
