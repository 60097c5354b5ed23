"""Reader of AEDAT, the formats of jAER: 2.0 (DVS128, DAVIS) and 3.1 (DVS128 Gesture)."""

import struct
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

DVS128 = Sensor(128, 128)
DAVIS240 = Sensor(240, 180)

_MAGIC = b"#!AER-DAT"
# A packet of AEDAT 3.1 begins with its type, source, event size, offset of the timestamp, timestamp
# overflow, capacity, events and valid events.
_PACKET = struct.Struct("<hhiiiiii")
_POLARITY_EVENTS = 1


def read_aedat(data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of an .aedat file: AEDAT 2.0 or 3.1.

    Args:
        data: The file's contents.
        sensor: Size of an AEDAT 2.0 camera, 128x128 or 240x180, which some headers omit.

    Raises:
        BadRecording: The file cannot be used.
    """
    version = _version(data)
    if version.startswith("2."):
        return _read_2(data, sensor)
    if version == "3.1":
        return _read_3(data, sensor)
    if version.startswith("4."):
        raise BadRecording("its contents are AEDAT 4; rename it to .aedat4")
    raise BadRecording(f"AEDAT {version} is not supported (only 2.0, 3.1 and 4)")


def _version(data: bytes) -> str:
    if not data.startswith(_MAGIC):
        raise BadRecording("it is not an AEDAT file: it does not begin with #!AER-DAT")
    return data[len(_MAGIC) : data.find(b"\n")].strip().decode("latin-1")


def _read_2(data: bytes, sensor: Sensor | None) -> Events:
    header, body = split_header(data, b"#", b"#End Of ASCII Header")
    records = fixed_records(body, ">u4", 2)
    address, t = records[:, 0], records[:, 1]
    sensor = sensor or _camera(header, address)
    if sensor == DVS128:
        is_event = (address & 0x8000) == 0  # Bit 15 marks external triggers.
        beyond = np.flatnonzero(address >> 16)
        if beyond.size:
            raise BadRecording(f"address {address[beyond[0]]:#x} is invalid for a DVS128")
        x, y = (address >> 1) & 0x7F, (address >> 8) & 0x7F
        p = 1 - (address & 1).astype(np.int64)  # The bit is set if the pixel became darker.
    elif sensor == DAVIS240:
        filled = np.flatnonzero(address == 0xFFFF_FFFF)
        if filled.size:
            raise BadRecording(f"record {filled[0]} has all bits set; the file may be damaged")
        # Bit 31 marks frames and inertial measurements, bit 10 external triggers.
        is_event = (address & 0x8000_0400) == 0
        x, y, p = (address >> 12) & 0x3FF, (address >> 22) & 0x1FF, (address >> 11) & 1
    else:
        raise BadRecording(f"AEDAT 2.0 needs a {DVS128} or {DAVIS240} sensor, not {sensor}")
    # Both cameras count columns from the right and rows from the bottom.
    return checked_events(
        sensor.width - 1 - x[is_event].astype(np.int64),
        sensor.height - 1 - y[is_event].astype(np.int64),
        t[is_event],
        p[is_event],
        sensor,
        dropped=int(len(t) - is_event.sum()),
        counter=2**32,
    )


def _camera(header: list[str], address: npt.NDArray[Any]) -> Sensor:
    """Return the camera that the header names, or a DVS128 if all addresses fit it."""
    chips = [line for line in header if line.startswith("# AEChip:")]
    if chips and "DVS128" in chips[0]:
        return DVS128
    if chips and "DAVIS240" in chips[0]:
        return DAVIS240
    if chips:
        raise BadRecording(f"its camera is not supported: {chips[0].removeprefix('# AEChip: ')}")
    if (address >> 16).any():
        raise BadRecording(
            "its header names no camera and the addresses do not fit a DVS128; give --sensor"
        )
    return DVS128


def _read_3(data: bytes, sensor: Sensor | None) -> Events:
    _, body = split_header(data, b"#", b"#!END-HEADER")
    parts: list[npt.NDArray[np.int64]] = []
    position = dropped = 0
    while position < len(body):
        if len(body) - position < _PACKET.size:
            raise BadRecording("it is truncated within a packet's header")
        fields = _PACKET.unpack_from(body, position)
        kind, _, size, _, overflow, capacity, number, num_valid = fields
        position += _PACKET.size
        if size <= 0 or not 0 <= number <= capacity:
            raise BadRecording(
                f"the packet at byte {position - _PACKET.size} of its data is damaged"
            )
        # A file stores the packet's events, not its capacity.
        packet = body[position : position + size * number]
        if len(packet) < size * number:
            raise BadRecording(f"it is truncated within a packet of {number} events")
        position += len(packet)
        if kind != _POLARITY_EVENTS:
            dropped += number
            continue
        words = fixed_records(packet, "<u4", 2).astype(np.int64)
        word, t = words[:, 0], words[:, 1] + (overflow << 31)
        valid = (word & 1) == 1
        if valid.sum() != num_valid:
            raise BadRecording(
                f"it is damaged: a packet declares {num_valid} of {number} events as valid, but"
                f" {valid.sum()} are"
            )
        dropped += number - num_valid
        parts.append(np.stack([word >> 17, (word >> 2) & 0x7FFF, t, (word >> 1) & 1], 1)[valid])
    x, y, t, p = np.concatenate([np.empty((0, 4), np.int64), *parts]).T
    return checked_events(x, y, t, p, sensor or DVS128, dropped=dropped)


READERS = {".aedat": read_aedat}
