"""Atomic writing of files and folders, also if the process is killed, and reading of regular files.

Writing follows links. A pipe or a device is written to and never replaced by a file.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from tetdist.errors import UserError

_ASIDE = re.compile(r"\..+\.\d+\.tmp")


@contextlib.contextmanager
def made_aside(path: Path, *, sync: bool = True, ending: str = "") -> Iterator[Path]:
    """Yield a hidden path beside `path`; the file or folder made there then replaces `path`.

    If `path` is a link, its target is replaced. An error removes the hidden file and leaves `path`
    unchanged.

    Args:
        path: Path in an existing folder; if it is a folder, it must be empty.
        sync: Wait for the disk; otherwise a power cut may leave empty files.
        ending: Suffix of the hidden name, for libraries that depend on it.

    Raises:
        OSError: Writing fails, as on a full disk, or `path` is a pipe or a device.
    """
    if _is_pipe_or_device(path):
        raise OSError(errno.EINVAL, "It is a pipe or a device", str(path))
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp{ending}")
    remove(aside)  # A killed process may have had the same number.
    try:
        yield aside
        if sync:
            for written in (aside, *aside.rglob("*")):
                _sync(written)
        aside.replace(path)
        if sync:
            _sync(path.parent)
    finally:
        remove(aside)


@contextlib.contextmanager
def replacing(file: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream whose contents replace `file`; a pipe or a device is written to directly."""
    if _is_pipe_or_device(file):
        with file.open("wb") as stream:
            yield stream
        return
    with made_aside(file, sync=sync) as aside, aside.open("wb") as stream:
        yield stream


def write_text(file: Path, text: str) -> None:
    """Write text as UTF-8, atomically; see `made_aside`."""
    with replacing(file) as stream:
        stream.write(text.encode())


def parse_json(text: str | bytes) -> Any:
    """Parse untrusted JSON.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(file: Path, values: Any) -> None:
    """Write JSON atomically; see `made_aside`."""
    write_text(file, json.dumps(values, indent=1) + "\n")


@contextlib.contextmanager
def explaining(file: Path) -> Iterator[None]:
    """Turn an OSError while `file` is written into a `UserError`.

    Raises:
        UserError: Writing has failed, and nothing has changed.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}), and nothing has changed: "
            "correct that or choose another place, then run the same command again"
        ) from error


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; a pipe may never send data, and a device never end.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "It is a pipe, a device or a folder, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """Read a file as UTF-8; `open_file` refuses a pipe or a device.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    with open_file(path) as file:
        return file.read().decode()


def _is_pipe_or_device(path: Path) -> bool:
    """Return whether a path exists and is neither a file nor a folder.

    Raises:
        OSError: The path is a link to itself, or cannot be accessed.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_writable(flag: str, file: Path) -> None:
    """Refuse an output file that cannot be written, before the work begins."""
    try:
        if _is_pipe_or_device(file):
            writable = os.access(file, os.W_OK)
        else:
            target = Path(os.path.realpath(file))
            folder = target.parent
            writable = folder.is_dir() and os.access(folder, os.W_OK) and not target.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise UserError(
            f"{flag}: cannot write {file}: name a file in a folder that you can write to"
        )


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    # If it cannot be removed now, the next writing removes or ignores it.
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_held(file: Path) -> bool:
    """Return whether a process has locked a file, as a run's process does in its folder."""
    try:
        with file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # It does not exist, or the file system has no locks.
        return False
    return False


def settle(stream: BinaryIO) -> None:
    """Wait until a file is on the disk, and have it read from there again, not from memory."""
    stream.flush()
    os.fsync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock an existing folder against other processes of this machine.

    Raises:
        BlockingIOError: Another process has locked it, and ``wait`` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        # Closing it is not enough if this process has forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder, lock it against other writers, and remove temporary files of killed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, wait=False):
            for leftover in list(folder.rglob(".*.tmp")):
                if _ASIDE.fullmatch(leftover.name):
                    remove(leftover)
            yield
    except BlockingIOError as error:
        raise UserError(f"another process is writing to {folder}: wait until it ends") from error


def check_space(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    in_mb = f"{needed / 1e6:,.1f} MB, but its disk has {free / 1e6:,.1f} MB free"
    if free < needed:
        raise UserError(f"{folder} needs {in_mb}: free disk space, or choose another place")


class OthersMayWrite(PermissionError):
    """Raised if others can write to a folder that must be private."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} can be written to by others")
        self.folder = folder


def own_cache() -> Path:
    """Return the user's cache folder, which only this user can write to; make it if missing.

    Raises:
        OthersMayWrite: Other users can write to it.
        OSError: It cannot be made or written to.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "tetdist"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error
    make_private(folder)
    return folder


def make_private(folder: Path) -> None:
    """Make a folder that only this user can write to, unless it exists.

    Raises:
        OthersMayWrite: Other users can write to it.
        OSError: It cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours_alone(folder.stat()):
        raise OthersMayWrite(folder)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")


def is_ours_alone(facts: os.stat_result) -> bool:
    """Return whether only this user (and root) can change a file or folder."""
    return facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def whole_lines(journal: Path) -> list[bytes]:
    """Return the lines of a journal, after removing a last line that a kill left incomplete."""
    if not journal.is_file():
        return []
    data = journal.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with explaining(journal):
            os.truncate(journal, end)
    return data[:end].splitlines()
