"""Decoder of the formats of Prophesee's cameras: .dat, and .raw in EVT 2.0 and EVT 3.0."""

import re

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.recording import BadRecording, Contents, Events, OtherSize, Sensor

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


def decode_dat(contents: Contents, sensor: Sensor | None) -> Events:
    """Decode a .dat file.

    Raises:
        BadRecording: The file cannot be used.
    """
    header = _header(contents)
    if any(_evt_version(line) for line in header):
        raise BadRecording("its header is of EVT; rename it to .raw")
    kind, size = contents.take(2, "header")
    if kind not in _DAT_TYPES or size != _DAT_SIZE:
        raise BadRecording(
            f"its events have type {kind:#x} and {size} bytes; only change detections of 8"
            " bytes are supported"
        )
    sensor = _sensor(header, sensor)
    t, word = contents.records("<u4", 2).T
    x, y, p = word & 0x3FFF, (word >> 14) & 0x3FFF, word >> 28
    return Events(x, y, t, p, sensor, counter=2**32)


def decode_raw(contents: Contents, sensor: Sensor | None) -> Events:
    """Decode a .raw file in EVT 2.0 or EVT 3.0.

    Raises:
        BadRecording: The file cannot be used.
    """
    header = _header(contents)
    versions = {version for line in header if (version := _evt_version(line))}
    if versions == {"2"}:
        return _decode_evt2(contents, _sensor(header, sensor))
    if versions == {"3"}:
        return _decode_evt3(contents, _sensor(header, sensor))
    formats = " and ".join(f"EVT {version}" for version in sorted(versions)) or "no EVT version"
    raise BadRecording(f"its header has {formats}; EVT 2.0 and EVT 3.0 are supported")


def _header(contents: Contents) -> list[str]:
    header = contents.header(b"%", (b"% end",))
    if not header:
        raise BadRecording("it is not a Prophesee file: it does not begin with a % header")
    return header


def _evt_version(line: str) -> str | None:
    """Return the version in a header line: "2", "2.1", "3", ..."""
    match = re.match(r"% (?:evt |format EVT)(\d+(?:\.\d+)?)", line)
    return match[1].removesuffix(".0") if match else None


def _sensor(header: list[str], given: Sensor | None) -> Sensor:
    stated = _stated_sensor(header)
    if given and stated and given != stated:
        raise OtherSize(f"its sensor is {stated}, not {given} as expected")
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
        return Sensor.stated(match[1], match[2])
    width = re.search(r"\bwidth[ =](\d+)", text, re.IGNORECASE)
    height = re.search(r"\bheight[ =](\d+)", text, re.IGNORECASE)
    return Sensor.stated(width[1], height[1]) if width and height else None


def _decode_evt2(contents: Contents, sensor: Sensor) -> Events:
    word = contents.records("<u4")[:, 0].astype(np.int64)
    kind = word >> 28
    known = (_EVT2_OFF, _EVT2_ON, _EVT2_TIME_HIGH, *_EVT2_OTHERS)
    _check_kinds(kind, known, _EVT2_CONTINUED, "EVT 2.0")
    times = _latest(kind == _EVT2_TIME_HIGH, word & 0x0FFF_FFFF)
    # Events before the first time word have no time.
    is_event = (kind <= _EVT2_ON) & (times >= 0)
    event = word[is_event]
    return Events(
        (event >> 11) & 0x7FF,
        event & 0x7FF,
        (times[is_event] << 6) | ((event >> 22) & 0x3F),
        event >> 28,
        sensor,
        dropped=int((~is_event & (kind != _EVT2_TIME_HIGH)).sum()),
        counter=2**34,
    )


