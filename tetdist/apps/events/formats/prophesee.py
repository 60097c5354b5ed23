"""Reader of the formats of Prophesee's cameras: .dat, and .raw in EVT 2.0 and EVT 3.0."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.recording import (
    BadRecording,
    Events,
    Sensor,
    checked_events,
    fixed_records,
    split_header,
)

# Sensor sizes that the files of some cameras omit, by a part of the header's plugin_name.
_SENSORS = {
    "genx320": Sensor(320, 320),
    "gen3": Sensor(640, 480),
    "gen4": Sensor(1280, 720),
    "imx636": Sensor(1280, 720),
}
# The type of event follows the header of a .dat file: one until 2018, the other later.
_DAT_TYPES = (0x00, 0x0C)
_DAT_SIZE = 8

_EVT2_OFF, _EVT2_ON, _EVT2_TIME_HIGH = 0x0, 0x1, 0x8
_EVT2_OTHERS = (0xA, 0xE, 0xF)
_EVT2_CONTINUED = (0xF,)

_EVT3_Y, _EVT3_X, _EVT3_BASE, _EVT3_VECTOR_12, _EVT3_VECTOR_8 = 0x0, 0x2, 0x3, 0x4, 0x5
_EVT3_TIME_LOW, _EVT3_TIME_HIGH = 0x6, 0x8
_EVT3_OTHERS = (0x7, 0xA, 0xE, 0xF)
_EVT3_CONTINUED = (0x7, 0xF)
# In both, continued words follow a word of this type.
_OTHER = 0xE


def read_dat(data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of a .dat file.

    Raises:
        BadRecording: The file cannot be used.
    """
    header, body = split_header(data, b"%", b"% end")
    if not header:
        raise BadRecording("it is not a Prophesee file: it does not begin with a % header")
    if any(_evt_version(line) for line in header):
        raise BadRecording("its header is of EVT; rename it to .raw")
    if len(body) < 2:
        raise BadRecording("it is truncated within its header")
    if body[0] not in _DAT_TYPES or body[1] != _DAT_SIZE:
        raise BadRecording(
            f"its events have type {body[0]:#x} and {body[1]} bytes; only change detections of 8"
            " bytes are supported"
        )
    records = fixed_records(body[2:], "<u4", 2)
    t, word = records[:, 0], records[:, 1]
    x, y, p = word & 0x3FFF, (word >> 14) & 0x3FFF, word >> 28
    return checked_events(x, y, t, p, _sensor(header, sensor), counter=2**32)


