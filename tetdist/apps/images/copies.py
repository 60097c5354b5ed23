"""Copies of a run's tar files on each host's own disk (`data.cache`), made before training."""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import BinaryIO

from tetdist.apps.file_progress import file_progress
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import Watch
from tetdist.errors import Stopped, UserError
from tetdist.storage import files
from tetdist.training.prepared import Prepared

_STREAMS, _CHUNK = 4, 2**22


def copy_to_hosts(run: Prepared, stop: StopRequest, watch: Watch) -> None:
    """Copy a run's tar files to each host, by one of its processes, and have all read the copies.

    Where that fails, as on a full disk, the host's processes read the original files.

    Raises:
        UserError: A host's folder cannot be made.
        Stopped: A signal requested it.
    """
    world, root = run.world, Path(run.config.data.root).resolve()
    archives = sorted({*run.train.archives, *run.val.archives})
    folder = world.run_on_all(partial(_folder, root, str(run.config.data.cache)))
    hosts = world.gather(platform.node())
    first, stopped, done = hosts.index(hosts[world.rank]), Event(), list[int]()
    title = f"copying the data to {folder}"
    with file_progress(title, "megabyte") as show, ThreadPoolExecutor(1) as pool:
        make = partial(_copy_all, root, folder, archives, stopped, done)
        job = pool.submit(make) if world.rank == first else None
        while not all(world.gather(job is None or job.done())):
            watch.progress("copying the data to data.cache")
            if stop.agreed():
                stopped.set()
                raise Stopped
            if world.rank == 0 and sum(done[1:]) < sum(done[:1]):
                show(sum(done[1:]) // 10**6, done[0] // 10**6)
            time.sleep(0.2)
        if world.rank == 0 and done:
            show(sum(done[1:]) // 10**6, done[0] // 10**6)
    reason = world.gather(world.run_on_all(lambda: job and job.result()))[first]
    if reason is None:
        run.train.copies.append(folder)
        run.val.copies.append(folder)
    elif world.rank == first:
        message = "%s: the data are read from %s, since they were not copied: %s"
        logging.getLogger(__name__).error(message, platform.node(), root, reason)


def _folder(root: Path, cache: str) -> Path:
    """Make the folder of the copies of a data root."""
    place = hashlib.blake2b(os.fsencode(root), digest_size=4).hexdigest()
    folder = Path(os.path.expandvars(cache), f"{root.name}-{place}")
    if not folder.is_absolute():
        raise UserError(
            f"data.cache={cache} is not an absolute path on {platform.node()}, or has a variable "
            "that is not set there; name a folder on each host's own disk"
        )
    with files.explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _copy_all(
    root: Path, folder: Path, archives: list[str], stopped: Event, done: list[int]
) -> str | None:
    """Make the missing copies, verify the others by their digests, and return why that fails.

    ``done`` gets the bytes of all files, then those done of each file.
    """

    def progress(i: int, position: int) -> None:
        if stopped.is_set():
            raise UserError("it was stopped")
        done[i] = position

    journal = folder / "digests.json"
    try:
        with files.only_writer(folder), ThreadPoolExecutor(_STREAMS) as pool:
            known = files.parse_json(journal.read_bytes()) if journal.is_file() else {}
            stats = [(root / file).stat() for file in archives]
            state = {f: [s.st_size, s.st_mtime_ns] for f, s in zip(archives, stats, strict=True)}
            kept = {f: known[f][2] for f in state if known.get(f, [])[:2] == state[f]}
            files.check_space(folder, sum(state[f][0] for f in state if f not in kept))
            done += [sum(stat.st_size for stat in stats), *(0 for _ in stats)]
            jobs = [
                pool.submit(_copy, root / f, folder / f, kept.get(f), partial(progress, i))
                for i, f in enumerate(archives, 1)
            ]
            for file, job in zip(archives, jobs, strict=True):
                if job.exception() is not None:
                    stopped.set()  # The other files need not be copied.
                known[file] = [*state[file], job.result()]
                files.write_json(journal, known)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _copy(source: Path, copy: Path, known: str | None, progress: Callable[[int], None]) -> str:
    """Return the digest of a file's copy, which is made unless it has the known one."""
    if known is not None and copy.is_file():
        if _digest(copy, progress) == known:
            return known
        message = "%s: %s has changed since it was copied, so it is copied again: check this disk"
        logging.getLogger(__name__).warning(message, platform.node(), copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with files.explaining(copy), files.replacing(copy) as stream:
        digest = _digest(source, lambda n: progress(n // 2), stream)
        files.settle(stream)
        half = stream.tell() // 2
        if _digest(Path(stream.name), lambda n: progress(half + n // 2)) != digest:
            raise UserError(f"{copy} differs from what was written: its disk is faulty")
    return digest


def _digest(file: Path, progress: Callable[[int], None], copy: BinaryIO | None = None) -> str:
    """Return the digest of a file, and write its bytes to `copy`."""
    digest = hashlib.blake2b(digest_size=16)
    with files.open_file(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if copy is not None:
                copy.write(chunk)
            progress(stream.tell())
    return digest.hexdigest()
