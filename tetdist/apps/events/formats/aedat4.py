"""Decoder of AEDAT 4, the format of DV: compressed packets of events, each a flatbuffer.

This uses no existing package: the one tried crashes the whole process on some damaged files, and
one bad recording must not stop the conversion of the others.
"""

import struct
import xml.etree.ElementTree as ET
from array import array

import numpy as np

from tetdist.apps.events.recording import BadRecording, Contents, Events, OtherSize, Sensor
from tetdist.wording import counted

_MAGIC = b"#!AER-DAT4.0\r\n"
_EVENT = np.dtype(
    {
        "names": ["t", "x", "y", "p"],
        "formats": ["<i8", "<i2", "<i2", "u1"],
        "offsets": [0, 8, 10, 12],
        "itemsize": 16,
    }
)
# Field numbers, by the format's schema, of the file's header, of a packet of events, of the table
# at the end and of a line of that table.
_COMPRESSION, _TABLE_POSITION, _INFO = 0, 1, 2
_ELEMENTS = 0
_LINES = 0
_POSITION, _STREAM_AND_SIZE, _NUM_ELEMENTS = 0, 1, 2
_STORED, _LZ4, _ZSTANDARD = (0,), (1, 2), (3, 4)


def decode_aedat4(contents: Contents, sensor: Sensor | None) -> Events:
    """Decode an AEDAT 4 file.

    Raises:
        BadRecording: The file cannot be used.
        ModuleNotFoundError: The package that decompresses it is missing.
    """
    if contents.take(len(_MAGIC), "header") != _MAGIC:
        raise BadRecording("it is not an AEDAT 4 file: it does not begin with #!AER-DAT4.0")
    (size,) = struct.unpack("<I", contents.peek(4, "header"))
    header = _Table.root(contents.take(4 + size, "header"), b"IOHE")
    end = header.number(_TABLE_POSITION, "<q", -1)  # -1: not known when recording began
    compression = header.number(_COMPRESSION, "<i", 0)
    streams = _streams(header.vector(_INFO, 1).decode())
    sizes = [(number, of) for number, of in streams.items() if of is not None]
    if len(sizes) != 1:
        raise BadRecording(f"it has {len(sizes)} streams of events instead of one")
    ((events, stated),) = sizes
    if sensor not in (None, stated):
        raise OtherSize(f"its sensor is {stated}, not {sensor} as expected")
    if end < 0:
        raise BadRecording("its recording was not finished: the table at its end is missing")
    packets = array("q")  # position, stream, size and number of events of each packet
    parts, dropped = [np.empty(0, _EVENT)], 0
    while contents.position != end:
        stream, size = struct.unpack("<ii", contents.peek(8, "packet"))
        start = contents.position + 8
        if size < 0 or end < start + size:
            raise BadRecording(f"the packet at byte {start - 8} is damaged")
        packet = contents.take(8 + size, "packet")[8:]
        octets = b""
        if stream == events:
            table = _Table.root(_decompressed(packet, compression), b"EVTS")
            octets = table.vector(_ELEMENTS, _EVENT.itemsize)
        parts.append(np.frombuffer(octets, _EVENT))
        packets.extend((start, stream, size, len(parts[-1])))
        dropped += stream != events
    _check_table(contents.rest(), compression, packets, events)
    whole = np.concatenate(parts)
    x, y, t, p = (whole[name] for name in "xytp")
    return Events(x, y, t, p, stated, dropped)


def _streams(info: str) -> dict[int, Sensor | None]:
    """Return the numbers of the streams, and for those of events the size of the sensor."""
    sensors: dict[int, Sensor | None] = {}
    for node in ET.fromstring(info).iterfind("./node[@name='outInfo']/node"):
        attributes = {attr.get("key"): attr.text or "" for attr in node.iter("attr")}
        size = None
        if attributes.get("typeIdentifier") == "EVTS":
            size = Sensor.stated(attributes.get("sizeX"), attributes.get("sizeY"))
        sensors[int(node.get("name", ""))] = size
    return sensors


