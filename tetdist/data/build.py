"""From the configuration to the pipeline: which batches this process gets."""

import numpy as np

from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.data import batches, dali, loader
from tetdist.data.index import Index
from tetdist.data.transforms import ColorJitter, Mixing
from tetdist.distributed.world import World
from tetdist.errors import UserError


def train_loader(
    config: RunConfig, index: Index, share: batches.Share, world: World, image_size: int
) -> loader.Loader:
    """This process's training batches from ``share`` on, for ever.

    Args:
        image_size: Height and width of images; events come as they are stored.
    """
    data, workers = config.data, loader_workers(config, world)
    mixing = Mixing(data.mixup, data.cutmix)
    if data.kind == "events":
        return batches.event_train_batches(
            index,
            data.root,
            share,
            workers,
            flip=data.flip,
            roll=data.roll,
            cutout=data.cutout,
            mixing=mixing,
        )
    return batches.train_batches(
        index,
        data.root,
        share,
        workers,
        image_size=image_size,
        scale=data.scale,
        ratio=data.ratio,
        flip=data.flip,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        padding=data.padding if data.crop == "padded" else None,
        policy=None if data.auto_augment == "none" else data.auto_augment,
        jitter=ColorJitter(**data.color_jitter.model_dump()),
        cutout=data.cutout,
        mixing=mixing,
    )


def check_crops(config: RunConfig, index: Index) -> None:
    """Whether all phases' crops fit into the training images.

    Raises:
        UserError: An image is too small for data.crop=padded.
    """
    data = config.data
    if data.kind == "events" or data.crop != "padded":
        return
    largest = max(max(phase_image_sizes(config, phase)) for phase in config.phases)
    sides = np.minimum(index.heights, index.widths)
    least = largest - 2 * data.padding
    if sides.min() < least:
        i = int(sides.argmin())
        raise UserError(
            f"{index.path(i)} has {index.widths[i]}x{index.heights[i]} pixels and data.crop=padded "
            f"needs {least} of each side for crops of {largest} with data.padding={data.padding}; "
            "set data.crop=resized, or a smaller image size"
        )


def eval_loader(config: RunConfig, index: Index, world: World) -> loader.Loader:
    """This process's share of an evaluation on the split of ``index``."""
    data, workers = config.data, loader_workers(config, world)
    batch_size, rank, world_size = config.batch.eval, world.rank, world.world_size
    if data.kind == "events":
        return batches.event_eval_batches(
            index, data.root, workers, batch_size=batch_size, rank=rank, world_size=world_size
        )
    return batches.eval_batches(
        index,
        data.root,
        workers,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        image_size=data.image_size,
        resize=data.resize_side,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
    )


def loader_workers(config: RunConfig, world: World) -> dali.Workers:
    """Who decodes, and where.

    Raises:
        UserError: Decoding on a GPU is asked for where the model runs on the CPU.
    """
    on_gpu = config.data.device == "gpu"
    if on_gpu and world.device.type != "cuda":
        raise UserError("data.device=gpu needs a GPU, and this run is on the CPU; set it to cpu")
    return dali.Workers(
        device=config.data.device,
        device_id=world.device.index if on_gpu else None,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )
