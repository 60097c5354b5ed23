"""A journal of the samples that were probed for an index, so that nothing is probed twice.

A line holds the settings of the probes and, for each good sample, the file's time and size and the
facts that were found. Only samples of unchanged files are taken from it.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from tetdist.datasets.archives import ByteRange
from tetdist.datasets.probe import Probe, probe_range
from tetdist.datasets.processes import ReportProgress, run_on_samples
from tetdist.storage.files import explaining, parse_json, whole_lines

logger = logging.getLogger(__name__)

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
    known = _known(journal, settings := [probe.__name__, *arguments])
    found: dict[int, Any] = {}
    rows = [i for i, place in enumerate(byte_ranges) if _key(place) in known]
    files = list(dict.fromkeys(byte_ranges[i].file for i in rows))
    # Threads start at once, and mostly wait for a network's disk.
    with ThreadPool(workers) as pool:
        stamps = dict(zip(files, pool.imap(partial(_stamp, root), files, 64), strict=True))
    for i in rows:
        time_and_size, facts = known[_key(byte_ranges[i])]
        if (stamp := stamps[byte_ranges[i].file]) is not None and list(stamp) == time_and_size:
            found[i] = facts
    rows = [i for i in range(len(byte_ranges)) if i not in found]
    work = partial(_examine, probe, root, arguments)
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


def _known(journal: Path, settings: list[Any]) -> dict[str, tuple[list[int], Probe]]:
    """Return the journal's samples with the same settings: time and size, and facts, by key.

    What is no journal is put aside.
    """
    known: dict[str, tuple[list[int], Probe]] = {}
    try:
        if journal.is_symlink() or (journal.exists() and not journal.is_file()):
            raise ValueError
        for line in whole_lines(journal):
            try:
                values = parse_json(line)
            except ValueError:  # A power cut may leave zeros.
                continue
            written_with, samples = values
            if written_with == settings:
                known |= {key: (stamp, Probe(*facts)) for key, (stamp, facts) in samples.items()}
    except (AttributeError, TypeError, ValueError):
        aside = journal.with_suffix(".journal.bad")
        logger.warning("%s is no journal of an index; it is now %s", journal, aside.name)
        journal.replace(aside)
        return {}
    return known


def _key(place: ByteRange) -> str:
    """Return the name of a sample: a path, with a part of an archive also its place there."""
    return place.file if place.size is None else f"{place.file} {place.offset} {place.size}"


def _stamp(root: str | Path, file: str) -> _Stamp:
    try:
        status = Path(root, file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _examine(
    probe: Callable[..., Probe | str],
    root: str | Path,
    arguments: tuple[Any, ...],
    byte_ranges: Sequence[ByteRange],
) -> list[tuple[_Stamp, Probe | str]]:
    """Return the stamps of files, and what ``probe`` finds in the samples."""
    # The stamp comes first, so that a file that changes meanwhile is probed again next time.
    return [
        (_stamp(root, place.file), probe_range(probe, root, place, *arguments))
        for place in byte_ranges
    ]
