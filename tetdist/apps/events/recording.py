"""Recordings of an event camera, and the checks that reject unusable ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from tetdist.config.fields import Pixels
from tetdist.config.flags import MOST_PIXELS
from tetdist.wording import counted

# Number of consecutive equal events (pixel and microsecond) that means an overwritten part of the
# file: a camera's pixel has a refractory period.
_REPEATS = 50
# Most microseconds between two events, an hour; a damaged timestamp is years ahead.
_MOST_GAP = 3_600_000_000
_MOST_HEADER = 2**20  # bytes
_SIDE = TypeAdapter(Pixels)


class BadRecording(ValueError):
    """Raised for an unusable recording; the text is the reason, without the file's name."""


class OtherSize(BadRecording):
    """Raised if the sensor's size is not the expected one."""


class Sensor(NamedTuple):
    """Size of a sensor in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def stated(cls, width: object, height: object) -> "Sensor":
        """Return the size that a file's header states, as numbers of any type or text."""
        try:
            return cls(*(_SIDE.validate_python(np.asarray(one).item()) for one in (width, height)))
        except ValueError as error:
            raise BadRecording(
                f"its header states a width of {width!r:.20} and a height of {height!r:.20}; both "
                f"must be integers from 1 to {MOST_PIXELS}"
            ) from error


@dataclass(frozen=True, eq=False)
class Events:
    """Events of a recording, N in temporal order.

    A decoder may return integers of any type; `checked_events` makes them int64 and checks them.

    Attributes:
        x: (N,) column, 0 at the left.
        y: (N,) row, 0 at the top.
        t: (N,) microseconds.
        p: (N,) polarity, 1 if the pixel became brighter (ON), 0 if darker (OFF).
        dropped: Number of other records in the file: frames, inertial measurements, triggers,
            events marked invalid.
        counter: Microseconds after which the format's timestamps overflow to zero.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    t: npt.NDArray[Any]
    p: npt.NDArray[Any]
    sensor: Sensor
    dropped: int = 0
    counter: int | None = None

    def __len__(self) -> int:
        return len(self.t)

    def between(self, start: int, end: int) -> "Events":
        """Return the events with start <= t < end (microseconds)."""
        first, last = np.searchsorted(self.t, [start, end])
        return self.cut(slice(first, last))

    def cut(self, part: slice) -> "Events":
        """Return some of the events, by their number."""
        return Events(self.x[part], self.y[part], self.t[part], self.p[part], self.sensor)


def checked_events(events: Events) -> Events:
    """Return a recording's events as int64, checked.

    Raises:
        BadRecording: There are no events, time decreases, a coordinate or polarity is invalid, or
            an event is repeated many times or comes long after the one before.
    """
    columns = np.stack([getattr(events, name).astype(np.int64) for name in "xytp"])
    if not columns.shape[1]:
        others = f", only {events.dropped} records of other kinds" if events.dropped else ""
        raise BadRecording(f"it has no events{others}")
    faults = _faults(columns, events)
    if (first := min(faults, key=itemgetter(0), default=None)) is not None:
        raise first[1]
    x, y, t, p = columns
    return Events(x, y, t, p, events.sensor, events.dropped)


def _faults(events: npt.NDArray[np.int64], read: Events) -> Iterator[tuple[int, BadRecording]]:
    """Yield the number of the first bad event of each kind, and the reason."""
    x, y, t, p = events
    back = np.flatnonzero(np.diff(t) < 0)
    if back.size:
        i = int(back[0]) + 1
        before, after = int(t[i - 1]), int(t[i])
        wraps = read.counter is not None and before - after > read.counter // 2
        what = "the timestamp counter overflows" if wraps else "timestamps decrease"
        sort = "; sort the events by t" * (read.counter is None)  # arrays have none
        yield i, BadRecording(f"{what} at event {i} (from {before} to {after} us){sort}")
    far = np.flatnonzero(np.diff(t) > _MOST_GAP)
    if far.size:
        i = int(far[0]) + 1
        text = f"event {i} comes more than an hour after the one before"
        yield i, BadRecording(f"{text} (from {t[i - 1]} to {t[i]} us)")
    width, height = read.sensor
    outside = np.flatnonzero((x < 0) | (x >= width) | (y < 0) | (y >= height))
    if outside.size:
        i = int(outside[0])
        text = f"event {i} at x={x[i]}, y={y[i]} is outside the {read.sensor} sensor"
        yield i, OtherSize(f"{text}, as are {outside.size} of {len(t)}")
    wrong = np.flatnonzero((p != 0) & (p != 1))
    if wrong.size:
        i = int(wrong[0])
        yield i, BadRecording(f"event {i} has polarity {p[i]} instead of 0 or 1")
    # The beginnings of stretches of equal events.
    starts = np.flatnonzero((np.diff(events, prepend=-1) != 0).any(0))
    lengths = np.diff(starts, append=len(t))
    long = np.flatnonzero(lengths >= _REPEATS)
    if long.size:
        i, number = int(starts[long[0]]), int(lengths[long[0]])
        text = f"event {i} is repeated {number} times (x={x[i]}, y={y[i]}, {t[i]} us)"
        yield i, BadRecording(f"{text}; the file may be damaged")


class Contents:
    """Contents of a recording's file, taken from the front.

    Attributes:
        position: Number of bytes taken so far.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 0

    def ended(self) -> bool:
        return self.position == len(self._data)

    def peek(self, size: int, record: str) -> bytes:
        """Return the next bytes, of a record, without taking them.

        Raises:
            BadRecording: They are incomplete.
        """
        data = self._data[self.position : self.position + size]
        if len(data) < size:
            number = counted(len(data), "byte")
            raise BadRecording(f"it is truncated: the {record} at its end is incomplete ({number})")
        return data

    def take(self, size: int, record: str) -> bytes:
        """Take the next bytes; see `peek`."""
        data = self.peek(size, record)
        self.position += size
        return data

    def rest(self) -> bytes:
        """Take everything that is left."""
        return self.take(len(self._data) - self.position, "rest")

    def header(self, mark: bytes, last: tuple[bytes, ...]) -> list[str]:
        """Take the text header of a camera's file, and return its lines.

        Binary records may also begin with the mark's byte, so only printable lines are header, and
        only in the first MiB of the file.

        Args:
            mark: First byte of each header line.
            last: Prefixes of the line that ends the header, if the format has one.
        """
        lines: list[str] = []
        while self._data.startswith(mark, self.position):
            end = self._data.find(b"\n", self.position, _MOST_HEADER)
            line = self._data[self.position : end].rstrip(b"\r")
            if end < 0 or not all(byte == 9 or 32 <= byte < 127 or byte >= 160 for byte in line):
                break
            self.position = end + 1
            lines.append(line.decode("latin-1"))
            if line.startswith(last):
                break
        return lines

    def records(self, dtype: str, columns: int = 1) -> npt.NDArray[Any]:
        """Take the rest, records of numbers, as an array (N, columns).

        Raises:
            BadRecording: The last record is incomplete.
        """
        size = np.dtype(dtype).itemsize * columns
        data = self.take((len(self._data) - self.position) // size * size, "record")
        if not self.ended():
            self.peek(size, "record")
        return np.frombuffer(data, dtype).reshape(-1, columns)
