"""Recordings of event cameras, read by the suffix of their name and checked.

Every reader takes the whole file, so that its checksum is of exactly what was read, and refuses it
whole where a part is damaged: the readable part is never silently used.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.errors import UserError
from tetdist.events.formats.aedat import read_aedat
from tetdist.events.formats.aedat4 import read_aedat4
from tetdist.events.formats.prophesee import read_dat, read_raw
from tetdist.events.recording import BadRecording, Events, Sensor, checked_events, fixed_records

SUFFIXES = (".aedat", ".aedat4", ".bin", ".dat", ".raw", ".npz", ".h5", ".hdf5")

NMNIST = Sensor(34, 34)
# How the other formats begin: none of these is a beginning of N-MNIST's events.
_FOREIGN = {
    b"#!AER-DAT": "AEDAT",
    b"% ": "Prophesee",
    b"PK\x03\x04": "NPZ",
    b"\x89HDF": "HDF5",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
}
_FIELDS = ("x", "y", "t", "p")


def read_recording(path: Path, data: bytes, sensor: Sensor | None) -> Events:
    """Events of a file, checked.

    Args:
        path: the file; its suffix says the format.
        data: its contents.
        sensor: size of the sensor, where the format does not say it.

    Raises:
        BadRecording: if it cannot be used.
        UserError: if a package that reads this format is missing.
    """
    if not data:
        raise BadRecording("the file is empty")
    match path.suffix.lower():
        case ".aedat":
            return read_aedat(data, sensor)
        case ".aedat4":
            return read_aedat4(data, sensor)
        case ".bin":
            return _read_nmnist(data, sensor)
        case ".dat":
            return read_dat(data, sensor)
        case ".raw":
            return read_raw(data, sensor)
        case ".npz":
            return _read_npz(data, sensor)
        case ".h5" | ".hdf5":
            return _read_hdf5(data, sensor)
    raise BadRecording(f"its suffix is none of {', '.join(SUFFIXES)}")


def _read_nmnist(data: bytes, sensor: Sensor | None) -> Events:
    for beginning, name in _FOREIGN.items():
        if data.startswith(beginning):
            raise BadRecording(f"its name says N-MNIST and its contents are {name}")
    octets = fixed_records(data, "u1", 5).astype(np.int64)
    x, y = octets[:, 0], octets[:, 1]
    t = ((octets[:, 2] & 0x7F) << 16) | (octets[:, 3] << 8) | octets[:, 4]
    # N-Caltech101, in the same format, marks by row 240 that a counter of 13 bits began again.
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


def _read_npz(data: bytes, sensor: Sensor | None) -> Events:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as e:  # Whatever the readers of zip and numpy's format stumble over.
        raise BadRecording(f"it is not an NPZ file, or damaged ({e})") from e
    if len(arrays) == 1 and next(iter(arrays.values())).dtype.names:
        (table,) = arrays.values()
        arrays = {name: table[name] for name in table.dtype.names}
    return _from_arrays(arrays, arrays, sensor)


def _read_hdf5(data: bytes, sensor: Sensor | None) -> Events:
    try:
        import h5py
    except ModuleNotFoundError as e:
        raise UserError("HDF5 needs the package h5py: pip install 'tetdist[events]'") from e
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            found = file.get("events", file)
            size = {**file.attrs, **found.attrs}
            if isinstance(found, h5py.Dataset):
                table = _own_values(file, "events")
                arrays = {name: table[name] for name in table.dtype.names or ()}
            else:
                arrays = {name: _own_values(found, name) for name in _FIELDS if name in found}
    except BadRecording:
        raise
    except Exception as e:  # Whatever h5py stumbles over.
        raise BadRecording(f"it is not an HDF5 file, or damaged ({e})") from e
    return _from_arrays(arrays, size, sensor)


def _own_values(group: Any, name: str) -> Any:
    """The values of a dataset that lies in this file: HDF5 can also point to others."""
    import h5py

    is_link = isinstance(group.get(name, getlink=True), h5py.ExternalLink)
    if is_link or group[name].is_virtual or group[name].external:
        raise BadRecording(f"{name} lies in another file")
    return group[name][()]


def _from_arrays(
    arrays: Mapping[str, Any], size: Mapping[str, Any], sensor: Sensor | None
) -> Events:
    """Events of arrays x, y, t (microseconds) and p (0 and 1, or -1 and 1, or booleans).

    Args:
        arrays: by name.
        size: what may hold the sensor's `width` and `height`.
        sensor: otherwise, or to be compared.
    """
    missing = [name for name in _FIELDS if name not in arrays]
    if missing:
        raise BadRecording(f"it has no array {missing[0]!r} (x, y, t and p are needed)")
    x, y, t, p = (arrays[name] for name in _FIELDS)
    for name, values in zip(_FIELDS, (x, y, t, p), strict=True):
        if values.ndim != 1 or len(values) != len(t):
            raise BadRecording(f"{name} has the shape {values.shape} and t {t.shape}")
        if values.dtype.kind not in "iub":
            unit = ", in microseconds" if name == "t" else ""
            raise BadRecording(f"{name} is {values.dtype}: it must be of integers{unit}")
    if "width" in size and "height" in size:
        stated = Sensor(int(size["width"]), int(size["height"]))
        if sensor not in (None, stated):
            raise BadRecording(f"its sensor is {stated}, and --sensor says {sensor}")
        sensor = stated
    if sensor is None:
        raise BadRecording("it does not say the sensor's size: give --sensor WIDTHxHEIGHT")
    if p.dtype.kind == "i" and set(np.unique(p)) <= {-1, 1}:
        p = p > 0
    return checked_events(x, y, t, p, sensor)
