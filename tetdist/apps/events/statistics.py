"""Statistics of event tensors by class, and a preview of each class."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.folders import natural_key
from tetdist.apps.events.tensors import Record, tensor_file
from tetdist.storage.files import replacing
from tetdist.tables import aligned

ALL = "all"

_CELL = 96  # pixels of a frame in the preview
_LETTER = 7
_GAP = 2
_HEADINGS = ("class", "tensors", "events", "events/s", "duration s", "ON", "empty", "saturated")


def statistics(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Compute the statistics of each class, and of all classes under the name "all".

    Returns:
        Number of `tensors`; `events_mean`, `events_least`, `events_most` of a recording;
        `events_per_s`, the mean rate of recordings with a duration; `duration_s_mean`; `on_share`,
        the fraction of ON events; `empty_share`, the fraction of empty ones among the T x 2 frames;
        numbers of `saturated` values and `dropped` records.
    """
    by_class: dict[str, list[Record]] = {}
    for record in records:
        by_class.setdefault(record.class_name, []).append(record)
    names = sorted(by_class, key=natural_key)
    everything = [record for name in names for record in by_class[name]]
    found = {name: _of(by_class[name]) for name in names}
    return {ALL: _of(everything), **found}


def _of(records: list[Record]) -> dict[str, Any]:
    events = np.array([record.events for record in records])
    seconds = np.array([record.duration_us for record in records]) / 1e6
    # Events within a single microsecond have no rate.
    lasting = seconds > 0
    rates = events[lasting] / seconds[lasting]
    return {
        "tensors": len(records),
        "events_mean": float(events.mean()),
        "events_least": int(events.min()),
        "events_most": int(events.max()),
        "events_per_s": float(rates.mean()) if lasting.any() else 0.0,
        "duration_s_mean": float(seconds.mean()),
        "on_share": sum(record.on_events for record in records) / int(events.sum()),
        "empty_share": sum(record.empty_frames for record in records)
        / sum(record.frames for record in records),
        "saturated": sum(record.saturated for record in records),
        "dropped": sum(record.dropped for record in records),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the statistics as a table, with all classes last."""
    rows = [_HEADINGS]
    for name in [*(name for name in found if name != ALL), ALL]:
        values = found[name]
        rows.append(
            (
                name,
                f"{values['tensors']}",
                f"{values['events_mean']:.0f}",
                f"{values['events_per_s']:.0f}",
                f"{values['duration_s_mean']:.3f}",
                f"{100 * values['on_share']:.1f} %",
                f"{100 * values['empty_share']:.1f} %",
                f"{values['saturated']}",
            )
        )
    return aligned(rows, right=range(1, len(_HEADINGS)))


def draw_preview(dest: Path, records: Iterable[Record], file: Path) -> None:
    """Draw the first recording of each class as a row of its T frames, ON red and OFF blue."""
    from PIL import Image, ImageDraw

    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.class_name, record)
    names = sorted(first, key=natural_key)
    tensors = [np.load(tensor_file(dest, first[name].key), allow_pickle=False) for name in names]
    timesteps = tensors[0].shape[0]
    left = _LETTER * (2 + max(len(name) for name in names))
    size = (left + timesteps * (_CELL + _GAP), len(names) * (_CELL + _GAP))
    canvas = Image.new("RGB", size, "lightgrey")
    draw = ImageDraw.Draw(canvas)
    for row, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        top = row * (_CELL + _GAP)
        draw.text((4, top + _CELL // 2 - 6), name, fill="black")
        for t, rgb in enumerate(coloured(tensor, 95)):
            frame = Image.fromarray((255 * rgb).astype(np.uint8))
            frame = frame.resize((_CELL, _CELL), Image.Resampling.NEAREST)
            canvas.paste(frame, (left + t * (_CELL + _GAP), top))
    with replacing(file) as stream:
        canvas.save(stream, "PNG")


def coloured(frames: npt.NDArray[Any], percentile: float) -> npt.NDArray[np.float64]:
    """Convert frames (T, 2, H, W) to RGB values in [0, 1], (T, H, W, 3).

    White means no event; ON events make a pixel redder, OFF events bluer, up to a percentile of the
    nonzero values, because a few hot pixels would make all others pale.
    """
    values = frames.astype(np.float64)
    present = values[values > 0]
    full = np.percentile(present, percentile) if present.size else 1.0
    off, on = np.clip(values / full, 0, 1).swapaxes(0, 1)
    return 1 - np.stack([off, np.maximum(on, off), on], axis=-1)
