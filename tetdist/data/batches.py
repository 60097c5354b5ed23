"""Batches for training and evaluation: which samples, windows and changes make them up.

order.py and transforms.py decide all of it, so a batch is a function of the run's configuration and
of the step in the run alone. Threads read the samples ahead (reader.py).
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tetdist.data.auto_augment import Policy, auto_augment
from tetdist.data.dali import Workers, event_graph, image_graph
from tetdist.data.index import Index
from tetdist.data.loader import Inputs, Loader, Stream
from tetdist.data.order import (
    evaluation_batches,
    micro_batch_positions,
    permutation,
    rank_micro_batches,
    steps_per_epoch,
)
from tetdist.data.pixels import (
    Channels,
    Edits,
    Interpolation,
    Output,
    cut_out,
)
from tetdist.data.reader import SampleReader
from tetdist.data.transforms import (
    ColorJitter,
    EventDraws,
    ImageDraws,
    Mix,
    Mixing,
    Operation,
    centre_crop,
    color_jitter,
    cutout_boxes,
    event_draws,
    flip_and_roll,
    flips,
    image_draws,
    mixes,
    mixing_draws,
    padded_crop,
    random_resized_crop,
    shifts,
)

NO_JITTER, NO_MIXING = ColorJitter(), Mixing()


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank takes of the training, and from where on.

    Attributes:
        seed: Of order and augmentation.
        global_batch: Samples that all ranks together take in a step.
        micro_batch: Samples in each batch of the loader.
        rank: This process's number.
        world_size: Number of processes.
        epoch: The first batch's epoch.
        step_in_epoch: The first batch's step in that epoch.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    epoch: int
    step_in_epoch: int


def train_batches(
    index: Index,
    root: str | Path,
    share: Share,
    workers: Workers,
    *,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    mean: Channels,
    std: Channels,
    interpolation: Interpolation,
    padding: int | None = None,
    policy: Policy | None = None,
    jitter: ColorJitter = NO_JITTER,
    cutout: int = 0,
    mixing: Mixing = NO_MIXING,
) -> "Loader":
    """Randomly cropped and otherwise changed images, epoch after epoch for ever.

    After the crop come the flip, AutoAugment, the colours, normalisation, and the cutout.

    Args:
        index: The training split.
        root: The data root, to which the index's paths are relative.
        share: What this rank takes.
        workers: What does the work.
        image_size: Height and width of what comes out.
        scale: Least and greatest part of the image's area in a crop.
        ratio: Least and greatest width / height of a crop.
        flip: Probability of mirroring left to right.
        mean: Of each channel, where white is 1.
        std: Of each channel, likewise.
        interpolation: Always antialiased.
        padding: Instead of a crop by scale and ratio, one of `image_size` pixels from the image
            with so many black ones on each side; no image may be too small for it.
        policy: Of AutoAugment.
        jitter: Of the colours.
        cutout: Side of a square that is 0 after normalisation.
        mixing: What the batches say about mixing; the images come unmixed.

    Raises:
        UserError: If DALI is not installed, or the batch sizes do not fit each other, the data or
            the number of processes. Iterating raises it for a file that does not read or decode.
    """
    output = Output(size=image_size, mean=mean, std=std, interpolation=interpolation)

    def edits(draws: ImageDraws, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], Edits]:
        heights, widths = index.heights[ids], index.widths[ids]
        if padding is None:
            window = random_resized_crop(heights, widths, draws.crop, scale, ratio)
            size = np.full((len(ids), 2), image_size, np.int32)
            corner = np.zeros_like(size)
        else:
            window, corner = padded_crop(heights, widths, draws.crop[:, :2], padding, image_size)
            size = window[:, 2:]
        return window, Edits(
            size=size,
            corner=corner,
            mirror=flips(draws.flip[:, 0], flip),
            operations=_operations(draws, policy, jitter, image_size),
            cutout=cutout_boxes(draws.cutout, image_size, image_size, cutout) if cutout else None,
        )

    def readings() -> Iterator[_Reading]:
        for epoch, positions, ids in places:
            window, changes = edits(image_draws(share.seed, epoch, positions), ids)
            mix = _mix(share.seed, epoch, positions, (image_size, image_size), mixing)
            yield _image_reading(reader, workers, ids, window, changes, mix)

    places = _training_places(len(index), share)
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(readings(), reader, workers),
        image_graph(workers, interpolation),
        workers,
        sample_shape=(3, image_size, image_size),
        max_batch=share.micro_batch,
        output=output,
    )


def _operations(
    draws: ImageDraws, policy: Policy | None, jitter: ColorJitter, image_size: int
) -> list[list[Operation]]:
    """AutoAugment's and then the colours' of each sample; empty if there are none of any."""
    kinds = []
    if policy:
        kinds.append(auto_augment(draws.auto_augment, policy, image_size))
    if any(jitter):
        kinds.append(color_jitter(draws.color_jitter, jitter))
    return [list(chain(*of_a_sample)) for of_a_sample in zip(*kinds, strict=True)]


def eval_batches(
    index: Index,
    root: str | Path,
    workers: Workers,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    image_size: int,
    resize: int,
    mean: Channels,
    std: Channels,
    interpolation: Interpolation,
) -> "Loader":
    """A rank's share of an evaluation: the shorter side resized, the centre cropped.

    Over all ranks every sample comes once, and every rank gets the same number of batches; its last
    one may be smaller, or hold no sample at all.

    Args:
        index: The split to evaluate.
        root: The data root.
        workers: What does the work.
        batch_size: Samples in a batch, at most.
        rank: This process's number.
        world_size: Number of processes.
        image_size: Height and width of the crop, at most `resize`.
        resize: Length of the shorter side before the crop.
        mean: Of each channel, where white is 1.
        std: Of each channel, likewise.
        interpolation: Always antialiased.

    Raises:
        UserError: If DALI is not installed or the crop is larger than the resized image. Iterating
            raises it for a file that does not read or decode.
    """
    resized, start = centre_crop(index.heights, index.widths, resize, image_size)
    batches = list(evaluation_batches(len(index), batch_size, rank, world_size))
    reader = SampleReader(index, root)

    def readings() -> Iterator[_Reading]:
        for ids in batches:
            if ids.size:
                # The whole image, of the size that the index knows: one that has become smaller is
                # an error of the decoder.
                whole = np.stack([index.heights[ids], index.widths[ids]], axis=1)
                window = np.concatenate([np.zeros_like(whole), whole], axis=1)
                none = np.zeros(len(ids), bool)
                edits = Edits(size=resized[ids], corner=-start[ids], mirror=none, operations=[])
                yield _image_reading(reader, workers, ids, window, edits)

    return Loader(
        index,
        root,
        _read_ahead(readings(), reader, workers),
        image_graph(workers, interpolation),
        workers,
        sample_shape=(3, image_size, image_size),
        max_batch=batch_size,
        empty_batches=_count_empty(batches),
        output=Output(size=image_size, mean=mean, std=std, interpolation=interpolation),
    )


def event_train_batches(
    index: Index,
    root: str | Path,
    share: Share,
    workers: Workers,
    *,
    flip: float,
    roll: int,
    cutout: int = 0,
    mixing: Mixing = NO_MIXING,
) -> "Loader":
    """Randomly flipped and shifted event tensors, epoch after epoch for ever.

    Args:
        index: The training split, of kind "events".
        root: The data root.
        share: What this rank takes.
        workers: What does the work.
        flip: Probability of mirroring left to right.
        roll: Shift by up to so many pixels, up or down and left or right, all timesteps of a sample
            alike; what leaves at one side comes in at the other.
        cutout: Side of a square that is then emptied, at all timesteps alike.
        mixing: As in `train_batches`.

    Raises:
        UserError: As `train_batches`.
    """
    places = _training_places(len(index), share)
    reader = SampleReader(index, root)

    def readings() -> Iterator[_Reading]:
        for epoch, positions, ids in places:
            draws = event_draws(share.seed, epoch, positions)
            mix = _mix(share.seed, epoch, positions, _frames_shape(index)[2:], mixing)
            yield _event_reading(index, reader, ids, draws, flip, roll, cutout)._replace(mix=mix)

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
    index: Index,
    root: str | Path,
    workers: Workers,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
) -> "Loader":
    """A rank's share of an evaluation on event tensors as they are, dealt out as `eval_batches`."""
    batches = list(evaluation_batches(len(index), batch_size, rank, world_size))
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(_as_stored(index, reader, batches), reader, workers),
        event_graph(workers, index),
        workers,
        sample_shape=_frames_shape(index),
        max_batch=batch_size,
        empty_batches=_count_empty(batches),
    )


