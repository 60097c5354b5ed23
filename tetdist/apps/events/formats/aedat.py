"""Decoder of AEDAT, the formats of jAER: 2.0 (DVS128, DAVIS) and 3.1 (DVS128 Gesture)."""

import struct

import numpy as np

from tetdist.apps.events.recording import BadRecording, Contents, Events, OtherSize, Sensor

DVS128 = Sensor(128, 128)
DAVIS240 = Sensor(240, 180)

_MAGIC = "#!AER-DAT"
# A packet of AEDAT 3.1 begins with its type, source, event size, offset of the timestamp, timestamp
# overflow, capacity, events and valid events.
_PACKET = struct.Struct("<hhiiiiii")
_POLARITY_EVENTS, _EVENT_SIZE = 1, 8


def decode_aedat(contents: Contents, sensor: Sensor | None) -> Events:
    """Decode an .aedat file: AEDAT 2.0 or 3.1.

    Args:
        sensor: Size of an AEDAT 2.0 camera, 128x128 or 240x180, which some headers omit.

    Raises:
        BadRecording: The file cannot be used.
    """
    header = contents.header(b"#", (b"#End Of ASCII Header", b"#!END-HEADER"))
    if not header or not header[0].startswith(_MAGIC):
        raise BadRecording("it is not an AEDAT file: it does not begin with #!AER-DAT")
    version = header[0].removeprefix(_MAGIC).strip()
    if version.startswith("2."):
        return _decode_2(contents, header, sensor)
    if version == "3.1":
        return _decode_3(contents, sensor or DVS128)
    if version.startswith("4."):
        raise BadRecording("its contents are AEDAT 4; rename it to .aedat4")
    raise BadRecording(f"AEDAT {version} is not supported (only 2.0, 3.1 and 4)")


def _decode_2(contents: Contents, header: list[str], sensor: Sensor | None) -> Events:
    named = sensor or _camera(header)
    sensor = named or DVS128
    if sensor not in (DVS128, DAVIS240):
        raise OtherSize(f"AEDAT 2.0 needs a {DVS128} or {DAVIS240} sensor, not {sensor}")
    address, t = contents.records(">u4", 2).T
    if sensor == DVS128:
        is_event = (address & 0x8000) == 0  # Bit 15 marks external triggers.
        beyond = np.flatnonzero(address >> 16)
        if beyond.size:
            unnamed = "its header names no camera and the addresses do not fit a DVS128; give"
            invalid = f"address {address[beyond[0]]:#x} is invalid for a DVS128"
            raise BadRecording(invalid if named else f"{unnamed} --sensor")
        x, y = (address >> 1) & 0x7F, (address >> 8) & 0x7F
        p = 1 - (address & 1).astype(np.int64)  # The bit is set if the pixel became darker.
    else:
        filled = np.flatnonzero(address == 0xFFFF_FFFF)
        if filled.size:
            raise BadRecording(f"record {filled[0]} has all bits set; the file may be damaged")
        # Bit 31 marks frames and inertial measurements, bit 10 external triggers.
        is_event = (address & 0x8000_0400) == 0
        x, y, p = (address >> 12) & 0x3FF, (address >> 22) & 0x1FF, (address >> 11) & 1
    # Both cameras count columns from the right and rows from the bottom.
    return Events(
        sensor.width - 1 - x[is_event].astype(np.int64),
        sensor.height - 1 - y[is_event].astype(np.int64),
        t[is_event],
        p[is_event],
        sensor,
        dropped=int(len(t) - is_event.sum()),
        counter=2**32,
    )


def _camera(header: list[str]) -> Sensor | None:
    """Return the camera that the header names, if it names one."""
    chips = [line for line in header if line.startswith("# AEChip:")]
    if not chips:
        return None
    if "DVS128" in chips[0]:
        return DVS128
    if "DAVIS240" in chips[0]:
        return DAVIS240
    raise BadRecording(f"its camera is not supported: {chips[0].removeprefix('# AEChip: ')}")


def _decode_3(contents: Contents, sensor: Sensor) -> Events:
    start, dropped = contents.position, 0
    packets = [np.empty((0, 2), np.int64)]  # the words and times of each packet's valid events
    while not contents.ended():
        fields = _PACKET.unpack(contents.peek(_PACKET.size, "packet"))
        kind, _, size, _, overflow, capacity, number, num_valid = fields
        is_polarity = kind == _POLARITY_EVENTS
        fits = size == _EVENT_SIZE if is_polarity else size > 0
        if not fits or not 0 <= number <= capacity:
            raise BadRecording(
                f"the packet at byte {contents.position - start} of its data is damaged"
            )
        # A file stores the packet's events, not its capacity.
        packet = contents.take(_PACKET.size + size * number, "packet")[_PACKET.size :]
        words = np.frombuffer(packet if is_polarity else b"", "<u4").reshape(-1, 2)
        valid = words.astype(np.int64)[(words[:, 0] & 1) == 1]
        if is_polarity and len(valid) != num_valid:
            raise BadRecording(
                f"it is damaged: a packet declares {num_valid} of {number} events as valid, but"
                f" {len(valid)} are"
            )
        valid[:, 1] += overflow << 31
        packets.append(valid)
        dropped += number - len(valid)
    word, t = np.concatenate(packets).T
    return Events(word >> 17, (word >> 2) & 0x7FFF, t, (word >> 1) & 1, sensor, dropped)


DECODERS = {".aedat": decode_aedat}
