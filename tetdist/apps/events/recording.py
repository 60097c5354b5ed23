"""Recordings of an event camera, and the checks that reject unusable ones."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Number of consecutive equal events (pixel and microsecond) that means an overwritten part of the
# file: a camera's pixel has a refractory period.
_REPEATS = 50


class BadRecording(ValueError):
    """Raised for an unusable recording; the text is the reason, without the file's name."""


class Sensor(NamedTuple):
    """Size of a sensor in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, eq=False)
class Events:
    """Events of a recording, N in temporal order.

    Attributes:
        x: (N,) column, 0 at the left.
        y: (N,) row, 0 at the top.
        t: (N,) microseconds.
        p: (N,) polarity, 1 if the pixel became brighter (ON), 0 if darker (OFF).
        sensor: Size of the sensor.
        dropped: Number of other records in the file: frames, inertial measurements, triggers,
            events marked invalid.
    """

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    t: npt.NDArray[np.int64]
    p: npt.NDArray[np.int64]
    sensor: Sensor
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.t)

    def between(self, start: int, end: int) -> "Events":
        """Return the events with start <= t < end (microseconds)."""
        first, last = np.searchsorted(self.t, [start, end])
        return self.cut(slice(first, last))

    def cut(self, part: slice) -> "Events":
        """Return some of the events, by their number."""
        return Events(self.x[part], self.y[part], self.t[part], self.p[part], self.sensor)


def checked_events(
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    t: npt.NDArray[Any],
    p: npt.NDArray[Any],
    sensor: Sensor,
    *,
    dropped: int = 0,
    counter: int | None = None,
) -> Events:
    """Convert a file's columns to events, and check them.

    Args:
        x, y, t, p: (N,) integers, see `Events`.
        sensor, dropped: See `Events`.
        counter: Microseconds after which the format's timestamps overflow to zero.

    Raises:
        BadRecording: There are no events, time decreases, a coordinate or polarity is invalid, or
            an event is repeated many times.
    """
    x, y, t, p = (np.asarray(values).astype(np.int64) for values in (x, y, t, p))
    if not len(t):
        others = f", only {dropped} records of other kinds" if dropped else ""
        raise BadRecording(f"it has no events{others}")
    back = np.flatnonzero(np.diff(t) < 0)
    if back.size:
        i = int(back[0]) + 1
        before, after = int(t[i - 1]), int(t[i])
        wraps = counter is not None and before - after > counter // 2
        what = "the timestamp counter overflows" if wraps else "timestamps decrease"
        raise BadRecording(f"{what} at event {i} (from {before} to {after} us)")
    outside = np.flatnonzero((x < 0) | (x >= sensor.width) | (y < 0) | (y >= sensor.height))
    if outside.size:
        i = int(outside[0])
        raise BadRecording(
            f"event {i} at x={x[i]}, y={y[i]} is outside the {sensor} sensor, as are"
            f" {outside.size} of {len(t)}; if the sensor is another, give --sensor WIDTHxHEIGHT"
        )
    wrong = np.flatnonzero((p != 0) & (p != 1))
    if wrong.size:
        i = int(wrong[0])
        raise BadRecording(f"event {i} has polarity {p[i]} instead of 0 or 1")
    _check_repeats(np.stack([x, y, t, p]))
    return Events(x, y, t, p, sensor, dropped)


def _check_repeats(events: npt.NDArray[np.int64]) -> None:
    """Refuse events (4, N) with _REPEATS or more consecutive equal ones."""
    changes = np.flatnonzero((np.diff(events) != 0).any(0)) + 1
    starts = np.concatenate([[0], changes])
    lengths = np.diff(starts, append=events.shape[1])
    long = np.flatnonzero(lengths >= _REPEATS)
    if long.size:
        first, number = int(starts[long[0]]), int(lengths[long[0]])
        raise BadRecording(
            f"event {first} is repeated {number} times (x={events[0, first]},"
            f" y={events[1, first]}, {events[2, first]} us); the file may be damaged"
        )


def split_header(data: bytes, mark: bytes, last: bytes) -> tuple[list[str], bytes]:
    """Split a camera's file into its text header and the binary rest.

    Binary records may also begin with the mark's byte, so only printable lines are header.

    Args:
        data: The file's contents.
        mark: Prefix of each header line.
        last: Prefix of the line that ends the header, if the format has one.
    """
    lines: list[str] = []
    start = 0
    while data.startswith(mark, start):
        end = data.find(b"\n", start)
        line = data[start:end].rstrip(b"\r")
        if end < 0 or not all(byte == 9 or 32 <= byte < 127 or byte >= 160 for byte in line):
            break
        lines.append(line.decode("latin-1"))
        start = end + 1
        if line.startswith(last):
            break
    return lines, data[start:]


def fixed_records(data: bytes, dtype: str, columns: int = 1) -> npt.NDArray[Any]:
    """Read records of numbers as an array (N, columns).

    Raises:
        BadRecording: The last record is incomplete, so the file is truncated.
    """
    size = np.dtype(dtype).itemsize * columns
    if len(data) % size:
        raise BadRecording(
            f"it is truncated: {len(data)} bytes are not a multiple of {size}, an event's size"
        )
    return np.frombuffer(data, dtype).reshape(-1, columns)
