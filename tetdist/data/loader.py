"""An iterator of batches: threads read samples, DALI decodes them, threads edit them.

All of it runs ahead of the consumer. batches.py describes the batches; pixels.py edits images.
"""

import abc
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from tetdist.data.batch_operations import operate
from tetdist.data.dali import Source, Workers, event_graph, image_graph, image_inputs, import_dali
from tetdist.data.images_as_events import frames
from tetdist.data.pixels import Edits, Output, Rest, edited, finished
from tetdist.data.transfer import completed_on, new_stream, on_device, taker
from tetdist.data.transforms import Mix, Transform
from tetdist.datasets.index import Index
from tetdist.datasets.probe import probe_image, probe_range
from tetdist.datasets.reader import SampleReader
from tetdist.errors import UserError
from tetdist.wording import and_more


class Batch(NamedTuple):
    """A batch of B samples.

    Attributes:
        images: Float32, (B, 3, H, W) in channels_last memory, or (B, T, 2, H, W) for events; or
            images as events, whose frames are bits of bytes (B, 2, H, W). In a raw batch, bytes
            (B, H, W, 3), or (B, T, 2, H, W) as stored.
        labels: Int64, (B,).
        ids: Int64, (B,), numbers of the samples in the index.
        mix: Mixing of the images with each other (mixing.py); None: none.
        rest: Changes that a raw batch still needs (`pixels.finished`); None: none.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: npt.NDArray[np.int64]
    mix: Mix | None = None
    rest: Rest | None = None

    def inputs(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return the network's input on a device: images, or frames of events."""
        if self.images.dtype == torch.uint8:
            return frames(on_device(self.images, device)).to(dtype)
        return on_device(self.images, device, dtype)


class Batches(Iterator[Batch]):
    """An iterator of batches, to be closed or used in a `with` statement."""

    @abc.abstractmethod
    def close(self) -> None:
        """End its threads and processes, whether or not all batches were taken."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Transforms = tuple[tuple[Transform, npt.NDArray[np.float64]], ...]


class Inputs(NamedTuple):
    """One batch to be read, decoded and finished.

    Attributes:
        ids: (B,) sample numbers.
        edits: Changes of decoded images; None for events.
        rest: Changes of images after that.
        change: Makes DALI's input from the k-th sample's bytes; None: the bytes themselves.
        transforms: User transforms of finished samples, each with its draws (B, n).
    """

    ids: npt.NDArray[np.int64]
    edits: Edits | None = None
    rest: Rest | None = None
    change: Callable[[int, npt.NDArray[np.uint8]], npt.NDArray[Any]] | None = None
    mix: Mix | None = None
    transforms: Transforms = ()


# Each batch with DALI's inputs for it.
Stream = Generator[tuple[Inputs, tuple[Any, ...]], None, None]


class Loader(Batches):
    """Batches made by DALI and threads of this process.

    Batches stay valid after the loader's end. After the last batch or an error, the loader is
    closed already.
    """

    def __init__(
        self,
        index: Index,
        root: str | Path,
        inputs: Iterator[Inputs],
        workers: Workers,
        output: Output | None,
        *,
        max_batch: int,
        empty_batches: int = 0,
    ) -> None:
        """
        Args:
            output: Format of all images; None for events.
            empty_batches: Number of batches at the end without samples, whose images are (0,).
        """
        dali = import_dali()
        on_gpu = workers.device == "gpu"
        self._index = index
        self._root = root
        self._stream = _read_ahead(inputs, SampleReader(index, root), workers)
        self._workers = workers
        self._empty_batches = empty_batches
        self._output = output
        self._device = torch.device(f"cuda:{workers.device_id}" if on_gpu else "cpu")
        self._edits = new_stream(self._device)
        self._in_work: deque[Inputs] = deque()
        self._pipeline: Any = dali.Pipeline(
            batch_size=max_batch,
            num_threads=workers.threads,
            device_id=workers.device_id if on_gpu else None,
            prefetch_queue_depth=workers.prefetch,
            # Outputs of this executor outlive the next iteration, so they need no copy.
            exec_dynamic=True,
        )
        with self._pipeline:
            # The source does not refer to self: the cycle would keep DALI's threads after close().
            source = _source(self._stream, self._in_work)
            if output is None:
                self._pipeline.set_outputs(event_graph(dali, source, workers, str(index.dtype)))
            else:
                self._pipeline.set_outputs(image_graph(dali, source, workers, output))
        self._pipeline.build()
        # One thread takes batches from DALI and has them edited by others, ahead of the consumer.
        self._ahead: deque[Future[Batch | None]] = deque()
        self._taker = taker(self._device, "tetdist-take")
        self._finishers = ThreadPoolExecutor(workers.threads, thread_name_prefix="tetdist-finish")

    def __next__(self) -> Batch:
        if self._pipeline is None:
            return self._next_empty()
        while len(self._ahead) <= self._workers.prefetch:
            self._ahead.append(self._taker.submit(self._take))
        try:
            batch = self._ahead.popleft().result()
        except Exception:
            self.close()
            raise
        if batch is None:
            self._stop()
            return self._next_empty()
        return batch

    def _take(self) -> Batch | None:
        """Take the next batch; None after the last one."""
        try:
            (output,) = self._pipeline.run()
        except StopIteration:
            return None
        except RuntimeError as error:
            ids = [int(i) for inputs in self._in_work for i in inputs.ids]
            named = _undecodable(self._index, self._root, ids)
            if named is not None:
                raise named from error
            error.add_note(
                "PIL decodes all files that DALI had in work: "
                + ", ".join(self._index.path(i) for i in ids)
            )
            raise
        inputs = self._in_work.popleft()
        # On a GPU, this stream waits for DALI's; the one that trains does not.
        with completed_on(self._edits):
            if inputs.edits is None:
                images = torch.from_dlpack(output.as_tensor())
                if self._workers.pinned:
                    images = images.pin_memory()
            else:
                assert self._output is not None
                images = self._edited(output, inputs.edits, self._output)
        batch = self._batch(images, inputs.ids)._replace(mix=inputs.mix, rest=inputs.rest)
        if not self._workers.raw:
            batch = batch._replace(images=finished(images, inputs.rest), rest=None)
        if inputs.transforms:
            batch = batch._replace(images=batch.inputs(self._device, torch.float32))
            self._divided(len(images), _transform_part, batch.images, inputs.transforms)
        return batch

    def _edited(self, windows: Any, edits: Edits, output: Output) -> torch.Tensor:
        """Edit decoded windows, still as bytes: (B, H, W, 3)."""
        if self._device.type == "cuda":
            # DALI has resized and mirrored them.
            images = torch.from_dlpack(windows.as_tensor())
            operate(images, edits.operations, output)
            return images
        shape = (len(edits.size), output.size, output.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._workers.pinned)
        self._divided(len(images), _edit_part, images, windows, edits, output)
        return images

    def _divided(self, count: int, work: Callable[..., None], *arguments: Any) -> None:
        """Run ``work(part, *arguments)`` for all parts of a batch in the finishing threads."""
        parts = np.array_split(np.arange(count), self._workers.threads)
        for future in [self._finishers.submit(work, part, *arguments) for part in parts]:
            future.result()

    def _next_empty(self) -> Batch:
        if self._empty_batches == 0:
            raise StopIteration
        self._empty_batches -= 1
        return self._batch(torch.empty(0), np.empty(0, np.int64))

    def _batch(self, images: torch.Tensor, ids: npt.NDArray[np.int64]) -> Batch:
        labels = self._index.whole().labels[ids].astype(np.int64)
        return Batch(images, torch.from_numpy(labels), ids)

    def _stop(self) -> None:
        # The taker ends first, because the finishers still work on what it is taking.
        self._taker.shutdown(cancel_futures=True)
        self._finishers.shutdown()
        self._ahead.clear()
        self._pipeline = None
        self._stream.close()

    def close(self) -> None:
        self._empty_batches = 0
        self._stop()


def _edit_part(
    part: npt.NDArray[np.int64], images: torch.Tensor, windows: Any, edits: Edits, output: Output
) -> None:
    """Write the bytes of some images of a batch into (B, H, W, 3)."""
    # numpy copies in this thread; torch would divide the work among further threads.
    pixels = images.numpy()
    for k in part.tolist():
        pixels[k] = edited(torch.from_dlpack(windows[k]), edits, k, output).numpy()


def _transform_part(
    part: npt.NDArray[np.int64], images: torch.Tensor, transforms: Transforms
) -> None:
    """Apply user transforms to some samples of a batch, in place."""
    for k in part.tolist():
        for transform, draws in transforms:
            changed = transform.function(images[k].clone(), tuple(draws[k].tolist()))
            shape = getattr(changed, "shape", None)  # of None, too: a forgotten return
            if shape != images[k].shape:
                raise UserError(
                    f"data.transforms: {transform.name} changes a sample's shape from "
                    f"{tuple(images[k].shape)} to {shape and tuple(shape)}; it must keep the shape"
                )
            images[k] = changed


def _source(stream: Stream, in_work: deque[Inputs]) -> Source:
    """Make the callback that returns DALI's inputs and records the batches in work."""

    def source() -> tuple[Any, ...]:
        inputs, arrays = next(stream)
        in_work.append(inputs)
        return arrays

    return source


