"""Batches for training and evaluation: the samples, windows and changes that make them up.

order.py and transforms.py decide all of it, so a batch is a function of the run's configuration and
of the step in the run alone. Threads read the samples ahead (reader.py).
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tetdist.data.dali import Workers, event_graph, image_graph
from tetdist.data.event_augment import EventAugmentation, EventChanges
from tetdist.data.image_augmentation import ImageAugmentation, augmented
from tetdist.data.loader import Inputs, Loader, Stream, Transforms
from tetdist.data.pixels import Edits, Output
from tetdist.data.transforms import (
    Mix,
    centre_crop,
    micro_batch_mix,
)
from tetdist.datasets.index import Index
from tetdist.datasets.reader import SampleReader
from tetdist.order import (
    evaluation_batches,
    micro_batch_positions,
    permutation,
    rank_micro_batches,
    repeated,
    steps_per_epoch,
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's part of the training, from some step on.

    Attributes:
        seed: Seed of order and augmentation.
        global_batch: Samples that all ranks together take in a step.
        micro_batch: Samples in each batch of the loader.
        rank: This process's number.
        world_size: Number of processes.
        epoch: The first batch's epoch.
        step_in_epoch: The first batch's step in that epoch.
        repeats: Times that a sample comes in a row; see `order.repeated`.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    epoch: int
    step_in_epoch: int
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationShare:
    """A rank's part of an evaluation.

    Attributes:
        batch_size: Samples in a batch, at most.
        rank: This process's number.
        world_size: Number of processes.
    """

    batch_size: int
    rank: int
    world_size: int


def train_batches(
    index: Index,
    root: str | Path,
    share: Share,
    workers: Workers,
    output: Output,
    augmentation: ImageAugmentation,
) -> Loader:
    """Make a loader of randomly changed images, epoch after epoch for ever.

    Args:
        index: The training split.
        root: The data root, to which the index's paths are relative.
        share: What this rank takes.
        workers: What does the work.
        output: What all images come out as.
        augmentation: How they are changed.

    Raises:
        UserError: DALI is not installed, or the batch sizes do not fit each other, the data or
            the number of processes. Iterating raises it for a file that does not read or decode.
    """

    def readings() -> Iterator[_Reading]:
        for epoch, positions, ids in micro_batches:
            window, edits = augmented(
                index, ids, share.seed, epoch, positions, output.size, augmentation
            )
            reading = _image_reading(reader, workers, ids, window, edits)
            size = output.size, output.size
            yield _with_draws(reading, share.seed, epoch, positions, size, augmentation)

    micro_batches = _micro_batches(len(index), share)
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(readings(), reader, workers),
        image_graph(workers, output),
        workers,
        sample_shape=(3, output.size, output.size),
        max_batch=share.micro_batch,
        output=output,
    )


def eval_batches(
    index: Index,
    root: str | Path,
    share: EvaluationShare,
    workers: Workers,
    output: Output,
    resize: int,
) -> Loader:
    """Make a loader of a rank's share of an evaluation, the centres of resized images.

    Over all ranks every sample comes once, and every rank gets the same number of batches; its last
    one may be smaller, or hold no sample at all.

    Args:
        index: The split to evaluate.
        root: The data root.
        share: What this rank takes.
        workers: What does the work.
        output: What all images come out as; its size is at most `resize`.
        resize: Length of the shorter side before the crop.

    Raises:
        UserError: DALI is not installed or the crop is larger than the resized image. Iterating
            raises it for a file that does not read or decode.
    """
    resized, start = centre_crop(index.heights, index.widths, resize, output.size)
    batches = _evaluation_batches(index, share)
    reader = SampleReader(index, root)

    def readings() -> Iterator[_Reading]:
        for ids in batches:
            if ids.size:
                # The window is the whole image, of the size that the index knows: the decoder fails
                # for an image that has become smaller.
                whole = np.stack([index.heights[ids], index.widths[ids]], axis=1)
                window = np.concatenate([np.zeros_like(whole), whole], axis=1)
                none = np.zeros(len(ids), bool)
                edits = Edits(size=resized[ids], corner=-start[ids], mirror=none, operations=[])
                yield _image_reading(reader, workers, ids, window, edits)

    return Loader(
        index,
        root,
        _read_ahead(readings(), reader, workers),
        image_graph(workers, output),
        workers,
        sample_shape=(3, output.size, output.size),
        max_batch=share.batch_size,
        empty_batches=_count_empty(batches),
        output=output,
    )


def event_train_batches(
    index: Index,
    root: str | Path,
    share: Share,
    workers: Workers,
    augmentation: EventAugmentation,
) -> Loader:
    """Make a loader of randomly changed event tensors, epoch after epoch for ever.

    Args:
        index: The training split, of kind "events".
        root: The data root.
        share: What this rank takes.
        workers: What does the work.
        augmentation: How the tensors are changed.

    Raises:
        UserError: As `train_batches`.
    """
    micro_batches = _micro_batches(len(index), share)
    reader, size = SampleReader(index, root), _frames_shape(index)[2:]

    def readings() -> Iterator[_Reading]:
        for epoch, positions, ids in micro_batches:
            changes = EventChanges(share.seed, epoch, positions, size, augmentation)
            reading = _event_reading(index, reader, ids, changes)
            yield _with_draws(reading, share.seed, epoch, positions, size, augmentation)

    return Loader(
        index,
        root,
        _read_ahead(readings(), reader, workers),
        event_graph(workers, index),
        workers,
        sample_shape=_frames_shape(index),
        max_batch=share.micro_batch,
    )


def event_eval_batches(
    index: Index, root: str | Path, share: EvaluationShare, workers: Workers
) -> Loader:
    """Make a loader of event tensors as they are stored, dealt out as by `eval_batches`."""
    batches = _evaluation_batches(index, share)
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(_as_stored(index, reader, batches), reader, workers),
        event_graph(workers, index),
        workers,
        sample_shape=_frames_shape(index),
        max_batch=share.batch_size,
        empty_batches=_count_empty(batches),
    )


class _MicroBatch(NamedTuple):
    """Samples of a micro-batch and their positions in the epoch's order; all (B,)."""

    epoch: int
    positions: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]


