"""Time in a step's collectives, in which a process waits for slower ones."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Waiting:
    """Time that this process spends in collectives; on a GPU, that its computing stream waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._seconds = device.type == "cuda", 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time of the collectives in this context, without waiting for the GPU."""
        if self._on_gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            began_at = time.monotonic()
            yield
            self._seconds += time.monotonic() - began_at

    def take(self) -> float:
        """Return the seconds since the last call; the GPU must have finished."""
        on_gpu = sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        seconds, self._seconds, self._events = self._seconds + on_gpu, 0.0, []
        return seconds
