"""Readers of event-camera recordings, one module for each format, chosen by the file's suffix.

Every reader gets the contents of the whole file, so that its checksum covers exactly what was read.
It refuses a file with a damaged part, and never silently uses the readable rest. A format is a
module of this folder with a table READERS of the suffixes that it reads.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from tetdist.apps.events.recording import BadRecording, Events, Sensor

# A reader takes a file's contents, and the sensor's size for formats that do not store it.
_READERS: dict[str, Callable[[bytes, Sensor | None], Events]] = {
    suffix: reader
    for module in pkgutil.iter_modules(__path__)
    for suffix, reader in importlib.import_module(f"{__name__}.{module.name}").READERS.items()
}
SUFFIXES = tuple(_READERS)


def read_recording(path: Path, data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of a file, and check them.

    Args:
        path: The file; its suffix defines the format.
        data: Its contents.
        sensor: Size of the sensor, for formats that do not store it.

    Raises:
        BadRecording: The file cannot be used.
        UserError: A package that reads this format is missing.
    """
    if not data:
        raise BadRecording("the file is empty")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadRecording(f"its suffix is not one of {', '.join(SUFFIXES)}")
    return reader(data, sensor)
