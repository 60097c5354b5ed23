"""The batches that this process gets, made from the configuration."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import assert_never

import numpy as np

from tetdist.config.rand_augment import rand_augment
from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.config.sections.data import DataSection
from tetdist.data import batches, dali, loader
from tetdist.data.auto_augment import Policy
from tetdist.data.delivery import Batches, DeviceBatches
from tetdist.data.erasing import Erasing
from tetdist.data.event_augment import EventAugmentation
from tetdist.data.image_augmentation import ImageAugmentation
from tetdist.data.own_process import LoaderProcess
from tetdist.data.pixels import Output
from tetdist.data.rand_augment import RandomPolicy
from tetdist.data.transforms import TRANSFORMS, ColorJitter, Mixing, Transform
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError


def train_loader(
    config: RunConfig, index: Index, share: batches.Share, world: World, image_size: int
) -> Batches:
    """Make the iterator of this process's training batches from ``share`` on, for ever.

    Args:
        image_size: Height and width of images; events come as they are stored.

    Raises:
        UserError: Decoding on a GPU is asked for where the model runs on the CPU, or the data do
            not suit the batch sizes.
    """
    _transforms(config.data)
    return _delivered(config, world, partial(_train_batches, config.data, index, share, image_size))


def _train_batches(
    data: DataSection,
    index: Index,
    share: batches.Share,
    image_size: int,
    workers: dali.Workers,
) -> loader.Loader:
    mixing = Mixing(data.mixup, data.cutmix, **data.mixing.model_dump())
    transforms = _transforms(data)
    match data.kind:
        case "events":
            return batches.event_train_batches(
                index,
                data.root,
                share,
                workers,
                EventAugmentation(
                    flip=data.flip,
                    roll=data.roll,
                    policy=None if data.event_augment == "none" else data.event_augment,
                    drop=data.event_drop,
                    cutout=data.cutout,
                    mixing=mixing,
                    transforms=transforms,
                ),
            )
        case "images":
            augmentation = ImageAugmentation(
                scale=data.scale,
                ratio=data.ratio,
                flip=data.flip,
                padding=_padding(data),
                policy=_policy(data.auto_augment),
                jitter=ColorJitter(**data.color_jitter.model_dump()),
                cutout=data.cutout,
                erasing=Erasing(**data.erasing.model_dump()),
                mixing=mixing,
                transforms=transforms,
            )
            output = _output(data, image_size)
            return batches.train_batches(index, data.root, share, workers, output, augmentation)
        case _:
            assert_never(data.kind)


def _delivered(
    config: RunConfig, world: World, make: Callable[[dali.Workers], loader.Loader]
) -> Batches:
    """Have a loader of this run made, here or in a process of its own, for the run's device."""
    data, on_gpu = config.data, world.device.type == "cuda"
    if data.device == "gpu" and not on_gpu:
        raise UserError("data.device=gpu needs a GPU, and this run is on the CPU; set it to cpu")
    decodes_there = data.device == "gpu"
    if decodes_there and (data.own_process or data.transforms):
        key = "own_process" if data.own_process else "transforms"
        raise UserError(f"data.{key}: is for decoding on the CPU; leave it out, or data.device=gpu")
    own_process = data.own_process
    if own_process is None:
        own_process = on_gpu and not decodes_there
    workers = dali.Workers(
        device=data.device,
        device_id=world.device.index if decodes_there else None,
        threads=data.threads,
        prefetch=data.prefetch,
        # Transforms of one's own are given finished samples.
        raw=(on_gpu or own_process) and not data.transforms,
        pinned=on_gpu and not decodes_there and not own_process,
    )
    if not on_gpu and not own_process:
        return make(workers)
    source: Batches
    if own_process:
        source = LoaderProcess(partial(make, workers), config.imports, pinned=on_gpu)
    else:
        source = make(workers)
    return DeviceBatches(source, world.device)


def _padding(data: DataSection) -> int | None:
    match data.crop:
        case "padded":
            return data.padding
        case "resized":
            return None
        case _:
            assert_never(data.crop)


def _policy(text: str) -> Policy | RandomPolicy | None:
    match text:
        case "none":
            return None
        case "cifar10" | "imagenet" | "trivial" | "3a" as policy:
            return policy
        case _:
            return rand_augment(text)


def _output(data: DataSection, size: int) -> Output:
    return Output(size=size, mean=data.mean, std=data.std, interpolation=data.interpolation)


def _transforms(data: DataSection) -> tuple[Transform, ...]:
    repeated = [name for name, times in Counter(data.transforms).items() if times > 1]
    if repeated:
        # Both would get the same random numbers.
        raise UserError(f"data.transforms: {repeated[0]!r} is there twice; name each once")
    return tuple(TRANSFORMS[name] for name in data.transforms)


def check_augmentation(config: RunConfig, index: Index) -> None:
    """Make sure that all transforms are known and all phases' crops fit into the training images.

    Raises:
        UserError: No transform is registered by a name of data.transforms, or an image is too small
            for data.crop=padded.
    """
    data = config.data
    _transforms(data)
    padding = _padding(data)
    if data.kind == "events" or padding is None:
        return
    largest = max(max(phase_image_sizes(config, phase)) for phase in config.phases)
    sides = np.minimum(index.heights, index.widths)
    least = largest - 2 * padding
    if sides.min() < least:
        i = int(sides.argmin())
        raise UserError(
            f"{index.path(i)} has {index.widths[i]}x{index.heights[i]} pixels and data.crop=padded "
            f"needs {least} of each side for crops of {largest} with data.padding={padding}; "
            "set data.crop=resized, or a smaller image size"
        )


def eval_loader(config: RunConfig, index: Index, world: World) -> Batches:
    """Make the iterator of this process's share of an evaluation on the split of ``index``.

    Raises:
        UserError: Decoding on a GPU is asked for where the model runs on the CPU.
    """
    share = batches.EvaluationShare(
        batch_size=config.batch.eval, rank=world.rank, world_size=world.world_size
    )
    # Only training samples go through transforms.
    without = config.model_copy(
        update={"data": config.data.model_copy(update={"transforms": ()}), "imports": ()}
    )
    return _delivered(without, world, partial(_eval_batches, without.data, index, share))


def _eval_batches(
    data: DataSection, index: Index, share: batches.EvaluationShare, workers: dali.Workers
) -> loader.Loader:
    match data.kind:
        case "events":
            return batches.event_eval_batches(index, data.root, share, workers)
        case "images":
            output = _output(data, data.image_size)
            return batches.eval_batches(index, data.root, share, workers, output, data.resize_side)
        case _:
            assert_never(data.kind)