def _decode_evt3(contents: Contents, sensor: Sensor) -> Events:
    word = contents.records("<u2")[:, 0].astype(np.int64)
    kind, value = word >> 12, word & 0xFFF
    known = (_EVT3_Y, _EVT3_X, _EVT3_BASE, _EVT3_VECTOR_12, _EVT3_VECTOR_8)
    others = (_EVT3_TIME_LOW, _EVT3_TIME_HIGH, *_EVT3_OTHERS)
    _check_kinds(kind, known + others, _EVT3_CONTINUED, "EVT 3.0")
    _check_rows(kind, value)
    high, low = _evt3_times(kind, value)
    row = _latest(kind == _EVT3_Y, value & 0x7FF)
    is_base = kind == _EVT3_BASE
    polarity = _latest(is_base, value >> 11)
    # Each vector word continues where the previous one ended.
    steps = np.select([kind == _EVT3_VECTOR_12, kind == _EVT3_VECTOR_8], [12, 8], 0)
    before = np.cumsum(steps) - steps
    origin = _latest(is_base, (value & 0x7FF) - before) + before

    single = np.flatnonzero(kind == _EVT3_X)
    vector = np.flatnonzero(steps)
    if vector.size and polarity[vector[0]] < 0:
        raise BadRecording("a vector of events precedes its base address; the file may be damaged")
    bits = (value[vector, None] >> np.arange(12)) & 1
    bits[:, 8:] &= (kind[vector] == _EVT3_VECTOR_12)[:, None]
    which, bit = np.nonzero(bits)
    vector = vector[which]

    position = np.concatenate([single, vector])
    x = np.concatenate([value[single] & 0x7FF, origin[vector] + bit])
    p = np.concatenate([value[single] >> 11, polarity[vector]])
    order = np.argsort(position, kind="stable")
    position, x, p = position[order], x[order], p[order]
    complete = (row[position] >= 0) & (high[position] >= 0)
    position, x, p = position[complete], x[complete], p[complete]

    return Events(
        x,
        row[position],
        (high[position] << 12) + low[position],
        p,
        sensor,
        dropped=int((kind == 0xA).sum() + (~complete).sum()),
    )


def _evt3_times(
    kind: npt.NDArray[np.int64], value: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the two halves of the time at each word; the upper one is -1 before its first word.

    The 24-bit counter overflows every 17 s; the upper half includes the overflows.
    """
    is_high = kind == _EVT3_TIME_HIGH
    positions = np.flatnonzero(is_high)
    highs = value[positions]
    before = np.concatenate([highs[:1], highs[:-1]])
    back = np.flatnonzero((highs < before) & (highs - before >= -(2**11)))
    if back.size:
        i = int(back[0])
        raise BadRecording(
            f"the upper half of the time decreases at word {positions[i]} of its"
            f" data (from {before[i]} to {highs[i]})"
        )
    value = value.copy()
    value[positions] += np.cumsum(highs - before < -(2**11)) * 2**12
    high = _latest(is_high, value)
    # The upper half is repeated frequently; when it changes, the lower half starts at zero.
    changes = np.diff(high, prepend=-1) != 0
    is_low = kind == _EVT3_TIME_LOW
    return high, _latest(is_low | changes, np.where(is_low, value, 0), 0)


def _latest(
    marked: npt.NDArray[np.bool_], values: npt.NDArray[np.int64], before: int = -1
) -> npt.NDArray[np.int64]:
    """Return the value (N,) of the last marked word up to each word; `before` until the first."""
    last = np.maximum.accumulate(np.where(marked, np.arange(1, len(marked) + 1), 0))
    return np.concatenate([[before], values])[last]


def _check_kinds(
    kind: npt.NDArray[np.int64],
    known: tuple[int, ...],
    continued: tuple[int, ...],
    format_name: str,
) -> None:
    """Refuse unknown words, and continuation words that continue none, such as an area of ones."""
    foreign = np.flatnonzero(~np.isin(kind, known))
    if foreign.size:
        i = int(foreign[0])
        raise BadRecording(
            f"word {i} of its data has the type {kind[i]:#x}, which {format_name} does not have"
        )
    previous = np.concatenate([[-1], kind[:-1]])
    alone = np.flatnonzero(np.isin(kind, continued) & ~np.isin(previous, (_OTHER, *continued)))
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
        i = int(again[0]) + 1
        raise BadRecording(
            f"word {i} of its data repeats the previous word, row {value[i] & 0x7FF}; the file may"
            " be damaged"
        )


DECODERS = {".dat": decode_dat, ".raw": decode_raw}