def _check_table(data: bytes, compression: int, packets: "array[int]", events: int) -> None:
    """Compare the table at the end of a finished recording with the packets that were read.

    Args:
        data: The file's contents from the table on.
        packets: Position, stream, size and number of events of each packet.

    Raises:
        BadRecording: They differ, or the table is missing or incomplete.
    """
    if not data:
        raise BadRecording("it is truncated: the table at its end is missing")
    try:
        lines = _Table.root(_decompressed(data, compression), b"FTAB", whole=True).tables(_LINES)
        listed = array("q")
        for line in lines:
            stream, size = line.pair(_STREAM_AND_SIZE)
            number = line.number(_NUM_ELEMENTS) if stream == events else 0
            listed.extend((line.number(_POSITION, "<q", 0), stream, size, number))
    except (BadRecording, struct.error) as error:
        raise BadRecording(
            f"it is truncated or damaged: the table at its end ({counted(len(data), 'byte')})"
            f" cannot be read ({error})"
        ) from error
    if packets != listed:
        raise BadRecording(
            f"it is damaged: the {len(lines)} packets in the table at its end differ, in place or"
            f" number of events, from the {len(packets) // 4} in the file"
        )


def _decompressed(packet: bytes, compression: int) -> bytes:
    if compression in _STORED:
        return packet
    name = {**dict.fromkeys(_LZ4, "lz4"), **dict.fromkeys(_ZSTANDARD, "zstandard")}.get(compression)
    if name is None:
        raise BadRecording(f"its compression, number {compression}, is not supported")
    try:
        if name == "lz4":
            import lz4.frame

            decompressor = lz4.frame.LZ4FrameDecompressor()
        else:
            import zstandard

            decompressor = zstandard.ZstdDecompressor().decompressobj()
        contents = decompressor.decompress(packet)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # Each package has its own errors.
        raise BadRecording(f"a packet cannot be decompressed ({error})") from error
    if not decompressor.eof or decompressor.unused_data:
        raise BadRecording("a packet is truncated, or followed by other bytes")
    return bytes(contents)


class _Table:
    """Table of a flatbuffer, at byte `start` of its data."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._root = data, start

    @classmethod
    def root(cls, data: bytes, name: bytes, *, whole: bool = False) -> "_Table":
        """Return the root table of a size-prefixed flatbuffer; `whole`: nothing may follow it."""
        size, start = struct.unpack_from("<II", data, 0)
        if len(data) < 4 + size or data[8:12] != name:
            raise BadRecording(f"it is truncated or damaged: no complete {name.decode()} buffer")
        if whole and len(data) > 4 + size:
            raise BadRecording(f"its end is followed by {counted(len(data) - 4 - size, 'byte')}")
        return cls(data, 4 + start)

    def _position(self, field: int) -> int | None:
        """Return the position of a field's value; None if the table omits it."""
        (back,) = struct.unpack_from("<i", self._data, self._root)
        offsets = self._root - back
        (length,) = struct.unpack_from("<H", self._data, offsets)
        if 6 + 2 * field > length:
            return None
        (offset,) = struct.unpack_from("<H", self._data, offsets + 4 + 2 * field)
        return self._root + offset if offset else None

    def number(self, field: int, code: str = "<q", default: int = 0) -> int:
        position = self._position(field)
        return (
            default if position is None else int(struct.unpack_from(code, self._data, position)[0])
        )

    def pair(self, field: int) -> tuple[int, int]:
        """Return a struct of two 32-bit numbers."""
        position = self._position(field)
        if position is None:
            raise BadRecording(f"it is damaged: a table lacks its field {field}")
        first, second = struct.unpack_from("<ii", self._data, position)
        return first, second

    def vector(self, field: int, item_size: int) -> bytes:
        """Return the bytes of a vector's items."""
        start, size = self._vector(field, item_size)
        return self._data[start : start + size]

    def tables(self, field: int) -> list["_Table"]:
        """Return the tables to which a vector points."""
        start, size = self._vector(field, 4)
        distances = struct.iter_unpack("<I", self._data[start : start + size])
        return [_Table(self._data, start + 4 * i + far) for i, (far,) in enumerate(distances)]

    def _vector(self, field: int, item_size: int) -> tuple[int, int]:
        """Return the start of a vector's items, and their size in bytes."""
        position = self._position(field)
        if position is None:
            return 0, 0
        position += struct.unpack_from("<I", self._data, position)[0]
        size = item_size * struct.unpack_from("<I", self._data, position)[0]
        if len(self._data) < position + 4 + size:
            raise BadRecording("it is truncated or damaged: a vector is longer than its buffer")
        return position + 4, size


DECODERS = {".aedat4": decode_aedat4}
