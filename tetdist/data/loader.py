"""Batches for training and evaluation: the one file that knows DALI.

order.py and transforms.py decide which samples, windows and changes make up a batch; threads read
them ahead (reader.py); DALI decodes the windows, in its own threads or on the GPU, and resizes them
on the GPU; threads do the rest (pixels.py), ahead of the consumer, too. None of these decides
anything, so a batch is a function of the run's configuration and the place in the run alone.
"""

import importlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from tetdist.data.auto_augment import Policy, auto_augment
from tetdist.data.index import Index
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
    edited,
    normalized,
)
from tetdist.data.probe import probe_image, probe_place
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
from tetdist.errors import UserError

NO_JITTER, NO_MIXING = ColorJitter(), Mixing()
_NAMED_FILES = 5


class Batch(NamedTuple):
    """B samples.

    Attributes:
        images: float32, (B, 3, H, W) in channels_last memory, or (B, T, 2, H, W) for events; on the
            loader's device.
        labels: int64, (B,), on the same device.
        ids: int64, (B,), numbers of the samples in the index.
        mix: how the images are to be mixed with each other (mixing.py); None: not at all.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: npt.NDArray[np.int64]
    mix: Mix | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank takes of the training, and from where on.

    Attributes:
        seed: of order and augmentation.
        global_batch: samples that all ranks together take in a step.
        micro_batch: samples in each batch of the loader.
        rank: this process's number.
        world_size: number of processes.
        epoch: the first batch's epoch.
        step_in_epoch: the first batch's step in that epoch.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    epoch: int
    step_in_epoch: int


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What a loader works with.

    Attributes:
        device: where the batches come out; "gpu" also decodes (DALI's mixed decoder) and resizes
            there.
        device_id: the GPU's number; None for the CPU.
        threads: threads that read, as many that decode, and as many that finish images. A thread
            that waits for a file does nothing else: slow storage needs more of them than there are
            cores.
        prefetch: batches that are worked on ahead of the consumer.
    """

    device: Literal["cpu", "gpu"]
    device_id: int | None
    threads: int
    prefetch: int


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
        index: the training split.
        root: the data root, to which the index's paths are relative.
        share: what this rank takes.
        workers: what does the work.
        image_size: height and width of what comes out.
        scale: least and greatest part of the image's area in a crop.
        ratio: least and greatest width / height of a crop.
        flip: probability of mirroring left to right.
        mean: of each channel, where white is 1.
        std: of each channel, likewise.
        interpolation: always antialiased.
        padding: instead of a crop by scale and ratio, one of `image_size` pixels from the image
            with so many black ones on each side; no image may be too small for it.
        policy: of AutoAugment.
        jitter: of the colours.
        cutout: side of a square that is 0 after normalisation.
        mixing: what the batches say about mixing; the images come unmixed.

    Raises:
        UserError: if DALI is not installed, or the batch sizes do not fit each other, the data or
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
        _image_graph(workers, interpolation),
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
        index: the split to evaluate.
        root: the data root.
        workers: what does the work.
        batch_size: samples in a batch, at most.
        rank: this process's number.
        world_size: number of processes.
        image_size: height and width of the crop, at most `resize`.
        resize: length of the shorter side before the crop.
        mean: of each channel, where white is 1.
        std: of each channel, likewise.
        interpolation: always antialiased.

    Raises:
        UserError: if DALI is not installed or the crop is larger than the resized image. Iterating
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
        _image_graph(workers, interpolation),
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
        index: the training split, of kind "events".
        root: the data root.
        share: what this rank takes.
        workers: what does the work.
        flip: probability of mirroring left to right.
        roll: shift by up to so many pixels, up or down and left or right, all timesteps of a sample
            alike; what leaves at one side comes in at the other.
        cutout: side of a square that is then emptied, at all timesteps alike.
        mixing: as in `train_batches`.

    Raises:
        UserError: as `train_batches`.
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
        _event_graph(workers, index),
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
        _event_graph(workers, index),
        workers,
        sample_shape=_frames_shape(index),
        max_batch=batch_size,
        empty_batches=_count_empty(batches),
    )


