"""Recordings of event cameras, one file a format, chosen by the suffix of the name, and checked.

Every reader takes the whole file, so that its checksum is of exactly what was read, and refuses it
whole where a part is damaged: the readable part is never silently used.
"""

from pathlib import Path

from tetdist.events.formats.aedat import read_aedat
from tetdist.events.formats.aedat4 import read_aedat4
from tetdist.events.formats.arrays import read_hdf5, read_npz
from tetdist.events.formats.nmnist import read_nmnist
from tetdist.events.formats.prophesee import read_dat, read_raw
from tetdist.events.recording import BadRecording, Events, Sensor

SUFFIXES = (".aedat", ".aedat4", ".bin", ".dat", ".raw", ".npz", ".h5", ".hdf5")


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
            return read_nmnist(data, sensor)
        case ".dat":
            return read_dat(data, sensor)
        case ".raw":
            return read_raw(data, sensor)
        case ".npz":
            return read_npz(data, sensor)
        case ".h5" | ".hdf5":
            return read_hdf5(data, sensor)
    raise BadRecording(f"its suffix is none of {', '.join(SUFFIXES)}")
