"""Average of the gradients of processes on one host, through shared memory.

gloo sends them through the loopback device, which takes four times as long for the 87 MB of a
SEW-ResNet-34. Here gradients move in chunks small enough for a core's cache, so that main memory is
accessed twice per gradient: to read it, and to write the average in its place.
"""

import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tetdist.distributed.starters import place

CHUNK_BYTES = 2 * 2**20
_LARGEST_FILE = 64 * 2**20
_TOKEN = 16  # bytes


class SharedMemory:
    """Memory that all processes of a run on one host share.

    Attributes:
        chunks: (2, world_size, chunk bytes) uint8: two chunks of each process, so that the next is
            written while the others still read the last.
    """

    def __init__(self, path: str, rank: int, world_size: int) -> None:
        """
        Args:
            path: A file of at least the size of ``chunks``.
        """
        self.rank = rank
        shape = (2, world_size, _chunk_bytes(world_size))
        memory = torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.uint8)
        self.chunks = memory.view(shape)

    def mean_(self, tensors: list[Tensor], wait_for_all: Callable[[], object]) -> None:
        """Average tensors over all processes, in place; summed in the order of ranks.

        Args:
            tensors: Floating-point tensors, of the same shapes, types and strides on every process,
                dense in memory.
            wait_for_all: Returns when every process has called it.
        """
        for dtype in {tensor.dtype: None for tensor in tensors}:
            self._mean_of_type([t for t in tensors if t.dtype == dtype], wait_for_all)

    def _mean_of_type(self, tensors: list[Tensor], wait_for_all: Callable[[], object]) -> None:
        buffers = self.chunks.view(tensors[0].dtype)
        steps = list(_chunked(map(_in_memory_order, tensors), buffers.shape[-1]))
        self._write(buffers[0], steps[0] if steps else [])
        for k, (pieces, following) in enumerate(pairwise([*steps, []])):
            wait_for_all()
            # All processes have got here, so all have read the previous contents of these buffers.
            self._write(buffers[(k + 1) % 2], following)
            self._read_mean(buffers[k % 2], pieces)
        # No process may write again before all have read the last chunk.
        wait_for_all()

    def _write(self, buffer: Tensor, pieces: list[Tensor]) -> None:
        if pieces:
            torch._foreach_copy_(_split_like(pieces, buffer[self.rank]), pieces)

    def _read_mean(self, buffer: Tensor, pieces: list[Tensor]) -> None:
        first, *others = buffer[:, : sum(map(len, pieces))]
        total = first.clone()
        for other in others:
            total += other
        total /= len(buffer)
        torch._foreach_copy_(pieces, _split_like(pieces, total))


def share(rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> SharedMemory | None:
    """Make shared memory for all processes; None if they are on several hosts, or if that fails.

    Args:
        gather: Returns every process's value, by rank, on every process.
    """
    # On another host rank 0's process id belongs to an unrelated process, whose files we must not
    # open.
    places = gather(place())
    if None in places or len(set(places)) > 1:
        return None
    # The file has no name in any folder, so nothing is left when the processes are killed.
    token = secrets.token_bytes(_TOKEN)
    handle = _reserve(token, world_size) if rank == 0 else None
    try:
        process, number, token = gather((os.getpid(), handle, token))[0]
        memory = None
        if number is not None:
            memory = _open(f"/proc/{process}/fd/{number}", token, rank, world_size)
        everywhere = all(gather(memory is not None))
    finally:
        if handle is not None:
            os.close(handle)
    return memory if everywhere else None


def _size(world_size: int) -> int:
    """Return the bytes of the whole file."""
    return 2 * world_size * _chunk_bytes(world_size)


def _reserve(token: bytes, world_size: int) -> int | None:
    """Reserve a file in memory, all of it at once: missing memory would later be a bus error."""
    handle = os.memfd_create("tetdist", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(handle, 0, _size(world_size))
        os.pwrite(handle, token, 0)
    except OSError:
        os.close(handle)
        return None
    return handle


def _open(path: str, token: bytes, rank: int, world_size: int) -> SharedMemory | None:
    """Map rank 0's file; None if it cannot be opened, or is another one."""
    try:
        # O_NONBLOCK, because opening a pipe could otherwise wait for ever.
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        facts = os.fstat(handle)
        # Check the type first: reading from another program's pipe would take its data.
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != _size(world_size):
            return None
        if os.pread(handle, len(token), 0) != token:
            return None
        return SharedMemory(f"/proc/self/fd/{handle}", rank, world_size)
    except OSError:
        return None
    finally:
        os.close(handle)


def _chunk_bytes(world_size: int) -> int:
    # It must be a multiple of every type's size.
    return min(CHUNK_BYTES, _LARGEST_FILE // (2 * world_size)) // 64 * 64


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the tensor's memory as one dimension, whatever its format."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1)


def _chunked(tensors: Iterable[Tensor], size: int) -> Iterable[list[Tensor]]:
    """Yield pieces of the tensors, one after another, in lists that fill a chunk each."""
    pieces: list[Tensor] = []
    room = size
    for tensor in tensors:
        while len(tensor):
            piece, tensor = tensor[:room], tensor[room:]
            pieces.append(piece)
            room -= len(piece)
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _split_like(pieces: list[Tensor], whole: Tensor) -> list[Tensor]:
    sizes = [len(piece) for piece in pieces]
    return list(whole[: sum(sizes)].split(sizes))
