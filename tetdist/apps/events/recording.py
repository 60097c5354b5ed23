"""Recordings of an event camera, and the checks that reject unusable ones."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tetdist.wording import counted

# Number of consecutive equal events (pixel and microsecond) that means an overwritten part of the
# file: a camera's pixel has a refractory period.
_REPEATS = 50


class BadRecording(ValueError):
    """Raised for an unusable recording; the text is the reason, without the file's name."""


class OtherSize(BadRecording):
    """Raised if the sensor's size is not the expected one."""


class BadEnd(BadRecording):
    """Raised after the last complete record, if what follows is incomplete or damaged."""


class Sensor(NamedTuple):
    """Size of a sensor in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


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

    def followed_by(self, *later: "Events") -> "Events":
        """Return these events and later ones."""
        parts = (self, *later)
        x, y, t, p = (np.concatenate([getattr(one, name) for one in parts]) for name in "xytp")
        return Events(x, y, t, p, self.sensor, sum(one.dropped for one in parts), self.counter)


def checked_events(pieces: Iterable[Events]) -> Iterator[Events]:
    """Check a recording's events, piece by piece.

    Pieces without events are left out. How a recording is divided into pieces changes no check.

    Raises:
        BadRecording: There are no events, time decreases, a coordinate or polarity is invalid, or
            an event is repeated many times. The events before were yielded.
    """
    last = np.empty((4, 0), np.int64)  # The last events of the pieces before.
    number = dropped = 0
    for piece in pieces:
        columns = (piece.x, piece.y, piece.t, piece.p)
        new = np.stack([values.astype(np.int64) for values in columns])
        dropped += piece.dropped
        if not new.shape[1]:
            continue
        before = last.shape[1]
        known = np.concatenate([last, new], 1)
        faults = _faults(known, number - before, piece)
        end, error = min(faults, key=itemgetter(0), default=(None, None))
        last = known[:, 1 - _REPEATS :]
        number += new.shape[1]
        x, y, t, p = known[:, before:end]
        if len(t):
            yield Events(x, y, t, p, piece.sensor, piece.dropped)
        if error:
            raise error
    if not number:
        others = f", only {dropped} records of other kinds" if dropped else ""
        raise BadRecording(f"it has no events{others}")


def _faults(
    events: npt.NDArray[np.int64], first: int, read: Events
) -> Iterator[tuple[int, BadRecording]]:
    """Yield the first bad event of each kind and its reason; number `first` is events[:, 0]."""
    x, y, t, p = events
    back = np.flatnonzero(np.diff(t) < 0)
    if back.size:
        i = int(back[0]) + 1
        before, after = int(t[i - 1]), int(t[i])
        wraps = read.counter is not None and before - after > read.counter // 2
        what = "the timestamp counter overflows" if wraps else "timestamps decrease"
        yield i, BadRecording(f"{what} at event {first + i} (from {before} to {after} us)")
    width, height = read.sensor
    outside = np.flatnonzero((x < 0) | (x >= width) | (y < 0) | (y >= height))
    if outside.size:
        i = int(outside[0])
        text = f"event {first + i} at x={x[i]}, y={y[i]} is outside the {read.sensor} sensor"
        # If most are, the camera is another one, and no event before this one is of use.
        i *= 2 * outside.size <= len(t)
        yield i, OtherSize(f"{text}, as are {outside.size} of {len(t)}")
    wrong = np.flatnonzero((p != 0) & (p != 1))
    if wrong.size:
        i = int(wrong[0])
        yield i, BadRecording(f"event {first + i} has polarity {p[i]} instead of 0 or 1")
    # The beginnings of stretches of equal events.
    starts = np.flatnonzero((np.diff(events, prepend=-1) != 0).any(0))
    lengths = np.diff(starts, append=len(t))
    long = np.flatnonzero(lengths >= _REPEATS)
    if long.size:
        i, number = int(starts[long[0]]), int(lengths[long[0]])
        text = f"event {first + i} is repeated {number} times (x={x[i]}, y={y[i]}, {t[i]} us)"
        yield i, BadRecording(f"{text}; the file may be damaged")


class Contents:
    """Contents of a recording, which arrive in pieces; a whole file is one piece.

    Attributes:
        position: Number of bytes taken so far.
        bad_end: Reason why the recording was not used to its end; None: it was.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.position = 0
        self.bad_end: BadRecording | None = None
        self._pieces = iter(pieces)
        self._data, self._start = b"", 0

    def _extend(self) -> bool:
        """Wait for the next piece; return whether there is one."""
        piece = next(self._pieces, b"")
        if piece:
            self._data, self._start = self._data[self._start :] + piece, 0
        return bool(piece)

    def ended(self) -> bool:
        """Wait for the next byte; return whether there is none."""
        return self._start == len(self._data) and not self._extend()

    def peek(self, size: int, record: str) -> bytes:
        """Wait for the next bytes, of a record, and return them without taking them.

        Raises:
            BadEnd: They are incomplete.
        """
        while (there := len(self._data) - self._start) < size:
            if not self._extend():
                number = counted(there, "byte")
                raise BadEnd(f"it is truncated: the {record} at its end is incomplete ({number})")
        return self._data[self._start : self._start + size]

    def take(self, size: int, record: str) -> bytes:
        """Wait for the next bytes and take them; see `peek`."""
        data = self.peek(size, record)
        self._start += size
        self.position += size
        return data

    def rest(self) -> bytes:
        """Wait for the end, and take everything."""
        data = b"".join([self._data[self._start :], *self._pieces])
        self._start = len(self._data)
        return data

    def header(self, mark: bytes, last: tuple[bytes, ...]) -> list[str]:
        """Take the text header of a camera's file, and return its lines.

        Binary records may also begin with the mark's byte, so only printable lines are header.

        Args:
            mark: First byte of each header line.
            last: Prefixes of the line that ends the header, if the format has one.
        """
        lines: list[str] = []
        while not self.ended() and self._data.startswith(mark, self._start):
            end = self._data.find(b"\n", self._start)
            line = self._data[self._start : end if end >= 0 else None].rstrip(b"\r")
            if not all(byte == 9 or 32 <= byte < 127 or byte >= 160 for byte in line):
                break
            if end < 0 and self._extend():
                continue
            if end < 0:
                break
            self.take(end + 1 - self._start, "header")
            lines.append(line.decode("latin-1"))
            if line.startswith(last):
                break
        return lines

    def records(self, dtype: str, columns: int = 1) -> Iterator[npt.NDArray[Any]]:
        """Take the rest, records of numbers, as arrays (N, columns), as they arrive.

        Raises:
            BadEnd: The last record is incomplete.
        """
        size = np.dtype(dtype).itemsize * columns
        while not self.ended():
            self.peek(size, "record")
            data = self.take((len(self._data) - self._start) // size * size, "record")
            yield np.frombuffer(data, dtype).reshape(-1, columns)
