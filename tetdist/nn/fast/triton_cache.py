"""Triton's cache of compiled kernels: on the host's own disk, and each kernel compiled once.

Otherwise all processes of a host, which start together, compile every kernel side by side, for a
minute; and the home folder, where Triton keeps its cache, is often on a slow shared disk.
"""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import TextIO

from triton.runtime.cache import FileCacheManager

from tetdist.storage.files import make_private


def use() -> None:
    """Use this cache for all of Triton's kernels, unless the environment names another one."""
    os.environ.setdefault("TRITON_CACHE_MANAGER", f"{__name__}:{CompiledOnce.__name__}")
    folder = Path(tempfile.gettempdir()) / f"tetdist-{os.getuid()}"
    with contextlib.suppress(OSError):
        make_private(folder)
        # Others could exchange a link of theirs, and libraries are loaded from there.
        if not folder.is_symlink() and not os.statvfs(folder).f_flag & os.ST_NOEXEC:
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


class CompiledOnce(FileCacheManager):
    """The cached files of a kernel; while a process compiles them, others wait.

    The lock ends with this object, too, as after a failed compilation, and with the process.
    """

    _lock: TextIO | None = None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the kernel's files; None if the caller is to compile them."""
        found = super().get_group(filename)
        if found is None and self._lock is None:
            # Some shared disks, which the environment may name, have no locks.
            with contextlib.suppress(OSError):
                self._lock = (Path(self.cache_dir) / "compiling").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            found = super().get_group(filename)
            if found is not None:
                self._unlock()
        return found

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        """Keep the kernel's files, and let the others have them."""
        path = super().put_group(filename, group)
        self._unlock()
        return path

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
