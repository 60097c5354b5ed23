"""Reader of N-MNIST's recordings, five bytes an event; N-Caltech101 has the same format."""

import numpy as np

from tetdist.apps.events.recording import (
    BadRecording,
    Events,
    Sensor,
    checked_events,
    fixed_records,
)

NMNIST = Sensor(34, 34)
# First bytes of other formats, with which N-MNIST's files never begin.
_FOREIGN = {
    b"#!AER-DAT": "AEDAT",
    b"% ": "Prophesee",
    b"PK\x03\x04": "NPZ",
    b"\x89HDF": "HDF5",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
}


def read_nmnist(data: bytes, sensor: Sensor | None) -> Events:
    for beginning, name in _FOREIGN.items():
        if data.startswith(beginning):
            raise BadRecording(f"its name is of N-MNIST's format, but its contents are {name}")
    octets = fixed_records(data, "u1", 5).astype(np.int64)
    x, y = octets[:, 0], octets[:, 1]
    t = ((octets[:, 2] & 0x7F) << 16) | (octets[:, 3] << 8) | octets[:, 4]
    # In N-Caltech101, row 240 marks the overflow of a 13-bit time counter.
    is_event = y != 240
    t = t + np.cumsum(~is_event) * 2**13
    return checked_events(
        x[is_event],
        y[is_event],
        t[is_event],
        octets[is_event, 2] >> 7,
        sensor or NMNIST,
        dropped=int((~is_event).sum()),
        counter=2**23,
    )


READERS = {".bin": read_nmnist}