def read_raw(data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of a .raw file in EVT 2.0 or EVT 3.0.

    Raises:
        BadRecording: The file cannot be used.
    """
    header, body = split_header(data, b"%", b"% end")
    if not header:
        raise BadRecording("it is not a Prophesee file: it does not begin with a % header")
    versions = {version for line in header if (version := _evt_version(line))}
    if versions == {"2"}:
        return _read_evt2(body, _sensor(header, sensor))
    if versions == {"3"}:
        return _read_evt3(body, _sensor(header, sensor))
    found = " and ".join(f"EVT {version}" for version in sorted(versions)) or "no EVT version"
    raise BadRecording(f"its header has {found}; EVT 2.0 and EVT 3.0 are supported")


def _evt_version(line: str) -> str | None:
    """Return the version in a header line: "2", "2.1", "3", ..."""
    match = re.match(r"% (?:evt |format EVT)(\d+(?:\.\d+)?)", line)
    return match[1].removesuffix(".0") if match else None


def _sensor(header: list[str], given: Sensor | None) -> Sensor:
    stated = _stated_sensor(header)
    if given and stated and given != stated:
        raise BadRecording(f"its sensor is {stated}, not {given} as expected")
    if sensor := given or stated:
        return sensor
    for line in header:
        if line.startswith("% plugin_name"):
            for part, sensor in _SENSORS.items():
                if part in line:
                    return sensor
    raise BadRecording("its header does not store the sensor's size; give --sensor WIDTHxHEIGHT")


def _stated_sensor(header: list[str]) -> Sensor | None:
    text = "\n".join(header)
    if match := re.search(r"^% geometry (\d+)x(\d+)", text, re.MULTILINE):
        return Sensor(int(match[1]), int(match[2]))
    width = re.search(r"\bwidth[ =](\d+)", text, re.IGNORECASE)
    height = re.search(r"\bheight[ =](\d+)", text, re.IGNORECASE)
    return Sensor(int(width[1]), int(height[1])) if width and height else None


def _read_evt2(body: bytes, sensor: Sensor) -> Events:
    word = fixed_records(body, "<u4")[:, 0].astype(np.int64)
    kind = word >> 28
    _check_kinds(kind, (_EVT2_OFF, _EVT2_ON, _EVT2_TIME_HIGH, *_EVT2_OTHERS), "EVT 2.0")
    _check_continued(kind, _EVT2_CONTINUED)
    high = _latest(kind == _EVT2_TIME_HIGH)
    # Events before the first time word have no time.
    is_event = (kind <= _EVT2_ON) & (high >= 0)
    event = word[is_event]
    t = ((word[high[is_event]] & 0x0FFF_FFFF) << 6) | ((event >> 22) & 0x3F)
    return checked_events(
        (event >> 11) & 0x7FF,
        event & 0x7FF,
        t,
        event >> 28,
        sensor,
        dropped=int(np.isin(kind, _EVT2_OTHERS).sum() + ((kind <= _EVT2_ON) & (high < 0)).sum()),
        counter=2**34,
    )


def _read_evt3(body: bytes, sensor: Sensor) -> Events:
    word = fixed_records(body, "<u2")[:, 0].astype(np.int64)
    kind, value = word >> 12, word & 0xFFF
    known = (_EVT3_Y, _EVT3_X, _EVT3_BASE, _EVT3_VECTOR_12, _EVT3_VECTOR_8)
    _check_kinds(kind, (*known, _EVT3_TIME_LOW, _EVT3_TIME_HIGH, *_EVT3_OTHERS), "EVT 3.0")
    _check_continued(kind, _EVT3_CONTINUED)
    _check_rows(kind, value)
    time, row = _evt3_times(kind, value), _latest(kind == _EVT3_Y)
    base = _latest(kind == _EVT3_BASE)

    single = np.flatnonzero(kind == _EVT3_X)
    # Each vector word continues where the previous one ended.
    steps = np.select([kind == _EVT3_VECTOR_12, kind == _EVT3_VECTOR_8], [12, 8], 0)
    before = np.cumsum(steps) - steps
    vector = np.flatnonzero(steps)
    if vector.size and base[vector[0]] < 0:
        raise BadRecording("a vector of events precedes its base address; the file may be damaged")
    bits = (value[vector, None] >> np.arange(12)) & 1
    bits[:, 8:] &= (kind[vector] == _EVT3_VECTOR_12)[:, None]
    which, bit = np.nonzero(bits)
    vector = vector[which]
    origin = base[vector]

    position = np.concatenate([single, vector])
    x = np.concatenate(
        [value[single] & 0x7FF, (value[origin] & 0x7FF) + before[vector] - before[origin] + bit]
    )
    p = np.concatenate([value[single] >> 11, value[origin] >> 11])
    order = np.argsort(position, kind="stable")
    position, x, p = position[order], x[order], p[order]
    complete = (row[position] >= 0) & (time[position] >= 0)
    position, x, p = position[complete], x[complete], p[complete]
    return checked_events(
        x,
        value[row[position]] & 0x7FF,
        time[position],
        p,
        sensor,
        dropped=int((kind == 0xA).sum() + (~complete).sum()),
    )


def _evt3_times(kind: npt.NDArray[np.int64], value: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the time in microseconds at each word; -1 before the first word of the upper half.

    The 24-bit counter overflows every 17 s; this adds the overflows.
    """
    positions = np.flatnonzero(kind == _EVT3_TIME_HIGH)
    high = value[positions]
    back = np.flatnonzero((np.diff(high) < 0) & (np.diff(high) >= -(2**11)))
    if back.size:
        i = int(back[0])
        raise BadRecording(
            f"the upper half of the time decreases at word {positions[i + 1]} of its data (from"
            f" {high[i]} to {high[i + 1]})"
        )
    high = high + np.cumsum(np.diff(high, prepend=high[:1]) < -(2**11)) * 2**12
    # The upper half is repeated frequently; when it changes, the lower half starts at zero.
    changes = np.zeros(len(kind), bool)
    changes[positions[np.diff(high, prepend=-1) != 0]] = True
    last_low, last_change = _latest(kind == _EVT3_TIME_LOW), _latest(changes)
    low = np.where(last_low > last_change, value[last_low], 0)
    which = np.cumsum(kind == _EVT3_TIME_HIGH) - 1
    return np.where(which >= 0, (high[which] << 12) + low, -1) if len(high) else which


def _latest(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the position (N,) of the last marked word up to each word; -1 before the first."""
    return np.maximum.accumulate(np.where(marked, np.arange(len(marked)), -1))


def _check_kinds(kind: npt.NDArray[Any], known: tuple[int, ...], format_name: str) -> None:
    foreign = np.flatnonzero(~np.isin(kind, known))
    if foreign.size:
        i = int(foreign[0])
        raise BadRecording(
            f"word {i} of its data has the type {kind[i]:#x}, which {format_name} does not have"
        )


def _check_continued(kind: npt.NDArray[Any], continued: tuple[int, ...]) -> None:
    """Refuse continuation words without a beginning, such as an area filled with ones."""
    before = np.concatenate([[-1], kind[:-1]])
    alone = np.flatnonzero(np.isin(kind, continued) & ~np.isin(before, (_OTHER, *continued)))
    if alone.size:
        i = int(alone[0])
        raise BadRecording(
            f"word {i} of its data continues a word that is missing (type {kind[i]:#x})"
        )


def _check_rows(kind: npt.NDArray[np.int64], value: npt.NDArray[np.int64]) -> None:
    """Refuse two equal consecutive row words, such as an area filled with zeros.

    The format only stores changes.
    """
    is_row = kind == _EVT3_Y
    again = np.flatnonzero(is_row[1:] & is_row[:-1] & (np.diff(value) == 0))
    if again.size:
        i = int(again[0])
        raise BadRecording(
            f"word {i + 1} of its data repeats the previous word, row {value[i] & 0x7FF}; the file"
            " may be damaged"
        )


READERS = {".dat": read_dat, ".raw": read_raw}
