"""Statistics of event tensors by class."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tetdist.apps.events.folders import natural_key
from tetdist.apps.events.tensors import Record
from tetdist.tables import aligned

ALL = "all"

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
    of_classes = {name: _of(by_class[name]) for name in names}
    return {ALL: _of(everything), **of_classes}


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
