"""Writes small recordings in every camera's format."""

import struct
from typing import NamedTuple

import numpy as np
from PIL import Image


class Made(NamedTuple):
    """N events as they should be read: x to the right, y down, t in us, p 1 for brighter."""

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray


def events(number=300, width=34, height=34, duration=100_000, seed=0):
    rng = np.random.default_rng(seed)
    return Made(
        rng.integers(0, width, number),
        rng.integers(0, height, number),
        np.sort(rng.integers(0, duration, number)),
        rng.integers(0, 2, number),
    )


def nmnist(made):
    octets = [made.x, made.y, made.p << 7 | made.t >> 16, made.t >> 8 & 255, made.t & 255]
    return np.stack(octets, 1).astype(np.uint8).tobytes()


def _aedat2(address, t, chip):
    header = "#!AER-DAT2.0\r\n# Timestamps tick is 1 us\r\n"
    header += f"# AEChip: {chip}\r\n" if chip else ""
    return header.encode() + np.stack([address, t], 1).astype(">u4").tobytes()


def dvs128(made, chip="ch.unizh.ini.jaer.chip.retina.DVS128"):
    return _aedat2((127 - made.y) << 8 | (127 - made.x) << 1 | (1 - made.p), made.t, chip)


def davis240(made, chip="eu.seebetter.ini.chips.davis.DAVIS240C"):
    """With a record of a frame before each event and an external trigger at the end."""
    address = (179 - made.y) << 22 | (239 - made.x) << 12 | made.p << 11
    address = np.stack([np.full(len(address), 0x8000_0000 | 0x123), address], 1).ravel()
    t = np.repeat(made.t, 2)
    return _aedat2(np.append(address, 0x400), np.append(t, t[-1]), chip)


def aedat31(made, per_packet=100, overflow=0):
    """Every packet is followed by one of special events, and holds an event marked invalid."""
    parts = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"]
    for start in range(0, len(made.t), per_packet):
        x, y, t, p = (values[start : start + per_packet] for values in made)
        data = np.stack([x << 17 | y << 2 | p << 1 | 1, t], 1).astype("<u4")
        data = np.append(data, [[5 << 17, t[-1]]], 0).astype("<u4")
        parts.append(struct.pack("<hhiiiiii", 1, 1, 8, 4, overflow, len(data), len(data), len(x)))
        parts.append(data.tobytes())
        parts.append(struct.pack("<hhiiiiii", 0, 1, 8, 4, overflow, 1, 1, 1) + bytes(8))
    return b"".join(parts)


_INFO = (
    """<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">{}</node></dv>"""
)
_STREAM = """<node name="{0}" path="/mainloop/Recorder/outInfo/{0}/">
<attr key="compression" type="string">NONE</attr>
<attr key="typeIdentifier" type="string">EVTS</attr>
<node name="info" path="/mainloop/Recorder/outInfo/{0}/info/">
<attr key="sizeX" type="int">{1}</attr><attr key="sizeY" type="int">{2}</attr></node></node>"""


def _flatbuffer(name, vtable, table):
    """Of one table: what lies before it (vtable), and it with all that follows."""
    body = struct.pack("<I4s", 8 + len(vtable), name) + vtable + table
    return struct.pack("<I", len(body)) + body


def _events_packet(made):
    rows = np.zeros(len(made.t), np.dtype("<i8,<i2,<i2,?,V3"))
    for field, values in zip(rows.dtype.names, (made.t, made.x, made.y, made.p), strict=False):
        rows[field] = values
    # One field, at byte 4 of the table, holds the distance to the vector.
    vtable = struct.pack("<HHHH", 6, 8, 4, 0)
    table = struct.pack("<iI", 8, 4) + struct.pack("<I", len(rows))
    return _flatbuffer(b"EVTS", vtable, table + rows.tobytes())


