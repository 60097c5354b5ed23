"""A journal of the samples that were probed for an index, so that nothing is probed twice.

A line holds the settings of the probes and, for each good sample, the file's time and size and the
facts that were found. Only samples of unchanged files are taken from it.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tetdist.datasets.archives import ByteRange
from tetdist.datasets.probe import Probe, probe_range
from tetdist.datasets.processes import ReportProgress, run_on_samples
from tetdist.storage.files import explaining, parse_json, whole_lines

# Time of the last change in ns, and bytes, of a file; None if it cannot be accessed.
_Stamp = tuple[int, int] | None


def probe_with_journal(
    journal: Path,
    probe: Callable[..., Probe | str],
    arguments: tuple[Any, ...],
    root: str | Path,
    byte_ranges: Sequence[ByteRange],
    workers: int,
    progress: ReportProgress | None = None,
) -> list[Probe | str]:
    """Return the results of `probe_batches`, those of good samples from the journal if it has them.

    Each new one is in the journal a moment later; bad samples are probed again in the next start.
    Progress counts the samples that are probed now.
    """
    known = dict(_entries(journal, settings := [probe.__name__, *arguments]))
    found: dict[int, Any] = {}
    rows = [i for i, place in enumerate(byte_ranges) if _key(place) in known]
    places = [byte_ranges[i] for i in rows]
    work = functools.partial(_examine, None, root, ())
    for i, (stamp, _) in zip(rows, chain(*run_on_samples(work, places, workers)), strict=True):
        time_and_size, facts = known[_key(byte_ranges[i])]
        if stamp is not None and list(stamp) == time_and_size:
            found[i] = Probe(*facts)
    rows = [i for i in range(len(byte_ranges)) if i not in found]
    work = functools.partial(_examine, probe, root, arguments)
    batches = run_on_samples(work, [byte_ranges[i] for i in rows], workers, progress)
    with explaining(journal):
        journal.parent.mkdir(parents=True, exist_ok=True)
        stream = journal.open("ab", buffering=0)
    with stream:
        left = iter(rows)
        for batch in batches:
            good: dict[str, Any] = {}
            for (stamp, result), i in zip(batch, left, strict=False):
                found[i] = result
                if stamp is not None and isinstance(result, Probe):
                    good[_key(byte_ranges[i])] = stamp, result
            with explaining(journal):
                stream.write(json.dumps([settings, good]).encode() + b"\n")
    return [found[i] for i in range(len(byte_ranges))]


def _entries(journal: Path, settings: list[Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the journal's samples with the same settings: key, and time and size, and facts."""
    for line in whole_lines(journal):
        try:
            written_with, samples = parse_json(line)
        except ValueError:  # A power cut may leave zeros.
            continue
        if written_with == settings:
            yield from samples.items()


def _key(place: ByteRange) -> str:
    """Return the name of a sample: a path, with a part of an archive also its place there."""
    return place.file if place.size is None else f"{place.file} {place.offset} {place.size}"


def _examine(
    probe: Callable[..., Probe | str] | None,
    root: str | Path,
    arguments: tuple[Any, ...],
    byte_ranges: Sequence[ByteRange],
) -> list[tuple[_Stamp, Probe | str | None]]:
    """Return the stamps of files and, unless ``probe`` is None, what it finds in the samples."""
    results: list[tuple[_Stamp, Probe | str | None]] = []
    for place in byte_ranges:
        # First, so that a file that changes meanwhile is probed again in the next start.
        try:
            status = Path(root, place.file).stat()
            stamp = status.st_mtime_ns, status.st_size
        except OSError:
            stamp = None
        found = None if probe is None else probe_range(probe, root, place, *arguments)
        results.append((stamp, found))
    return results
