"""Decoders of event-camera recordings, one module for each format, chosen by the file's suffix.

A decoder takes a file's contents and returns its events. A file with a damaged part is refused, and
the readable rest never silently used. A format is a module of this folder with a table DECODERS of
the suffixes that it decodes.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from tetdist.apps.events.recording import (
    BadRecording,
    Contents,
    Events,
    Sensor,
    checked_events,
)

# A decoder takes a file's contents, and the sensor's size for formats that do not store it.
_DECODERS: dict[str, Callable[[Contents, Sensor | None], Events]] = {
    suffix: decoder
    for module in pkgutil.iter_modules(__path__)
    for suffix, decoder in importlib.import_module(f"{__name__}.{module.name}").DECODERS.items()
}
SUFFIXES = tuple(_DECODERS)


def read_recording(path: Path, data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of a file, and check them.

    Raises:
        BadRecording: The file cannot be used.
        ModuleNotFoundError: A package that reads this format is missing.
    """
    decoder = _DECODERS.get(path.suffix.lower())
    if decoder is None:
        advice = "; give the recording that this tensor was made of" * (path.suffix == ".npy")
        raise BadRecording(f"its suffix is not one of {', '.join(SUFFIXES)}{advice}")
    if not data:
        raise BadRecording("the file is empty")
    try:
        return checked_events(decoder(Contents(data), sensor))
    except (BadRecording, ModuleNotFoundError):
        raise
    except Exception as error:  # A damaged file may raise any.
        reason = f"it is truncated or damaged, or not a {path.suffix} file"
        raise BadRecording(f"{reason} ({error})") from error
