"""Recordings of an event camera, and what makes one unusable."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# An event that is there so often in a row, at one pixel and microsecond, comes from a stretch of
# the file that was overwritten: a camera's pixel rests after an event.
_REPEATS = 50


class BadRecording(ValueError):
    """A recording that cannot be used; the text is the reason, without the file's name."""


class Sensor(NamedTuple):
    """Size of a sensor in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, eq=False)
class Events:
    """N events in the order of time.

    Attributes:
        x: (N,) column, 0 at the left.
        y: (N,) row, 0 at the top.
        t: (N,) microseconds.
        p: (N,) polarity, 1 where it became brighter (ON), 0 where darker (OFF).
        sensor: Size of the sensor.
        dropped: Records of the file that are no events of the sensor's pixels: frames, inertial
            measurements, triggers, events marked invalid.
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
    """Make events of a file's columns, if they are what they should be.

    Args:
        x, y, t, p: (N,) integers, see `Events`.
        sensor, dropped: See `Events`.
        counter: Microseconds after which the format's timestamps begin again at zero.

    Raises:
        BadRecording: There are no events, time goes back, a coordinate or polarity is none, or one
            event is repeated over and over.
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
        what = "the timestamp counter wraps" if wraps else "timestamps go back"
        raise BadRecording(f"{what} at event {i} (from {before} to {after} us)")
    outside = np.flatnonzero((x < 0) | (x >= sensor.width) | (y < 0) | (y >= sensor.height))
    if outside.size:
        i = int(outside[0])
        raise BadRecording(
            f"event {i} lies at x={x[i]}, y={y[i]}, outside the {sensor} sensor"
            f" ({outside.size} of {len(t)} do; is it another sensor? --sensor WIDTHxHEIGHT)"
        )
    wrong = np.flatnonzero((p != 0) & (p != 1))
    if wrong.size:
        i = int(wrong[0])
        raise BadRecording(f"event {i} has polarity {p[i]} instead of 0 or 1")
    _check_repeats(np.stack([x, y, t, p]))
    return Events(x, y, t, p, sensor, dropped)


def _check_repeats(events: npt.NDArray[np.int64]) -> None:
    """Refuse events (4, N) of which one is there _REPEATS times in a row, to the microsecond."""
    changes = np.flatnonzero((np.diff(events) != 0).any(0)) + 1
    starts = np.concatenate([[0], changes])
    lengths = np.diff(starts, append=events.shape[1])
    long = np.flatnonzero(lengths >= _REPEATS)
    if long.size:
        first, number = int(starts[long[0]]), int(lengths[long[0]])
        raise BadRecording(
            f"event {first} is there {number} times in a row (x={events[0, first]},"
            f" y={events[1, first]}, {events[2, first]} us): is a stretch zeroed?"
        )


def split_header(data: bytes, mark: bytes, last: bytes) -> tuple[list[str], bytes]:
    """Split a camera's file into the text lines at its beginning and the binary rest.

    A binary record may begin with the mark's byte, too, so only printable lines are header.

    Args:
        data: The file's contents.
        mark: Beginning of each header line.
        last: Beginning of the line that ends the header, where the format has one.
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
    """Read numbers (N, columns), if the data is a whole number of such records.

    Raises:
        BadRecording: It is not: the file was cut off.
    """
    size = np.dtype(dtype).itemsize * columns
    if len(data) % size:
        raise BadRecording(
            f"it is truncated: {len(data)} bytes of data are no multiple of {size}, an event's size"
        )
    return np.frombuffer(data, dtype).reshape(-1, columns)
