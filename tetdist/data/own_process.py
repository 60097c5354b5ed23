"""A loader in a separate process, which passes batches through shared memory.

Training on a GPU makes hundreds of kernel launches a step and releases the interpreter's lock at
each of them. Threads of the same process that prepare images would then hold the lock, up to five
milliseconds each time. In another process they do not delay launches.
"""

import contextlib
import math
import mmap
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from tetdist import plugins
from tetdist.data.loader import Batch, Batches, Loader
from tetdist.datasets.processes import end_with_parent
from tetdist.errors import UserError

# While the consumer copies one batch the next are written.
_SLOTS = 3


class _Memory(NamedTuple):
    """A file in memory: its descriptor in the loader's process, and its bytes per batch."""

    descriptor: int
    slot_bytes: int


class _Written(NamedTuple):
    """A batch whose images are in a slot of the memory."""

    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    others: Batch  # with nothing in place of the images


class LoaderProcess(Batches):
    """Batches of a loader that runs in another process.

    Each batch is valid until the next one is requested.
    """

    def __init__(
        self, make: Callable[[], Loader], imports: Iterable[str] = (), *, pinned: bool = False
    ) -> None:
        """
        Args:
            make: Makes the loader there; it is pickled.
            imports: The user's files to import there first.
            pinned: True to pin the memory, so that a GPU copies from it asynchronously.
        """
        # A plain fork would copy the locks of this process's threads, and CUDA's state. The fork
        # server does the slow imports once, and is forked for every loader.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tetdist.data.build"])
        self._channel, other_end = context.Pipe()
        arguments = pickle.dumps(make), tuple(imports), other_end
        self._process = context.Process(
            target=_serve, args=arguments, daemon=True, name="tetdist-loader"
        )
        self._process.start()
        other_end.close()
        self._pinned = pinned
        self._memory: torch.Tensor | None = None
        self._used: int | None = None  # the slot of the batch that the consumer has
        self._ended = False

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        try:
            if self._used is not None:
                self._channel.send(self._used)
                self._used = None
            answer: Any = self._channel.recv()
            while isinstance(answer, _Memory):
                self._open(answer)
                answer = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        self._ended = not isinstance(answer, _Written)
        if answer is None:
            raise StopIteration
        if isinstance(answer, Exception):
            raise answer
        return self._read(answer)

    def _open(self, memory: _Memory) -> None:
        """Map the memory of the other process."""
        self._close_memory()
        path = f"/proc/{self._process.pid}/fd/{memory.descriptor}"
        size = _SLOTS * memory.slot_bytes
        mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self._memory = mapped.view(_SLOTS, -1)
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostRegister(mapped.data_ptr(), size, 0))

    def _close_memory(self) -> None:
        if self._memory is not None and self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._memory = None

    def _read(self, written: _Written) -> Batch:
        num_bytes = math.prod(written.shape) * written.dtype.itemsize
        if not num_bytes:
            return written.others._replace(images=torch.empty(written.shape, dtype=written.dtype))
        assert self._memory is not None
        self._used = written.slot
        flat = self._memory[written.slot, :num_bytes].view(written.dtype)
        return written.others._replace(images=flat.as_strided(written.shape, written.strides))

    def _death(self) -> UserError:
        self._process.join(timeout=5)
        status = self._process.exitcode
        killed = status == -signal.SIGKILL
        cause = "killed, most often for lack of memory" if killed else f"exit status {status}"
        return UserError(
            f"the data-loading process died ({cause}); start again, with a smaller data.prefetch "
            "or fewer data.threads if memory was short"
        )

    def close(self) -> None:
        self._channel.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._close_memory()


def _check(status: Any) -> None:
    torch.cuda.check_error(int(status))


def _serve(pickled: bytes, imports: tuple[str, ...], channel: Connection) -> None:
    """Write batches into free slots until the other side closes the channel."""
    end_with_parent()
    # The loader's threads divide images among them, one at a time each.
    torch.set_num_threads(1)
    # The training process decides when to stop, and needs batches until its checkpoint is written.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # The consumer may close the channel at any time.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            plugins.import_files(imports)
            # Its error, such as of an index that was replaced meanwhile, goes to the consumer.
            make: Callable[[], Loader] = pickle.loads(pickled)
            with make() as loader:
                _write_all(loader, channel)
            channel.send(None)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            channel.send(error)
        # The memory has to stay until the consumer has read the last batch.
        while True:
            channel.recv()


def _write_all(loader: Loader, channel: Connection) -> None:
    free = list(range(_SLOTS))
    slots: list[memoryview] = []
    for batch in loader:
        images = batch.images
        num_bytes = images.numel() * images.element_size()
        if num_bytes and not slots:
            # No later batch is larger than the first.
            slots = _reserve(num_bytes, channel)
        while not free or channel.poll():
            free.append(channel.recv())
        slot = free.pop()
        if num_bytes:
            place = torch.frombuffer(slots[slot], dtype=images.dtype, count=images.numel())
            place.as_strided(images.shape, images.stride()).copy_(images)
        others = batch._replace(images=torch.empty(0))
        shape, strides = tuple(images.shape), images.stride()
        channel.send(_Written(slot, shape, images.dtype, strides, others))
        if not num_bytes:
            free.append(slot)


def _reserve(slot_bytes: int, channel: Connection) -> list[memoryview]:
    """Reserve memory for all slots, and send its descriptor to the consumer.

    The memory is an unnamed file: nothing remains when the processes are killed, and it needs no
    space in /dev/shm, which is small in containers.
    """
    size = _SLOTS * slot_bytes
    descriptor = os.memfd_create("tetdist-batches", os.MFD_CLOEXEC)
    try:
        # Allocate all of it now: missing memory would later be a bus error.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise UserError(
            f"batches need {size / 2**20:.0f} MiB of memory, which is not free "
            f"({error.strerror}); set a smaller batch.micro"
        ) from error
    memory = memoryview(mmap.mmap(descriptor, size))
    channel.send(_Memory(descriptor, slot_bytes))
    return [memory[k * slot_bytes : (k + 1) * slot_bytes] for k in range(_SLOTS)]
