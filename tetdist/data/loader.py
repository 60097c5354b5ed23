"""An iterator of batches: DALI decodes what batches.py describes, and threads finish it.

Whatever DALI leaves to do is done by threads (pixels.py), ahead of the consumer.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from tetdist.data.batch_operations import operate
from tetdist.data.dali import Graph, Source, Workers, import_dali
from tetdist.data.erasing import Erased, erase
from tetdist.data.pixels import Edits, Output, cut_out, edited, normalized
from tetdist.data.transfer import taker
from tetdist.data.transforms import Mix, Transform
from tetdist.datasets.index import Index
from tetdist.datasets.probe import probe_image, probe_range
from tetdist.errors import UserError

_NAMED_FILES = 5


class Rest(NamedTuple):
    """Work left to do on a raw batch of images: `tetdist.data.pixels.finished`.

    Attributes:
        output: Scale of the images.
        cutout: (B, 4) boxes that are then 0; None: none.
        erased: What is erased after that; None: nothing.
    """

    output: Output
    cutout: npt.NDArray[np.int32] | None
    erased: Erased | None


class Batch(NamedTuple):
    """A batch of B samples.

    Attributes:
        images: Float32, (B, 3, H, W) in channels_last memory, or (B, T, 2, H, W) for events. Of a
            raw batch bytes (B, H, W, 3), or (B, T, 2, H, W) as they are stored.
        labels: Int64, (B,).
        ids: Int64, (B,), numbers of the samples in the index.
        mix: How the images are to be mixed with each other (mixing.py); None: not at all.
        rest: What a raw batch of images lacks; None: nothing.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: npt.NDArray[np.int64]
    mix: Mix | None = None
    rest: Rest | None = None


Transforms = tuple[tuple[Transform, npt.NDArray[np.float64]], ...]


class Inputs(NamedTuple):
    """Inputs of DALI and of the finishing threads for one batch.

    Attributes:
        ids: (B,) sample numbers.
        arrays: DALI's inputs, each an array (B, ...) or a list of B arrays.
        edits: What becomes of images after that; None for events.
        mix: What the batch says about mixing.
        transforms: What finished samples go through in the end, with its draws (B, n).
    """

    ids: npt.NDArray[np.int64]
    arrays: tuple[npt.NDArray[Any] | list[npt.NDArray[Any]], ...]
    edits: Edits | None
    mix: Mix | None
    transforms: Transforms


Stream = Generator[Inputs, None, None]