def _micro_batches(num_samples: int, share: Share) -> Iterator[_MicroBatch]:
    """Yield the micro-batches of a share, for ever."""
    mine = rank_micro_batches(share.rank, share.world_size, share.global_batch, share.micro_batch)
    steps = steps_per_epoch(num_samples, share.global_batch)
    assert share.step_in_epoch <= steps

    def walk(epoch: int, first_step: int) -> Iterator[_MicroBatch]:
        while True:
            order = permutation(num_samples, share.seed, epoch)
            for step in range(first_step, steps):
                for i in mine:
                    positions = micro_batch_positions(
                        step, i, share.global_batch, share.micro_batch
                    )
                    places = repeated(
                        positions, share.repeats, share.global_batch, share.micro_batch
                    )
                    yield _MicroBatch(epoch, positions, order[places])
            epoch, first_step = epoch + 1, 0

    # This is a generator of its own, so that the checks above are made now and not at the first
    # batch.
    return walk(share.epoch, share.step_in_epoch)


def _evaluation_batches(index: Index, share: EvaluationShare) -> list[npt.NDArray[np.int64]]:
    return list(evaluation_batches(len(index), share.batch_size, share.rank, share.world_size))


def _count_empty(batches: list[npt.NDArray[np.int64]]) -> int:
    return sum(ids.size == 0 for ids in batches)


class _Reading(NamedTuple):
    """A batch of samples to be read.

    Attributes:
        ids: (B,) sample numbers.
        read: Gives what the k-th sample's file makes of the pipeline's first input.
        arrays: The other inputs, each (B, ...).
        edits: What becomes of images after that.
        mix: What the batch says about mixing.
        transforms: What finished samples go through in the end, with its draws (B, n).
    """

    ids: npt.NDArray[np.int64]
    read: Callable[[int], npt.NDArray[Any]]
    arrays: tuple[npt.NDArray[Any], ...] = ()
    edits: Edits | None = None
    mix: Mix | None = None
    transforms: Transforms = ()


