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

    The lock ends with this object, too, as after a failed compilation, and with the process.
    """

    _lock: TextIO | None = None
    _awaited = ""  # the file, or the group of files, that is compiled under the lock

    def get_file(self, filename: str) -> str | None:
        """Return the path of a file; None if the caller is to make it."""
        return self._found(lambda: super(CompiledOnce, self).get_file(filename), filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the paths of a kernel's files; None if the caller is to make them."""
        return self._found(lambda: super(CompiledOnce, self).get_group(filename), f"all/{filename}")

    def _found(self, find: Callable[[], Found | None], what: str) -> Found | None:
        found = find()
        if found is None and self._lock is None:
            # Some shared disks, which the environment may name, have no locks.
            with contextlib.suppress(OSError):
                self._lock, self._awaited = (Path(self.cache_dir) / "compiling").open("w"), what
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            found = find()
            if found is not None:
                self._unlock(what)
        return found

    def put(self, data: str | bytes, filename: str, binary: bool = True) -> str:
        """Keep a file, and let others have it."""
        path = super().put(data, filename, binary)
        self._unlock(filename)
        return path

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        """Keep a kernel's files, and let others have them."""
        path = super().put_group(filename, group)
        self._unlock(f"all/{filename}")
        return path

    def _unlock(self, what: str) -> None:
        if self._lock is not None and what == self._awaited:
            self._lock.close()
            self._lock = None
