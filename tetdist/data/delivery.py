"""Raw batches brought to the device that trains, and finished there, ahead of the consumer."""

import contextlib
from collections import deque
from concurrent.futures import Future

import torch

from tetdist.data.loader import Batch, Batches
from tetdist.data.pixels import finished
from tetdist.data.transfer import on_device, taker

# Copied ahead of the consumer: while one is in use the next is there and one is on its way.
_AHEAD = 2


class DeviceBatches(Batches):
    """The batches of a source, finished on a device.

    A GPU copies and finishes them on a stream of its own, while it trains on another. A thread
    starts that and waits for it, so that whoever launches the training waits for nothing.
    """

    def __init__(self, source: Batches, device: torch.device) -> None:
        """
        Args:
            source: Of raw batches, each of which need be valid only until the next is asked for.
            device: Where they are wanted.
        """
        self._source, self._device = source, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: deque[Future[Batch | None]] = deque()
        self._taker = taker(device, "tetdist-deliver")

    def __next__(self) -> Batch:
        while len(self._ahead) < _AHEAD:
            self._ahead.append(self._taker.submit(self._take))
        batch = self._ahead[0].result()
        if batch is None:
            # Its future stays first, so that whoever asks again gets the same answer.
            raise StopIteration
        self._ahead.popleft()
        if self._stream is not None:
            for tensor in (batch.images, batch.labels):
                # The allocator would otherwise give their memory back to the other stream as soon
                # as nobody here knows of them, though the GPU may still have to read it.
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _take(self) -> Batch | None:
        batch = next(self._source, None)
        if batch is None:
            return None
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            done = self._finished(batch)
            if self._stream is not None:
                # This thread sleeps until it is done; the source may then overwrite its memory.
                event = torch.cuda.Event(blocking=True)
                event.record()
                event.synchronize()
        return done

    def _finished(self, batch: Batch) -> Batch:
        # A copy also on a CPU: the source is about to write the next batch there.
        images = batch.images.to(self._device, non_blocking=True, copy=True)
        labels = on_device(batch.labels.clone(), self._device)
        return batch._replace(images=finished(images, batch.rest), labels=labels, rest=None)

    def close(self) -> None:
        """Close the source, too."""
        for future in self._ahead:
            future.cancel()
        # The taker may be waiting for a batch, which the source's end gives it.
        self._taker.shutdown(wait=True)
        self._ahead.clear()
        self._source.close()
