"""Decoders of event-camera recordings, one module for each format, chosen by the file's suffix.

A decoder takes a file's contents as they arrive and yields the events of each piece. A whole file
is one piece, so its checksum covers exactly what was read; a file with a damaged part is refused,
and the readable rest never silently used. A format is a module of this folder with a table DECODERS
of the suffixes that it decodes.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tetdist.apps.events.recording import (
    BadRecording,
    Contents,
    Events,
    OtherSize,
    Sensor,
    checked_events,
)

# A decoder takes a file's contents, and the sensor's size for formats that do not store it.
_DECODERS: dict[str, Callable[[Contents, Sensor | None], Iterator[Events]]] = {
    suffix: decoder
    for module in pkgutil.iter_modules(__path__)
    for suffix, decoder in importlib.import_module(f"{__name__}.{module.name}").DECODERS.items()
}
SUFFIXES = tuple(_DECODERS)


def read_recording(path: Path, data: bytes, sensor: Sensor | None) -> Events:
    """Read the events of a file, and check them.

    Raises:
        BadRecording: The file cannot be used.
        UserError: A package that reads this format is missing.
    """
    pieces = list(_decoded(path.suffix, Contents([data]), sensor))
    try:
        (events,) = checked_events([pieces[0].followed_by(*pieces[1:])] if pieces else [])
    except OtherSize as error:
        raise BadRecording(f"{error}; give the sensor's size as --sensor WIDTHxHEIGHT") from error
    return events


def stream_recording(suffix: str, contents: Contents, sensor: Sensor | None) -> Iterator[Events]:
    """Yield the events of a recording as they arrive; see `read_recording`.

    If a part is bad, everything before it is yielded, and `contents.bad_end` is the reason.
    """
    try:
        yield from checked_events(_decoded(suffix, contents, sensor))
    except BadRecording as error:
        contents.bad_end = error


def _decoded(suffix: str, contents: Contents, sensor: Sensor | None) -> Iterator[Events]:
    decoder = _DECODERS.get(suffix.lower())
    if decoder is None:
        raise BadRecording(f"its suffix is not one of {', '.join(SUFFIXES)}")
    if contents.ended():
        raise BadRecording("the file is empty")
    return decoder(contents, sensor)
