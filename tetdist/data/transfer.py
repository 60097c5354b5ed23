"""Copies from the host to the device that computes, for which the host does not wait."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device, as ``dtype`` if that is given.

    From memory that is not pinned a GPU's driver copies while the host waits, and only after all
    that was launched before is done. So it is pinned first, and copied while both go on.
    """
    if dtype is not None:
        tensor = tensor.to(dtype)
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def taker(device: torch.device, name: str) -> ThreadPoolExecutor:
    """One thread that works on a device ahead of others.

    A new thread's present GPU is the first one. What it asks of CUDA would make a context there, of
    half a gigabyte, in each process of a machine that trains on the others.
    """
    set_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=set_device)
