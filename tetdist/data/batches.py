"""Batches for training and evaluation: the samples, windows and changes that make them up.

order.py and transforms.py determine all of it, so a batch is a function of the run's configuration
and step alone.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tetdist.config.sections.data import DataSection
from tetdist.data.dali import Workers
from tetdist.data.event_augment import EventChanges
from tetdist.data.image_augmentation import augmented
from tetdist.data.loader import Inputs, Loader
from tetdist.data.pixels import Edits, Output, Rest
from tetdist.data.transforms import centre_crop, micro_batch_mix, transforms_called
from tetdist.datasets.index import Index
from tetdist.order import (
    micro_batch_positions,
    permutation,
    rank_micro_batches,
    repeated,
    steps_per_epoch,
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's part of the training, beginning at some step.

    Attributes:
        global_batch: Samples per step of all ranks together.
        epoch: The first batch's epoch.
        step_in_epoch: The first batch's step in that epoch.
        repeats: Number of copies of each sample; see `order.repeated`.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    epoch: int
    step_in_epoch: int
    repeats: int = 1


def train_batches(
    data: DataSection, index: Index, share: Share, image_size: int, workers: Workers
) -> Loader:
    """Make an endless loader of randomly changed samples, epoch after epoch.

    Args:
        image_size: Height and width of images; events keep their stored size.

    Raises:
        UserError: DALI is not installed, a transform is not registered, or the batch sizes do not
            fit each other, the data or the number of processes. Iterating raises it for a file that
            does not read or decode.
    """
    output = _output(data, image_size)
    size = (image_size, image_size) if output else index.frames_shape[2:]
    transforms = transforms_called(data.transforms)
    micro_batches = _micro_batches(len(index), share)

    def all_inputs() -> Iterator[Inputs]:
        for epoch, positions, ids in micro_batches:
            place = share.seed, epoch, positions
            if output is None:
                inputs = _events(index, ids, EventChanges(*place, size, data))
            else:
                inputs = Inputs(ids, *augmented(index, ids, *place, output, data))
            yield inputs._replace(
                mix=micro_batch_mix(*place, size, data),
                transforms=tuple((t, t.draws(*place)) for t in transforms),
            )

    return Loader(index, data.root, all_inputs(), workers, output, max_batch=share.micro_batch)


def eval_batches(
    data: DataSection, index: Index, batches: Sequence[npt.NDArray[np.int64]], workers: Workers
) -> Loader:
    """Make a loader of samples without random changes: images are resized and centre-cropped.

    Args:
        batches: Sample numbers of each batch; see `order.evaluation_batches`. The last ones may be
            empty.

    Raises:
        UserError: DALI is not installed or the crop is larger than the resized image. Iterating
            raises it for a file that does not read or decode.
    """
    some = [ids for ids in batches if ids.size]
    output = _output(data, data.image_size)
    if output is None:
        all_inputs = (_events(index, ids) for ids in some)
    else:
        sizes = index.whole().heights, index.widths
        resized, start = centre_crop(*sizes, data.resize_side, output.size)
        # The window is the whole image, of the index's size: the decoder fails if the image has
        # become smaller.
        whole = np.stack(sizes, axis=1)
        window = np.concatenate([np.zeros_like(whole), whole], axis=1)
        none, rest = np.zeros(len(index), bool), Rest(output)
        all_inputs = (
            Inputs(ids, Edits(window[ids], resized[ids], -start[ids], none[ids]), rest)
            for ids in some
        )
    return Loader(
        index,
        data.root,
        all_inputs,
        workers,
        output,
        max_batch=max((len(ids) for ids in some), default=1),
        empty_batches=len(batches) - len(some),
    )


def _output(data: DataSection, size: int) -> Output | None:
    """Return the format of all images; None for stored events."""
    if data.kind == "events":
        return None
    return Output(
        size=size,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        events=data.images_as_events,
    )


_MicroBatch = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _micro_batches(num_samples: int, share: Share) -> Iterator[_MicroBatch]:
    """Yield epoch, positions in its order (B,), and sample numbers (B,) of a share, endlessly."""
    mine = rank_micro_batches(share.rank, share.world_size, share.global_batch, share.micro_batch)
    steps = steps_per_epoch(num_samples, share.global_batch)
    assert share.step_in_epoch <= steps

    def walk(first_step: int) -> Iterator[_MicroBatch]:
        orders = _orders(num_samples, share.seed, share.epoch)
        for epoch, order in enumerate(orders, share.epoch):
            for step in range(first_step, steps):
                for i in mine:
                    positions = micro_batch_positions(
                        step, i, share.global_batch, share.micro_batch
                    )
                    places = repeated(
                        positions, share.repeats, share.global_batch, share.micro_batch
                    )
                    yield epoch, positions, order[places]
            first_step = 0

    # The generator is a separate function, so that the checks above run now, not at the first
    # batch.
    return walk(share.step_in_epoch)


def _orders(num_samples: int, seed: int, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the orders of an epoch and of all later ones, each computed during the one before.

    With ten million samples it takes seconds, in which no batch would be prepared.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tetdist-order") as thread:
        order = permutation(num_samples, seed, epoch)
        while True:
            epoch += 1
            following = thread.submit(permutation, num_samples, seed, epoch)
            yield order
            order = following.result()


def _events(
    index: Index, ids: npt.NDArray[np.int64], changes: EventChanges | None = None
) -> Inputs:
    shape, dtype = index.frames_shape, np.dtype(index.dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize

    def frames(k: int, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        # The index has verified that the file holds a header and the frames only.
        sample = np.frombuffer(data, dtype, offset=len(data) - num_bytes).reshape(shape)
        # DALI has no roll with wrap-around; composed of its concatenations and slices, it would be
        # slower than numpy.
        return sample if changes is None else changes.of(k, sample)

    return Inputs(ids, change=frames)
