"""Reading of samples' bytes from the places in the index."""

import os
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from tetdist.datasets.archives import ByteRange
from tetdist.datasets.index import Index
from tetdist.errors import UserError

# This is well below the 1,024 files that a process may usually have open.
_KEPT_OPEN = 256


class SampleReader:
    """A reader of whole samples for several threads, to be closed or used in `with`.

    The first 256 archives stay open between reads, since opening is slow on a cluster's file
    system; any others are opened for each read.
    """

    def __init__(self, index: Index, root: str | Path) -> None:
        self._index = index
        self._root = root
        # Messages show the root as given; reads use the absolute path, which survives a chdir.
        self._folder = Path(root).absolute()
        self._kept: dict[str, int] = {}

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Read all bytes of sample `i`: (size,)."""
        byte_range = self._index.byte_range(i)
        try:
            descriptor, is_kept = self._opened(byte_range.file)
            try:
                size = byte_range.size if self._index.archives else os.fstat(descriptor).st_size
                if size != byte_range.size:
                    expected = byte_range.size
                    raise self._error(i, f"has {size} bytes instead of the index's {expected}")
                return self._read_bytes(descriptor, byte_range, i)
            finally:
                if not is_kept:
                    os.close(descriptor)
        except OSError as error:
            raise self._error(i, f"cannot be read ({error.strerror})") from error

    def _opened(self, file: str) -> tuple[int, bool]:
        """Return the descriptor of a file, and whether it stays open."""
        known = self._kept.get(file)
        if known is not None:
            return known, True
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(self._folder / file, os.O_RDONLY | os.O_NONBLOCK)
        if not self._index.archives or len(self._kept) >= _KEPT_OPEN:
            return descriptor, False
        # Another thread may have opened it meanwhile: only one of the two is kept.
        return descriptor, self._kept.setdefault(file, descriptor) == descriptor

    def _read_bytes(self, descriptor: int, byte_range: ByteRange, i: int) -> npt.NDArray[np.uint8]:
        assert byte_range.size is not None
        data = np.empty(byte_range.size, np.uint8)
        done = 0
        while done < byte_range.size:
            count = os.preadv(descriptor, [data[done:].data], byte_range.offset + done)
            if count == 0:
                raise self._error(i, f"is cut off: {byte_range.file} ends before it does")
            done += count
        return data

    def _error(self, i: int, what: str) -> UserError:
        return UserError(
            f"{self._index.path(i)} in {self._root} {what}: index the data again with"
            f" `{self._index.command(self._root)}`"
        )

    def close(self) -> None:
        """Close the archives. A later read opens them again."""
        while self._kept:
            os.close(self._kept.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
