"""Decoder of N-MNIST's recordings, five bytes an event; N-Caltech101 has the same format."""

import numpy as np

from tetdist.apps.events.recording import BadRecording, Contents, Events, Sensor

NMNIST = Sensor(34, 34)
_SIZE = 5  # bytes of a record
# First bytes of other formats, with which N-MNIST's files never begin.
_FOREIGN = {
    b"#!AER": "AEDAT",
    b"% ": "Prophesee",
    b"PK\x03\x04": "NPZ",
    b"\x89HDF": "HDF5",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
}


def decode_nmnist(contents: Contents, sensor: Sensor | None) -> Events:
    beginning = contents.peek(_SIZE, "record")
    for foreign, name in _FOREIGN.items():
        if beginning.startswith(foreign):
            raise BadRecording(f"its name is of N-MNIST's format, but its contents are {name}")
    octets = contents.records("u1", _SIZE).astype(np.int64)
    x, y = octets[:, 0], octets[:, 1]
    t = ((octets[:, 2] & 0x7F) << 16) | (octets[:, 3] << 8) | octets[:, 4]
    # In N-Caltech101, row 240 marks the overflow of a 13-bit time counter.
    is_event = y != 240
    t = t + np.cumsum(~is_event) * 2**13
    return Events(
        x[is_event],
        y[is_event],
        t[is_event],
        octets[is_event, 2] >> 7,
        sensor or NMNIST,
        dropped=int((~is_event).sum()),
        counter=2**23,
    )


DECODERS = {".bin": decode_nmnist}
