"""Batches for training and evaluation: the one file that knows DALI.

order.py and transforms.py decide which samples, windows and flips make up a batch; threads read
them ahead (reader.py); DALI decodes and resizes, in its own threads or on the GPU. It decides
nothing, so a batch is a function of the run's configuration and the place in the run alone.
"""

import importlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from tetdist.data.index import Index
from tetdist.data.order import (
    evaluation_batches,
    micro_batch_positions,
    permutation,
    rank_micro_batches,
    steps_per_epoch,
    uniforms,
)
from tetdist.data.probe import probe_image, probe_place
from tetdist.data.reader import SampleReader
from tetdist.data.transforms import (
    RANDOM_RESIZED_CROP_DRAWS,
    centre_region,
    flip_and_roll,
    flips,
    random_resized_crop,
    shifts,
)
from tetdist.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]
Channels = tuple[float, float, float]

_NAMED_FILES = 5


class Batch(NamedTuple):
    """B samples.

    Attributes:
        images: float32, (B, 3, H, W) in channels_last memory, or (B, T, 2, H, W) for events; on the
            loader's device.
        labels: int64, (B,), on the same device.
        ids: int64, (B,), numbers of the samples in the index.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: npt.NDArray[np.int64]


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
        threads: threads that read, and on the CPU decode and resize. A thread that waits for a
            file does nothing else: slow storage needs more of them than there are cores.
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
) -> "Loader":
    """Randomly cropped, resized and flipped images, epoch after epoch for ever.

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

    Raises:
        UserError: if DALI is not installed, or the batch sizes do not fit each other, the data or
            the number of processes. Iterating raises it for a file that does not read or decode.
    """
    places = _training_places(len(index), share)
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(_crops(index, reader, places, share.seed, scale, ratio, flip), reader, workers),
        _train_graph(workers, image_size, mean, std, interpolation),
        workers,
        sample_shape=(3, image_size, image_size),
        max_batch=share.micro_batch,
    )


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
    regions = centre_region(index.heights, index.widths, resize, image_size)
    batches = list(evaluation_batches(len(index), batch_size, rank, world_size))
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(_regions(index, reader, batches, regions), reader, workers),
        _eval_graph(workers, image_size, mean, std, interpolation),
        workers,
        sample_shape=(3, image_size, image_size),
        max_batch=batch_size,
        empty_batches=_count_empty(batches),
    )


def event_train_batches(
    index: Index, root: str | Path, share: Share, workers: Workers, *, flip: float, roll: int
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

    Raises:
        UserError: as `train_batches`.
    """
    places = _training_places(len(index), share)
    reader = SampleReader(index, root)
    return Loader(
        index,
        root,
        _read_ahead(_rolled(index, reader, places, share.seed, flip, roll), reader, workers),
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
    """What DALI makes a batch from.

    Attributes:
        ids: (B,) sample numbers.
        arrays: the pipeline's inputs, each an array (B, ...) or a list of B arrays.
    """

    ids: npt.NDArray[np.int64]
    arrays: tuple[npt.NDArray[Any] | list[npt.NDArray[Any]], ...]


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
    ) -> None:
        dali = _import_dali()
        on_gpu = workers.device == "gpu"
        self._index = index
        self._root = root
        self._stream = stream
        self._sample_shape = sample_shape
        self._empty_batches = empty_batches
        self._device = torch.device(f"cuda:{workers.device_id}" if on_gpu else "cpu")
        self._ids_in_work: deque[npt.NDArray[np.int64]] = deque()
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
            self._pipeline.set_outputs(graph(dali, _source(stream, self._ids_in_work)))
        self._pipeline.build()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            return self._next_empty()
        try:
            (output,) = self._pipeline.run()
        except StopIteration:
            self._stop()
            return self._next_empty()
        except UserError:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            ids = [int(i) for batch in self._ids_in_work for i in batch]
            named = _undecodable(self._index, self._root, ids)
            if named is not None:
                raise named from error
            error.add_note(
                "PIL decodes all files that DALI had in work: "
                + ", ".join(self._index.path(i) for i in ids)
            )
            raise
        images = torch.from_dlpack(output.as_tensor())
        if self._index.kind == "images":
            images = images.permute(0, 3, 1, 2)
        return self._batch(images, self._ids_in_work.popleft())

    def _next_empty(self) -> Batch:
        if self._empty_batches == 0:
            raise StopIteration
        self._empty_batches -= 1
        images = torch.empty((0, *self._sample_shape), device=self._device)
        return self._batch(images, np.empty(0, np.int64))

    def _batch(self, images: torch.Tensor, ids: npt.NDArray[np.int64]) -> Batch:
        labels = torch.from_numpy(self._index.labels[ids].astype(np.int64))
        return Batch(images, labels.to(self._device), ids)

    def _stop(self) -> None:
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


def _train_graph(
    workers: Workers, image_size: int, mean: Channels, std: Channels, interpolation: Interpolation
) -> _Graph:
    """Decode a window, resize it, flip: (H, W, 3) float32."""

    def graph(dali: Any, source: _Source) -> Any:
        fn, types = dali.fn, dali.types
        encoded, corner, size, mirror = fn.external_source(
            source,
            num_outputs=4,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 0],
        )
        images = _decode(dali, workers, encoded, corner, size)
        images = fn.resize(images, **_resizing(dali, image_size, interpolation))
        return fn.crop_mirror_normalize(images, mirror=mirror, **_normalising(dali, mean, std))

    return graph


