"""Time in a step's collectives, in which a process waits for slower ones."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Waiting:
    """Time that this process spends in collectives; on a GPU, that its computing stream waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._seconds = device.type == "cuda", 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time of the collectives in this context, without waiting for the GPU."""
        if self._on_gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
            # So that few are kept: synchronised batch norm makes two for each norm.
            while self._events and self._events[0][1].query():
                self._add_first()
        else:
            began_at = time.monotonic()
            yield
            self._seconds += time.monotonic() - began_at

    def take(self) -> float:
        """Return the seconds since the last call; the GPU must have finished."""
        while self._events:
            self._add_first()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_first(self) -> None:
        began, ended = self._events.popleft()
        self._seconds += began.elapsed_time(ended) / 1000
