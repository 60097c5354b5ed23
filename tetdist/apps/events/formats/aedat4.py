"""Reader of AEDAT 4, the format of DV: compressed packets of events, each a flatbuffer.

This uses no existing package: the one tried crashes the whole process on some damaged files, and
one bad recording must not stop the conversion of the others.
"""

import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.recording import BadRecording, Events, Sensor, checked_events
from tetdist.errors import UserError, pip_install
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


def read_aedat4(data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of an AEDAT 4 file.

    Args:
        data: The file's contents.
        sensor: Required size of the sensor, if any.

    Raises:
        BadRecording: The file cannot be used.
        UserError: The package that decompresses it is missing.
    """
    if not data.startswith(_MAGIC):
        raise BadRecording("it is not an AEDAT 4 file: it does not begin with #!AER-DAT4.0")
    try:
        return _read(data, sensor)
    except (struct.error, ET.ParseError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, BadRecording):
            raise
        raise BadRecording(f"it is truncated or damaged ({error})") from error


def _read(data: bytes, sensor: Sensor | None) -> Events:
    start = len(_MAGIC)
    (size,) = struct.unpack_from("<I", data, start)
    header = _Table.root(data[start : start + 4 + size], b"IOHE")
    end = header.number(_TABLE_POSITION, "<q", -1)
    if end < 0:
        raise BadRecording("its recording was not finished: the table at its end is missing")
    if len(data) <= end:
        raise BadRecording(f"it is truncated: it has {len(data)} bytes and needs more than {end}")
    stream, stated = _event_stream(header.text(_INFO))
    if sensor not in (None, stated):
        raise BadRecording(f"its sensor is {stated}, not {sensor} as expected")
    compression = header.number(_COMPRESSION, "<i", 0)
    parts = [np.empty(0, _EVENT)]
    found = []
    for position, number, packet in _packets(data, start + 4 + size, end):
        if number == stream:
            parts.append(_elements(_decompressed(packet, compression)))
        found.append((position, number, len(packet)))
    _check_table(data[end:], compression, found, stream, [len(part) for part in parts[1:]])
    dropped = len(found) - len(parts) + 1
    events = np.concatenate(parts)
    x, y, t, p = (events[name] for name in "xytp")
    return checked_events(x, y, t, p, stated, dropped=dropped)


def _event_stream(info: str) -> tuple[int, Sensor]:
    """Return the number of the event stream, and the size of its sensor."""
    found = []
    for node in ET.fromstring(info).iterfind("./node[@name='outInfo']/node"):
        attributes = {attr.get("key"): attr.text or "" for attr in node.iter("attr")}
        if attributes.get("typeIdentifier") == "EVTS":
            size = Sensor(int(attributes.get("sizeX", 0)), int(attributes.get("sizeY", 0)))
            found.append((int(node.get("name", "")), size))
    if len(found) != 1:
        raise BadRecording(f"it has {len(found)} streams of events instead of one")
    return found[0]


def _check_table(
    data: bytes,
    compression: int,
    packets: list[tuple[int, int, int]],
    stream: int,
    num_events: list[int],
) -> None:
    """Compare the table at the end of a finished recording with the packets that were read.

    Args:
        data: The file's contents from the table on.
        compression: See `_decompressed`.
        packets: Position, stream and size of each packet.
        stream: Number of the event stream.
        num_events: Number of events in each of its packets.

    Raises:
        BadRecording: They differ, or the table is truncated.
    """
    contents = _decompressed(data, compression)
    lines = _Table.root(contents, b"FTAB", whole=True).tables(_LINES)
    listed = [
        (line.number(_POSITION, "<q", 0), *line.pair(_STREAM_AND_SIZE), line.number(_NUM_ELEMENTS))
        for line in lines
    ]
    if [line[:3] for line in listed] != packets:
        raise BadRecording(
            f"it is damaged: the {len(listed)} packets in the table at its end differ from the"
            f" {len(packets)} in the file"
        )
    if [number for _, of, _, number in listed if of == stream] != num_events:
        raise BadRecording("it is damaged: its table lists different numbers of events")


def _packets(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield the position, stream and contents of each packet."""
    while position < end:
        stream, size = struct.unpack_from("<ii", data, position)
        position += 8
        if size < 0 or position + size > end:
            raise BadRecording(f"the packet at byte {position - 8} is damaged")
        yield position, stream, data[position : position + size]
        position += size


def _decompressed(packet: bytes, compression: int) -> bytes:
    if compression in _STORED:
        return packet
    name = {**dict.fromkeys(_LZ4, "lz4"), **dict.fromkeys(_ZSTANDARD, "zstandard")}.get(compression)
    if name is None:
        raise BadRecording(f"its compression, number {compression}, is not supported")
    try:
        if name == "lz4":
            import lz4.frame

            contents, used = lz4.frame.decompress(packet, return_bytes_read=True)
            whole = used == len(packet)
        else:
            import zstandard

            decompressor = zstandard.ZstdDecompressor().decompressobj()
            contents = decompressor.decompress(packet)
            whole = decompressor.eof and not decompressor.unused_data
    except ModuleNotFoundError as error:
        raise UserError(
            f"this AEDAT 4 file needs the package {name}; {pip_install('events')}"
        ) from error
    except Exception as error:  # Each package has its own errors.
        raise BadRecording(f"a packet cannot be decompressed ({error})") from error
    if not whole:
        raise BadRecording("a packet is truncated, or followed by other bytes")
    return bytes(contents)


def _elements(packet: bytes) -> npt.NDArray[Any]:
    table = _Table.root(packet, b"EVTS")
    octets = table.vector(_ELEMENTS, _EVENT.itemsize)
    return np.frombuffer(octets, _EVENT)


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

    def text(self, field: int) -> str:
        return self.vector(field, 1).decode()


READERS = {".aedat4": read_aedat4}
