"""Triton's cache of compiled kernels: on the host's own disk, and each kernel compiled once.

Otherwise all processes of a host, which start together, compile every kernel side by side, for a
minute; and the home folder, where Triton keeps its cache, is often on a slow shared disk.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

from triton.runtime.cache import FileCacheManager

from tetdist.storage.files import make_private

Found = TypeVar("Found")


def use() -> None:
    """Use this cache for all of Triton's kernels, unless the environment names another one."""
    os.environ.setdefault("TRITON_CACHE_MANAGER", f"{__name__}:{CompiledOnce.__name__}")
    folder = Path(tempfile.gettempdir()) / f"tetdist-{os.getuid()}"
    with contextlib.suppress(OSError):
        make_private(folder)
        # Another user could redirect a link to code of theirs; noexec disks cannot hold libraries.
        if not folder.is_symlink() and not os.statvfs(folder).f_flag & os.ST_NOEXEC:
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


class CompiledOnce(FileCacheManager):
    """Cached files of a kernel, or of its launcher; while a process makes them, others wait.

    Triton drops this object, and with it the lock, when they are made or that has failed.
    """

    _lock: TextIO | None = None

    def get_file(self, filename: str) -> str | None:
        """Return the path of a file; None if the caller is to make it."""
        return self._found(super().get_file, filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the paths of a kernel's files; None if the caller is to make them."""
        return self._found(super().get_group, filename)

    def _found(self, find: Callable[[str], Found | None], filename: str) -> Found | None:
        found = find(filename)
        if found is None and self._lock is None:
            # Some shared disks, which the environment may name, have no locks.
            with contextlib.suppress(OSError):
                self._lock = (Path(self.cache_dir) / "compiling").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            found = find(filename)
        return found

    def __del__(self) -> None:
        if self._lock is not None:
            self._lock.close()
