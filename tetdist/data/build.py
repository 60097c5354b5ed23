"""Loaders of this process's batches, made from the configuration."""

from collections.abc import Callable
from functools import partial

import numpy as np

from tetdist.config.schema import RunConfig
from tetdist.config.sections.data import DataSection
from tetdist.data import batches, dali
from tetdist.data.delivery import DeviceBatches
from tetdist.data.loader import Batches, Loader
from tetdist.data.own_process import LoaderProcess
from tetdist.data.transforms import transforms_called
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.order import evaluation_batches, steps_per_epoch


def train_loader(config: RunConfig, index: Index, world: World, step: int) -> Batches:
    """Make an endless iterator of this process's training batches, beginning at a step.

    Args:
        step: Optimiser steps before the first batch.
    """
    batch = config.batch
    epoch, step_in_epoch = divmod(step, steps_per_epoch(len(index), batch.global_))
    share = batches.Share(
        seed=config.seed,
        global_batch=batch.global_,
        micro_batch=batch.micro,
        rank=world.rank,
        world_size=world.world_size,
        epoch=epoch,
        step_in_epoch=step_in_epoch,
        repeats=config.data.repeats,
    )
    make = partial(batches.train_batches, config.data, index, share, config.data.image_size)
    return _delivered(config.data, config.imports, world, make)


def _delivered(
    data: DataSection,
    imports: tuple[str, ...],
    world: World,
    make: Callable[[dali.Workers], Loader],
) -> Batches:
    """Make a loader for the run's device, in this process or in a separate one, which imports the
    user's files."""
    on_gpu = world.device.type == "cuda"
    decodes_there = data.device == "gpu"
    own_process = in_own_process(data, world)
    workers = dali.Workers(
        device=data.device,
        device_id=world.device.index if decodes_there else None,
        threads=data.threads,
        prefetch=data.prefetch,
        # User transforms take finished samples.
        raw=(on_gpu or own_process) and not data.transforms,
        pinned=on_gpu and not decodes_there and not own_process,
    )
    if not on_gpu and not own_process:
        return make(workers)
    source: Batches
    if own_process:
        source = LoaderProcess(partial(make, workers), imports, pinned=on_gpu)
    else:
        source = make(workers)
    return DeviceBatches(source, world.device)


def in_own_process(data: DataSection, world: World) -> bool:
    """Return whether a separate process loads data: its threads would delay kernel launches."""
    return world.device.type == "cuda" and data.device == "cpu"


def check_augmentation(data: DataSection, index: Index) -> None:
    """Check that all transforms exist and that crops fit into the training images."""
    transforms_called(data.transforms)
    if data.kind == "events" or data.crop == "resized":
        return
    sides = np.minimum(index.heights, index.widths)
    least = data.image_size - 2 * data.padding
    if sides.min() < least:
        i = int(sides.argmin())
        raise UserError(
            f"{index.path(i)} has {index.widths[i]}x{index.heights[i]} pixels; data.crop=padded "
            f"with data.padding={data.padding} needs sides of {least} or more for crops of "
            f"{data.image_size}; set data.crop=resized, or a smaller image size"
        )


def eval_loader(config: RunConfig, index: Index, world: World) -> Batches:
    """Make the iterator of this process's share of an evaluation on the split of ``index``."""
    ids = list(evaluation_batches(len(index), config.batch.eval, world.rank, world.world_size))
    # Transforms apply to training samples only.
    data = config.data.model_copy(update={"transforms": ()})
    return _delivered(data, (), world, partial(batches.eval_batches, data, index, ids))
