"""Write files whole or not at all."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tetdist.errors import UserError

_ASIDE = re.compile(r"\..+\.\d+\.tmp")


@contextlib.contextmanager
def replacing(file: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A stream whose contents take the place of `file` when all of them are written.

    Args:
        file: in a folder that exists.
        sync: wait for the disk; without it a power cut may leave an empty file.

    Raises:
        UserError: if writing fails, as on a full disk; then everything is as before.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as e:
        raise UserError(
            f"{file} cannot be written ({e.strerror}), and nothing of it was: make room or name"
            " another place, then run the same command again"
        ) from e
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder, keep others from writing to it meanwhile, remove what a kill has left in it.

    Raises:
        UserError: if another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in folder.rglob(".*.tmp"):
            if _ASIDE.fullmatch(leftover.name):
                leftover.unlink()
        yield
    except BlockingIOError as e:
        raise UserError(f"another process is writing to {folder}: let it finish") from e
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Make sure that as many bytes fit on the disk of a folder.

    Raises:
        UserError: if they do not.
    """
    free = shutil.disk_usage(folder).free
    in_mb = f"{needed / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB"
    if free < needed:
        raise UserError(f"{folder} needs {in_mb} free: make room or name another place")
