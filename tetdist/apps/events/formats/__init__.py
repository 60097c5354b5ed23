"""Recordings of event cameras, one file a format, chosen by the suffix of the name, and checked.

Every reader takes the whole file, so that its checksum is of exactly what was read, and refuses it
whole where a part is damaged: the readable part is never silently used. A format is a module of
this folder with a table READERS of the suffixes that it reads.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from tetdist.apps.events.recording import BadRecording, Events, Sensor

# A reader takes a file's contents, and the sensor's size where the format does not say it.
_READERS: dict[str, Callable[[bytes, Sensor | None], Events]] = {
    suffix: reader
    for module in pkgutil.iter_modules(__path__)
    for suffix, reader in importlib.import_module(f"{__name__}.{module.name}").READERS.items()
}
SUFFIXES = tuple(_READERS)


def read_recording(path: Path, data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of a file, and check them.

    Args:
        path: The file; its suffix says the format.
        data: Its contents.
        sensor: Size of the sensor, where the format does not say it.

    Raises:
        BadRecording: It cannot be used.
        UserError: A package that reads this format is missing.
    """
    if not data:
        raise BadRecording("the file is empty")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadRecording(f"its suffix is none of {', '.join(SUFFIXES)}")
    return reader(data, sensor)