class _Place(NamedTuple):
    """Samples of a micro-batch and their positions in the epoch's order; all (B,)."""

    epoch: int
    positions: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]


def _training_places(num_samples: int, share: Share) -> Iterator[_Place]:
    """The micro-batches of a share, for ever."""
    mine = rank_micro_batches(share.rank, share.world_size, share.global_batch, share.micro_batch)
    steps = steps_per_epoch(num_samples, share.global_batch)
    assert share.step_in_epoch <= steps

    def walk(epoch: int, first_step: int) -> Iterator[_Place]:
        while True:
            order = permutation(num_samples, share.seed, epoch)
            for step in range(first_step, steps):
                for i in mine:
                    positions = micro_batch_positions(
                        step, i, share.global_batch, share.micro_batch
                    )
                    yield _Place(epoch, positions, order[positions])
            epoch, first_step = epoch + 1, 0

    # A generator of its own, so that the checks above are made now and not at the first batch.
    return walk(share.epoch, share.step_in_epoch)


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
    """

    ids: npt.NDArray[np.int64]
    read: Callable[[int], npt.NDArray[Any]]
    arrays: tuple[npt.NDArray[Any], ...] = ()
    edits: Edits | None = None
    mix: Mix | None = None


def _mix(
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    size: tuple[int, int],
    mixing: Mixing,
) -> Mix | None:
    if not any(mixing):
        return None
    return mixes(mixing_draws(seed, epoch, positions), *size, mixing)


def _image_reading(
    reader: SampleReader,
    workers: Workers,
    ids: npt.NDArray[np.int64],
    window: npt.NDArray[np.int32],
    edits: Edits,
    mix: Mix | None = None,
) -> _Reading:
    """Inputs of `image_graph` from windows (B, 4): top, left, height, width."""
    # DALI takes no views with strides.
    arrays = [np.ascontiguousarray(window[:, :2]), np.ascontiguousarray(window[:, 2:])]
    if workers.device == "gpu":
        arrays.append(edits.size.astype(np.float32))
    return _Reading(ids, lambda k: reader.read(int(ids[k])), tuple(arrays), edits, mix)


def _event_reading(
    index: Index,
    reader: SampleReader,
    ids: npt.NDArray[np.int64],
    draws: EventDraws,
    flip: float,
    roll: int,
    cutout: int,
) -> _Reading:
    """Samples to be read, flipped, rolled and cut out."""
    mirror, shift = flips(draws.flip[:, 0], flip), shifts(draws.roll, roll)
    boxes = cutout_boxes(draws.cutout, *_frames_shape(index)[2:], cutout)

    # DALI has no roll with wrap-around: made of its concatenations and slices it takes longer than
    # this does in numpy.
    def read(k: int) -> npt.NDArray[Any]:
        frames = _read_frames(index, reader, int(ids[k]))
        frames = flip_and_roll(frames, bool(mirror[k]), int(shift[k, 0]), int(shift[k, 1]))
        cut_out(frames, boxes[k])
        return frames

    return _Reading(ids, read)


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
    """(T, 2, H, W); the index has verified that the file is a header and nothing but these."""
    data = reader.read(i)
    shape, dtype = _frames_shape(index), np.dtype(index.dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(data, dtype, offset=len(data) - num_bytes).reshape(shape)


def _read_ahead(readings: Iterator[_Reading], reader: SampleReader, workers: Workers) -> Stream:
    """What the samples of each batch read, in order; the next batches are being read meanwhile."""
    ahead: deque[tuple[_Reading, list[Future[list[npt.NDArray[Any]]]]]] = deque()
    pool = ThreadPoolExecutor(workers.threads, thread_name_prefix="tetdist-read")

    def collect() -> Inputs:
        reading, parts = ahead.popleft()
        first = [array for part in parts for array in part.result()]
        return Inputs(reading.ids, (first, *reading.arrays), reading.edits, reading.mix)

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
