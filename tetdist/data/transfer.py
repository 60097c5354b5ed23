"""Asynchronous copies from the host to the computing device."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on the device, as ``dtype`` if given.

    Copies from unpinned memory make the host wait until all earlier launches are done. So the
    tensor is pinned first, and copied while host and GPU go on.
    """
    if dtype is not None:
        tensor = tensor.to(dtype)
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Make a stream beside the one that trains; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextlib.contextmanager
def completed_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the body's GPU work on a stream, and sleep until it is done; None: there is none."""
    # torch.cuda.stream(None) would open the first GPU, also in a process that only loads data.
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        yield
        if stream is not None:
            event = torch.cuda.Event(blocking=True)
            event.record()
            event.synchronize()


def taker(device: torch.device, name: str) -> ThreadPoolExecutor:
    """Make an executor of one thread that works on a device.

    A new thread's current GPU is the first one. Its CUDA calls would create a context there, of
    half a gigabyte, in each process that trains on another GPU.
    """
    set_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=set_device)