def _read_ahead(inputs: Iterator[Inputs], reader: SampleReader, workers: Workers) -> Stream:
    """Yield the inputs of each batch, in order, while the next batches are being read."""
    ahead: deque[tuple[Inputs, list[Future[list[npt.NDArray[Any]]]]]] = deque()
    pool = ThreadPoolExecutor(workers.threads, thread_name_prefix="tetdist-read")

    def read(batch: Inputs, part: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        samples = [(k, reader.read(int(batch.ids[k]))) for k in part.tolist()]
        return [data if batch.change is None else batch.change(k, data) for k, data in samples]

    def collect() -> tuple[Inputs, tuple[Any, ...]]:
        batch, parts = ahead.popleft()
        samples = [sample for part in parts for sample in part.result()]
        return batch, (samples, *(image_inputs(workers, batch.edits) if batch.edits else ()))

    try:
        for batch in inputs:
            parts = np.array_split(np.arange(len(batch.ids)), workers.threads)
            ahead.append((batch, [pool.submit(read, batch, part) for part in parts]))
            if len(ahead) > workers.prefetch:
                yield collect()
        while ahead:
            yield collect()
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _undecodable(index: Index, root: str | Path, ids: list[int]) -> UserError | None:
    """Make an error that names the samples that PIL cannot decode either; None without any."""
    bad = []
    for i in ids if index.kind == "images" else []:
        probe = probe_range(probe_image, root, index.byte_range(i), True)
        if isinstance(probe, str):
            bad.append(f"{index.path(i)} ({probe})")
        elif (probe.height, probe.width) != (index.heights[i], index.widths[i]):
            bad.append(f"{index.path(i)} (its size differs from the index)")
    if not bad:
        return None
    return UserError(
        f"files in {root} cannot be decoded: {', '.join(bad[:5])}{and_more(bad, 5)}; repair or"
        f" remove them, then index the data again with `{index.command(root)}`"
    )