class Loader:
    """An iterator of `Batch`, to be used in a `with` statement or closed.

    Batches stay valid after that. It needs no closing after its end or an error.
    """

    def __init__(
        self,
        index: Index,
        root: str | Path,
        stream: Stream,
        graph: Graph,
        workers: Workers,
        *,
        sample_shape: tuple[int, ...],
        max_batch: int,
        empty_batches: int = 0,
        output: Output | None = None,
    ) -> None:
        dali = import_dali()
        on_gpu = workers.device == "gpu"
        self._index = index
        self._root = root
        self._stream = stream
        self._workers = workers
        self._sample_shape = sample_shape
        self._empty_batches = empty_batches
        self._output = output
        self._device = torch.device(f"cuda:{workers.device_id}" if on_gpu else "cpu")
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
            # The source knows nothing of self: the cycle would keep DALI's threads beyond close().
            self._pipeline.set_outputs(graph(dali, _source(stream, self._in_work)))
        self._pipeline.build()
        # One thread takes batches from DALI and has them finished by others, ahead of the consumer.
        self._ahead: deque[Future[Batch | None]] = deque()
        self._taker = taker(self._device, "tetdist-take")
        self._finishers = ThreadPoolExecutor(workers.threads, thread_name_prefix="tetdist-finish")

    def __iter__(self) -> Self:
        return self

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
        inputs, rest = self._in_work.popleft(), None
        if inputs.edits is None:
            images = torch.from_dlpack(output.as_tensor())
            if self._workers.pinned:
                images = images.pin_memory()
        elif self._workers.raw:
            assert self._output is not None
            images = self._edited(output, inputs.edits, self._output)
            rest = Rest(self._output, inputs.edits.cutout, inputs.edits.erased)
        else:
            assert self._output is not None
            images = self._finished(output, inputs.edits, self._output)
        if inputs.transforms:
            self._divided(len(images), _transform_part, images, inputs.transforms)
        return self._batch(images, inputs.ids)._replace(mix=inputs.mix, rest=rest)

    def _finished(self, windows: Any, edits: Edits, output: Output) -> torch.Tensor:
        """Finish decoded windows: (B, 3, H, W) in channels_last memory."""
        images = torch.empty(len(edits.size), output.size, output.size, 3)
        self._divided(len(images), _finish_part, images, windows, edits, output)
        return images.permute(0, 3, 1, 2)

    def _edited(self, windows: Any, edits: Edits, output: Output) -> torch.Tensor:
        """Do what changes bytes to decoded windows: (B, H, W, 3)."""
        if self._device.type == "cuda":
            # DALI has brought them to their size and mirrored them.
            images = torch.from_dlpack(windows.as_tensor())
            operate(images, edits.operations, output.resampling)
            # Whoever takes the batch has another stream.
            torch.cuda.current_stream(self._device).synchronize()
            return images
        shape = (len(edits.size), output.size, output.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._workers.pinned)
        self._divided(len(images), _edit_part, images, windows, edits, output)
        return images

    def _divided(self, count: int, work: Callable[..., None], *arguments: Any) -> None:
        """Have the finishing threads do ``work(part, *arguments)`` for all parts of a batch."""
        parts = np.array_split(np.arange(count), self._workers.threads)
        for future in [self._finishers.submit(work, part, *arguments) for part in parts]:
            future.result()

    def _next_empty(self) -> Batch:
        if self._empty_batches == 0:
            raise StopIteration
        self._empty_batches -= 1
        return self._batch(torch.empty(0, *self._sample_shape), np.empty(0, np.int64))

    def _batch(self, images: torch.Tensor, ids: npt.NDArray[np.int64]) -> Batch:
        return Batch(images, torch.from_numpy(self._index.labels[ids].astype(np.int64)), ids)

    def _stop(self) -> None:
        # The taker ends first, because the finishers still work on what it is taking.
        self._taker.shutdown(cancel_futures=True)
        self._finishers.shutdown()
        self._ahead.clear()
        self._pipeline = None
        self._stream.close()

    def close(self) -> None:
        """End the pipeline and its threads, whether or not all batches were taken."""
        self._empty_batches = 0
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finish_part(
    part: npt.NDArray[np.int64], images: torch.Tensor, windows: Any, edits: Edits, output: Output
) -> None:
    """Write some images of a batch into (B, H, W, 3)."""
    for k in part.tolist():
        normalized(edited(torch.from_dlpack(windows[k]), edits, k, output), output, images[k])
        if edits.cutout is not None:
            cut_out(images[k].permute(2, 0, 1), edits.cutout[k])
        if edits.erased is not None:
            erase(images[k].numpy(), edits.erased, k)


def _edit_part(
    part: npt.NDArray[np.int64], images: torch.Tensor, windows: Any, edits: Edits, output: Output
) -> None:
    """Write the bytes of some images of a batch into (B, H, W, 3)."""
    # numpy copies in this thread; torch would divide the work among threads of its own.
    pixels = images.numpy()
    for k in part.tolist():
        pixels[k] = edited(torch.from_dlpack(windows[k]), edits, k, output).numpy()


def _transform_part(
    part: npt.NDArray[np.int64], images: torch.Tensor, transforms: Transforms
) -> None:
    """Send some samples of a batch through transforms of one's own, in place."""
    for k in part.tolist():
        for transform, draws in transforms:
            changed = transform.function(images[k].clone(), tuple(draws[k].tolist()))
            if changed.shape != images[k].shape:
                raise UserError(
                    f"data.transforms: {transform.name} makes a sample of shape"
                    f" {tuple(changed.shape)} out of {tuple(images[k].shape)}; it must keep the"
                    " shape"
                )
            images[k] = changed


def _source(stream: Stream, in_work: deque[Inputs]) -> Source:
    """Make the callback by which DALI takes its inputs; it notes what DALI works on."""

    def source() -> tuple[Any, ...]:
        inputs = next(stream)
        in_work.append(inputs)
        return inputs.arrays

    return source


def _undecodable(index: Index, root: str | Path, ids: list[int]) -> UserError | None:
    """Make an error that names those of the samples that PIL does not decode either, if any."""
    bad = []
    for i in ids if index.kind == "images" else []:
        probe = probe_range(probe_image, root, index.byte_range(i), True)
        if isinstance(probe, str):
            bad.append(f"{index.path(i)} ({probe})")
        elif (probe.height, probe.width) != (index.heights[i], index.widths[i]):
            bad.append(f"{index.path(i)} (its size is not the index's any more)")
    if not bad:
        return None
    more = f" and {len(bad) - _NAMED_FILES} more" if len(bad) > _NAMED_FILES else ""
    return UserError(
        f"files in {root} do not decode: {', '.join(bad[:_NAMED_FILES])}{more}; mend or remove"
        f" them, then index the data again with `{index.command(root)}`"
    )