def _eval_graph(
    workers: Workers, image_size: int, mean: Channels, std: Channels, interpolation: Interpolation
) -> _Graph:
    """Decode the whole image, resize a region of it: (H, W, 3) float32."""

    def graph(dali: Any, source: _Source) -> Any:
        fn, types = dali.fn, dali.types
        encoded, size, start, end = fn.external_source(
            source,
            num_outputs=4,
            dtype=[types.UINT8, types.INT32, types.FLOAT, types.FLOAT],
            ndim=[1, 1, 1, 1],
        )
        # Resizing a region outside the image is a segmentation fault. Asking for the size that the
        # index knows makes an image that has become smaller an error of the decoder instead.
        images = _decode(dali, workers, encoded, (0, 0), size)
        images = fn.resize(
            images, roi_start=start, roi_end=end, **_resizing(dali, image_size, interpolation)
        )
        return fn.crop_mirror_normalize(images, **_normalising(dali, mean, std))

    return graph


def _decode(dali: Any, workers: Workers, encoded: Any, corner: Any, size: Any) -> Any:
    """Decode a window of an image file; what follows works where this puts its output."""
    return dali.fn.decoders.image_slice(
        encoded,
        device="mixed" if workers.device == "gpu" else "cpu",
        start=corner,
        shape=size,
        axis_names="HW",
        # PIL does not turn images by their EXIF orientation, and the index has their sizes as
        # stored.
        adjust_orientation=False,
    )


def _resizing(dali: Any, image_size: int, interpolation: Interpolation) -> dict[str, Any]:
    types = dali.types
    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    return {
        "size": (image_size, image_size),
        "interp_type": filters[interpolation],
        "antialias": True,
    }


def _normalising(dali: Any, mean: Channels, std: Channels) -> dict[str, Any]:
    return {
        "mean": [255 * x for x in mean],
        "std": [255 * x for x in std],
        "output_layout": "HWC",
        "dtype": dali.types.FLOAT,
    }


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
    """

    ids: npt.NDArray[np.int64]
    read: Callable[[int], npt.NDArray[Any]]
    arrays: tuple[npt.NDArray[Any], ...] = ()


def _crops(
    index: Index,
    reader: SampleReader,
    places: Iterator[_Place],
    seed: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> Iterator[_Reading]:
    """Inputs of `_train_graph`."""
    for epoch, positions, ids in places:
        draws = uniforms(seed, epoch, positions, RANDOM_RESIZED_CROP_DRAWS + 1)
        window = random_resized_crop(
            index.heights[ids], index.widths[ids], draws[:, :-1], scale, ratio
        )
        mirror = flips(draws[:, -1], flip).astype(np.int32)
        yield _encoded(reader, ids, (*_halves(window), mirror))


def _regions(
    index: Index,
    reader: SampleReader,
    batches: list[npt.NDArray[np.int64]],
    regions: npt.NDArray[np.float32],
) -> Iterator[_Reading]:
    """Inputs of `_eval_graph`."""
    for ids in batches:
        if ids.size:
            size = np.stack([index.heights[ids], index.widths[ids]], axis=1)
            yield _encoded(reader, ids, (size, *_halves(regions[ids])))


def _encoded(
    reader: SampleReader, ids: npt.NDArray[np.int64], arrays: tuple[npt.NDArray[Any], ...]
) -> _Reading:
    return _Reading(ids, lambda k: reader.read(int(ids[k])), arrays)


def _halves(quadruples: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    # DALI takes no views with strides.
    return np.ascontiguousarray(quadruples[:, :2]), np.ascontiguousarray(quadruples[:, 2:])


def _rolled(
    index: Index,
    reader: SampleReader,
    places: Iterator[_Place],
    seed: int,
    flip: float,
    roll: int,
) -> Iterator[_Reading]:
    """Samples to be read, flipped and rolled."""
    for epoch, positions, ids in places:
        draws = uniforms(seed, epoch, positions, 3)
        yield _rolled_reading(
            index, reader, ids, flips(draws[:, 0], flip), shifts(draws[:, 1:], roll)
        )


def _rolled_reading(
    index: Index,
    reader: SampleReader,
    ids: npt.NDArray[np.int64],
    mirror: npt.NDArray[np.bool_],
    shift: npt.NDArray[np.int32],
) -> _Reading:
    # DALI has no roll with wrap-around: made of its concatenations and slices it takes longer than
    # this does in numpy.
    def read(k: int) -> npt.NDArray[Any]:
        frames = _read_frames(index, reader, int(ids[k]))
        return flip_and_roll(frames, bool(mirror[k]), int(shift[k, 0]), int(shift[k, 1]))

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
        return _Inputs(reading.ids, (first, *reading.arrays))

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


def _source(stream: _Stream, ids_in_work: deque[npt.NDArray[np.int64]]) -> _Source:
    """The callback by which DALI takes its inputs; it notes what DALI works on."""

    def source() -> tuple[Any, ...]:
        ids, arrays = next(stream)
        ids_in_work.append(ids)
        return arrays

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