def _with_draws(
    reading: _Reading,
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    size: tuple[int, int],
    augmentation: ImageAugmentation | EventAugmentation,
) -> _Reading:
    """Add to a reading of samples (..., *size) how they are mixed, and transforms' draws."""
    mixing, mix = augmentation.mixing, None
    if mixing.is_on:
        mix = micro_batch_mix(seed, epoch, positions, size, mixing)
    drawn = tuple((t, t.draws(seed, epoch, positions)) for t in augmentation.transforms)
    return reading._replace(mix=mix, transforms=drawn)


def _image_reading(
    reader: SampleReader,
    workers: Workers,
    ids: npt.NDArray[np.int64],
    window: npt.NDArray[np.int32],
    edits: Edits,
) -> _Reading:
    """Make the inputs of `image_graph` from windows (B, 4): top, left, height, width."""
    # DALI takes no views with strides.
    arrays = [np.ascontiguousarray(window[:, :2]), np.ascontiguousarray(window[:, 2:])]
    if workers.device == "gpu":
        arrays += [
            edits.size.astype(np.float32),
            -edits.corner.astype(np.int32),
            edits.mirror.astype(np.int32),
        ]
    return _Reading(ids, lambda k: reader.read(int(ids[k])), tuple(arrays), edits)


def _event_reading(
    index: Index, reader: SampleReader, ids: npt.NDArray[np.int64], changes: EventChanges
) -> _Reading:
    """Samples to be read and changed."""
    # DALI has no roll with wrap-around; one made of its concatenations and slices would take longer
    # than numpy does.
    return _Reading(ids, lambda k: changes.of(k, _read_frames(index, reader, int(ids[k]))))


def _as_stored(
    index: Index, reader: SampleReader, batches: list[npt.NDArray[np.int64]]
) -> Iterator[_Reading]:
    """Samples to be read and no more."""

    def reading(ids: npt.NDArray[np.int64]) -> _Reading:
        return _Reading(ids, lambda k: _read_frames(index, reader, int(ids[k])))

    return (reading(ids) for ids in batches if ids.size)


def _frames_shape(index: Index) -> tuple[int, int, int, int]:
    assert index.kind == "events"
    assert index.timesteps is not None
    return index.timesteps, 2, int(index.heights[0]), int(index.widths[0])


def _read_frames(index: Index, reader: SampleReader, i: int) -> npt.NDArray[Any]:
    """Read the frames (T, 2, H, W) of a sample.

    The index has verified that the file is a header and nothing but these.
    """
    data = reader.read(i)
    shape, dtype = _frames_shape(index), np.dtype(index.dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(data, dtype, offset=len(data) - num_bytes).reshape(shape)


def _read_ahead(readings: Iterator[_Reading], reader: SampleReader, workers: Workers) -> Stream:
    """Yield what each batch is made from, in order, while the next batches are being read."""
    ahead: deque[tuple[_Reading, list[Future[list[npt.NDArray[Any]]]]]] = deque()
    pool = ThreadPoolExecutor(workers.threads, thread_name_prefix="tetdist-read")

    def collect() -> Inputs:
        reading, parts = ahead.popleft()
        first = [array for part in parts for array in part.result()]
        return Inputs(
            reading.ids,
            (first, *reading.arrays),
            reading.edits,
            reading.mix,
            reading.transforms,
        )

    try:
        for reading in readings:
            parts = np.array_split(np.arange(len(reading.ids)), workers.threads)
            ahead.append((reading, [pool.submit(_read_part, reading, part) for part in parts]))
            if len(ahead) > workers.prefetch:
                yield collect()
        while ahead:
            yield collect()
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _read_part(reading: _Reading, part: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    return [reading.read(int(k)) for k in part]