class _Inputs(NamedTuple):
    """What a batch is made from.

    Attributes:
        ids: (B,) sample numbers.
        arrays: DALI's inputs, each an array (B, ...) or a list of B arrays.
        edits: what becomes of images after that; None for events.
        mix: what the batch says about mixing.
    """

    ids: npt.NDArray[np.int64]
    arrays: tuple[npt.NDArray[Any] | list[npt.NDArray[Any]], ...]
    edits: Edits | None
    mix: Mix | None


_Stream = Generator[_Inputs, None, None]
# Gives the pipeline's inputs for the next batch, or raises StopIteration.
_Source = Callable[[], tuple[Any, ...]]
# Takes DALI's module and the source of its inputs, gives the node of the images.
_Graph = Callable[[Any, _Source], Any]


class Loader:
    """An iterator of `Batch`, to be used in a `with` statement or closed.

    Batches stay valid after that. It needs no closing after its end or an error.
    """

    def __init__(
        self,
        index: Index,
        root: str | Path,
        stream: _Stream,
        graph: _Graph,
        workers: Workers,
        *,
        sample_shape: tuple[int, ...],
        max_batch: int,
        empty_batches: int = 0,
        output: Output | None = None,
    ) -> None:
        dali = _import_dali()
        on_gpu = workers.device == "gpu"
        self._index = index
        self._root = root
        self._stream = stream
        self._workers = workers
        self._sample_shape = sample_shape
        self._empty_batches = empty_batches
        self._output = output
        self._device = torch.device(f"cuda:{workers.device_id}" if on_gpu else "cpu")
        self._in_work: deque[_Inputs] = deque()
        self._pipeline: Any = dali.Pipeline(
            batch_size=max_batch,
            num_threads=workers.threads,
            device_id=workers.device_id if on_gpu else None,
            prefetch_queue_depth=workers.prefetch,
            # The executor whose outputs outlive the next iteration: they need no copy.
            exec_dynamic=True,
        )
        with self._pipeline:
            # The source knows nothing of self: the cycle would keep DALI's threads beyond close().
            self._pipeline.set_outputs(graph(dali, _source(stream, self._in_work)))
        self._pipeline.build()
        # One thread takes batches from DALI and has them finished by others, ahead of the consumer.
        self._ahead: deque[Future[Batch | None]] = deque()
        self._taker = ThreadPoolExecutor(1, thread_name_prefix="tetdist-take")
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
        except (UserError, RuntimeError):
            self.close()
            raise
        if batch is None:
            self._stop()
            return self._next_empty()
        return batch

    def _take(self) -> Batch | None:
        """The next batch; None after the last one."""
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
        if inputs.edits is None:
            images = torch.from_dlpack(output.as_tensor())
        else:
            images = self._finished(output, inputs.edits)
        return self._batch(images, inputs.ids, inputs.mix)

    def _finished(self, windows: Any, edits: Edits) -> torch.Tensor:
        """(B, 3, H, W) in channels_last memory, from the decoded windows."""
        assert self._output is not None
        num_images, size = len(edits.size), self._output.size
        images = torch.empty(num_images, size, size, 3, device=self._device)
        parts = np.array_split(np.arange(num_images), self._workers.threads)
        work = [
            self._finishers.submit(_finish_part, windows, edits, self._output, images, part)
            for part in parts
        ]
        for future in work:
            future.result()
        return images.permute(0, 3, 1, 2)

    def _next_empty(self) -> Batch:
        if self._empty_batches == 0:
            raise StopIteration
        self._empty_batches -= 1
        images = torch.empty((0, *self._sample_shape), device=self._device)
        return self._batch(images, np.empty(0, np.int64))

    def _batch(
        self, images: torch.Tensor, ids: npt.NDArray[np.int64], mix: Mix | None = None
    ) -> Batch:
        labels = torch.from_numpy(self._index.labels[ids].astype(np.int64))
        return Batch(images, labels.to(self._device), ids, mix)

    def _stop(self) -> None:
        # In this order: what is being taken is still worked on.
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


