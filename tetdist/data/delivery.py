"""Raw batches copied to the training device and finished there, ahead of the consumer."""

from collections import deque
from concurrent.futures import Future

import torch

from tetdist.data.loader import Batch, Batches
from tetdist.data.pixels import finished
from tetdist.data.transfer import completed_on, new_stream, on_device, taker

# Batches copied ahead: while one is in use, the next is ready and another is being copied.
_AHEAD = 2


class DeviceBatches(Batches):
    """The batches of a source, finished on a device.

    A GPU copies and finishes them on a separate stream while it trains. A thread starts this and
    waits for it, so that the training thread never waits.
    """

    def __init__(self, source: Batches, device: torch.device) -> None:
        """
        Args:
            source: Raw batches, each valid until the next one is requested.
        """
        self._source, self._device = source, device
        self._stream = new_stream(device)
        self._ahead: deque[Future[Batch | None]] = deque()
        self._taker = taker(device, "tetdist-deliver")

    def __next__(self) -> Batch:
        while len(self._ahead) < _AHEAD:
            self._ahead.append(self._taker.submit(self._take))
        batch = self._ahead[0].result()
        if batch is None:
            # Its future stays first, so that later calls also end here.
            raise StopIteration
        self._ahead.popleft()
        if self._stream is not None:
            for tensor in (batch.images, batch.labels):
                # Otherwise the allocator would give their memory back to the other stream once
                # they are released here, although the GPU may still have to read it.
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _take(self) -> Batch | None:
        batch = next(self._source, None)
        if batch is None:
            return None
        # Once it is copied, the source may overwrite its memory.
        with completed_on(self._stream):
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
