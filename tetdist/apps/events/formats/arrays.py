"""Decoder of recordings as arrays x, y, t and p: NPZ and HDF5."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from tetdist.apps.events.recording import BadRecording, Contents, Events, OtherSize, Sensor

_FIELDS = ("x", "y", "t", "p")


def decode_npz(contents: Contents, sensor: Sensor | None) -> Events:
    with np.load(io.BytesIO(contents.rest()), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    tables = [values for values in arrays.values() if values.dtype.names]
    if len(tables) == 1:
        arrays |= {name: tables[0][name] for name in tables[0].dtype.names}
    return _from_arrays(arrays, arrays, sensor)


def decode_hdf5(contents: Contents, sensor: Sensor | None) -> Events:
    data = contents.rest()
    import h5py

    with h5py.File(io.BytesIO(data), "r") as file:
        events = file.get("events", file)
        size = {**file.attrs, **events.attrs}
        if isinstance(events, h5py.Dataset):
            table = _own_values(file, "events")
            arrays = {name: table[name] for name in table.dtype.names or ()}
        else:
            of = {name: _own_values(events, name) for name in _FIELDS if name in events}
            arrays = dict.fromkeys(events) | of  # the others for messages
    return _from_arrays(arrays, size, sensor)


def _own_values(group: Any, name: str) -> Any:
    """Return the values of a dataset stored in this file: HDF5 can also link to other files."""
    import h5py

    is_link = isinstance(group.get(name, getlink=True), h5py.ExternalLink)
    if is_link or group[name].is_virtual or group[name].external:
        raise BadRecording(f"{name} is a link to another file; store it in this file")
    return group[name][()]


def _from_arrays(
    arrays: Mapping[str, Any], size: Mapping[str, Any], sensor: Sensor | None
) -> Events:
    """Convert arrays x, y, t (microseconds) and p (0 and 1, or -1 and 1, or booleans) to columns.

    Args:
        size: Attributes that may have the sensor's `width` and `height`.
        sensor: The sensor's size if the attributes lack it; otherwise it must be equal.
    """
    missing = [name for name in _FIELDS if name not in arrays]
    if missing:
        there = f"has {', '.join(arrays) or 'no arrays'}, but no array {missing[0]!r}"
        raise BadRecording(f"it {there} (x, y, t and p are required)")
    x, y, t, p = (arrays[name] for name in _FIELDS)
    for name, values in zip(_FIELDS, (x, y, t, p), strict=True):
        if values.ndim != 1 or len(values) != len(t):
            raise BadRecording(
                f"{name} has the shape {values.shape}, and t {t.shape}; both must be equal, (N,)"
            )
        if values.dtype.kind not in "iub":
            unit = ", in microseconds" if name == "t" else ""
            raise BadRecording(f"{name} has type {values.dtype}; it must be integer{unit}")
    if "width" in size and "height" in size:
        stated = Sensor.stated(size["width"], size["height"])
        if sensor not in (None, stated):
            raise OtherSize(f"its sensor is {stated}, not {sensor} as expected")
        sensor = stated
    if sensor is None:
        raise BadRecording("it does not store the sensor's size; give --sensor WIDTHxHEIGHT")
    if p.dtype.kind == "i" and set(np.unique(p)) <= {-1, 1}:
        p = p > 0
    return Events(x, y, t, p, sensor)


DECODERS = {".npz": decode_npz, ".h5": decode_hdf5, ".hdf5": decode_hdf5}