def _import_dali() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ModuleNotFoundError as e:
        raise UserError(
            "DALI is not installed: pip install 'tetdist[cuda130]' (CUDA 13, or no GPU) or"
            " 'tetdist[cuda120]' (CUDA 12)"
        ) from e


def _image_graph(workers: Workers, interpolation: Interpolation) -> _Graph:
    """Decode windows, and resize them on a GPU: (H, W, 3) uint8, each of its own size."""

    def graph(dali: Any, source: _Source) -> Any:
        fn, types = dali.fn, dali.types
        on_gpu = workers.device == "gpu"
        encoded, corner, extent, *size = fn.external_source(
            source,
            num_outputs=4 if on_gpu else 3,
            dtype=[types.UINT8, types.INT32, types.INT32] + ([types.FLOAT] if on_gpu else []),
            ndim=[1, 1, 1] + ([1] if on_gpu else []),
            # The stream's arrays are nobody else's.
            no_copy=True,
        )
        windows = fn.decoders.image_slice(
            encoded,
            device="mixed" if on_gpu else "cpu",
            start=corner,
            shape=extent,
            axis_names="HW",
            # PIL does not turn images by their EXIF orientation, and the index has their sizes as
            # stored.
            adjust_orientation=False,
        )
        if not on_gpu:
            return windows
        filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        return fn.resize(windows, size=size[0], interp_type=filters[interpolation], antialias=True)

    return graph


def _finish_part(
    windows: Any, edits: Edits, output: Output, images: torch.Tensor, part: npt.NDArray[np.int64]
) -> None:
    """Write some images of a batch into (B, H, W, 3)."""
    for k in part.tolist():
        normalized(edited(torch.from_dlpack(windows[k]), edits, k, output), output, images[k])
        if edits.cutout is not None:
            cut_out(images[k].permute(2, 0, 1), edits.cutout[k])


def _event_graph(workers: Workers, index: Index) -> _Graph:
    """Copy frames to the device and make them float32."""

    def graph(dali: Any, source: _Source) -> Any:
        fn, types = dali.fn, dali.types
        stored = {"uint8": types.UINT8, "float16": types.FLOAT16}[str(index.dtype)]
        (frames,) = fn.external_source(source, num_outputs=1, dtype=[stored], ndim=[4])
        if workers.device == "gpu":
            frames = frames.gpu()
        return fn.cast(frames, dtype=types.FLOAT)

    return graph


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
        read: gives what the k-th sample's file makes of the pipeline's first input.
        arrays: the other inputs, each (B, ...).
        edits: what becomes of images after that.
        mix: what the batch says about mixing.
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
    """Inputs of `_image_graph` from windows (B, 4): top, left, height, width."""
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


def _read_ahead(readings: Iterator[_Reading], reader: SampleReader, workers: Workers) -> _Stream:
    """What the samples of each batch read, in order; the next batches are being read meanwhile."""
    ahead: deque[tuple[_Reading, list[Future[list[npt.NDArray[Any]]]]]] = deque()
    pool = ThreadPoolExecutor(workers.threads, thread_name_prefix="tetdist-read")

    def collect() -> _Inputs:
        reading, parts = ahead.popleft()
        first = [array for part in parts for array in part.result()]
        return _Inputs(reading.ids, (first, *reading.arrays), reading.edits, reading.mix)

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


def _source(stream: _Stream, in_work: deque[_Inputs]) -> _Source:
    """The callback by which DALI takes its inputs; it notes what DALI works on."""

    def source() -> tuple[Any, ...]:
        inputs = next(stream)
        in_work.append(inputs)
        return inputs.arrays

    return source


def _undecodable(index: Index, root: str | Path, ids: list[int]) -> UserError | None:
    """The error that names those of the samples that PIL does not decode either, if any."""
    bad = []
    for i in ids if index.kind == "images" else []:
        probe = probe_place(probe_image, root, index.place(i), True)
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
