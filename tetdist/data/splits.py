"""The splits of a run, checked against their files, the configuration and each other."""

from tetdist.config.schema import RunConfig
from tetdist.config.sections.data import DataSection
from tetdist.data.build import check_augmentation
from tetdist.datasets import held_out, recorded_split
from tetdist.datasets import index as data_index
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError


def open_data(config: RunConfig, world: World) -> tuple[Index, Index]:
    """Return the indexes of the training and evaluation samples, checked against the files and each
    other: two splits, or two parts of the training split (`held_out`)."""
    train = open_split(config.data, "train", world)
    if config.data.held_out:
        train, val = held_out.divide(
            train, config.data.held_out, config.seed, _recordings(config.data, train)
        )
    else:
        val = open_split(config.data, "val", world)
    if train.classes != val.classes:
        raise UserError(f"train/ and val/ of {config.data.root} must have the same classes")
    frames = train.frames(config.data)
    for number, most in enumerate(phase.most_timesteps for phase in config.phases):
        if frames is not None and most > frames[0]:
            raise UserError(
                f"phases.{number}.timesteps: {most} exceeds the {frames[0]} time bins of the data "
                f"in {config.data.root}; set phases.{number}.timesteps={frames[0]} or less"
            )
    check_augmentation(config.data, train)
    num_classes, least = config.model.num_classes, len(train.classes)
    if num_classes is not None and num_classes < least:
        raise UserError(
            f"model.num_classes={num_classes} is below the data's {least} classes; raise it"
        )
    evaluated_split(config.data, config.seed)  # so that planning a run reports damage, too
    return train, val


def _recordings(data: DataSection, index: Index) -> list[str] | None:
    """Return the recording that each sample was cut from; None if none was cut."""
    known = recorded_split.recordings_of(data.root) if data.kind == "events" else None
    if known is None:
        return None
    keys = [index.path(i).partition("/")[2].removesuffix(".npy") for i in range(len(index))]
    return [known.get(key, key) for key in keys]


def evaluated_split(data: DataSection, seed: int) -> str | None:
    """Return the name of the evaluated samples: one of several splits of the data set, or a
    held-out part of training; None for the only validation split."""
    recorded, share = recorded_split.recorded_split(data.root), data.held_out
    return held_out.name(share, seed, recorded) if share else recorded


def open_split(data: DataSection, split: str, world: World) -> Index:
    """Return the index of one split, checked against its files."""
    file = data_index.find_index(data, split)
    index = data_index.load_index(file)
    if world.rank == 0:
        data_index.check_fresh(index, data.root, file)
    if index.kind != data.kind:
        recipe = "dvs128_objects" if index.kind == "events" else "own_images"
        raise UserError(
            f"data.kind is {data.kind}, but {file} holds {index.kind}; give a folder of "
            f"{data.kind}, or train with a recipe for {index.kind}, such as {recipe}.yaml"
        )
    return index