def _packets_table(lines):
    """The table at the end: position, stream, size and number of elements of each packet."""
    rows, distances = b"", []
    for i, (position, stream, size, number) in enumerate(lines):
        distances.append(4 * (len(lines) - i) + len(rows) + 16)
        rows += struct.pack("<HHHHHHHH", 14, 44, 12, 4, 20, 28, 36, 0)
        rows += struct.pack("<iiiqqqq", 16, stream, size, position, number, 0, 0)
    table = struct.pack(f"<iII{len(lines)}I", 8, 4, len(lines), *distances)
    return _flatbuffer(b"FTAB", struct.pack("<HHHH", 6, 8, 4, 0), table + rows)


def aedat4(
    made,
    sensor=(64, 48),
    streams=(0,),
    finished=True,
    compression=0,
    compress=bytes,
    lines=lambda lines: lines,
    per_packet=100,
):
    """With what the table at the end says changed by `lines`."""
    packets, listed = b"", []
    for start in range(0, len(made.t), per_packet):
        part = Made(*(values[start : start + per_packet] for values in made))
        packet = compress(_events_packet(part))
        packets += struct.pack("<ii", 0, len(packet))
        listed.append([len(packets), 0, len(packet), len(part.t)])
        packets += packet
    info = _INFO.format("".join(_STREAM.format(stream, *sensor) for stream in streams)).encode()

    def header(position):
        # Three fields: compression (i32), position of the last table (i64), the text's distance.
        vtable = struct.pack("<HHHHHH", 10, 20, 4, 12, 8, 0)
        table = struct.pack("<iiIq", 12, compression, 12, position)
        table += struct.pack("<I", len(info)) + info
        return b"#!AER-DAT4.0\r\n" + _flatbuffer(b"IOHE", vtable, table + b"\0")

    if not finished:
        return header(-1) + packets
    for line in listed:
        line[0] += len(header(0))
    table = compress(_packets_table(lines(listed)))
    return header(len(header(0)) + len(packets)) + packets + table


def dat(made, header="% Version 2\n% Width 304\n% Height 240\n", kind=0x0C):
    word = made.x | made.y << 14 | made.p << 28
    return header.encode() + bytes([kind, 8]) + np.stack([made.t, word], 1).astype("<u4").tobytes()


def evt2(made, header="% evt 2.0\n% geometry 640x480\n% end\n"):
    words = []
    for x, y, t, p in zip(*(values.tolist() for values in made), strict=True):
        words += [0x8 << 28 | t >> 6, p << 28 | (t & 63) << 22 | x << 11 | y]
    words.append(0xA << 28)  # An external trigger.
    return header.encode() + np.array(words, "<u4").tobytes()


def evt3(made, header="% format EVT3;height=720;width=1280\n% end\n"):
    """Single events; those of one time, row and polarity within 12 or 8 pixels as a vector."""
    words, high = [], None
    columns = list(zip(*(values.tolist() for values in made), strict=True))
    i = 0
    while i < len(columns):
        x, y, t, p = columns[i]
        if t >> 12 != high:
            high = t >> 12
            words.append(0x8 << 12 | high & 0xFFF)
        words += [0x6 << 12 | t & 0xFFF, y]
        group = [c[0] for c in columns[i : i + 20] if c[1:] == (y, t, p) and 0 <= c[0] - x < 20]
        if len(group) > 1:
            bits = sum(1 << (other - x) for other in group)
            words += [0x3 << 12 | p << 11 | x, 0x4 << 12 | bits & 0xFFF, 0x5 << 12 | bits >> 12]
        else:
            words.append(0x2 << 12 | p << 11 | x)
        i += len(group)
    words.append(0xA << 12)
    return header.encode() + np.array(words, "<u2").tobytes()


def draw_bars(root, **parts):
    """Images of two classes, an upright and a lying white bar; so many of each in a part."""
    for part, number in parts.items():
        for name, size in (("lying", (20, 5)), ("upright", (5, 20))):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                image = Image.new("L", (34, 34))
                image.paste(255, (2 + i, 2 + i, 2 + i + size[0], 2 + i + size[1]))
                image.save(root / part / name / f"{i}.png")
    return root
