"""The data that a trained network is evaluated on."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.config.loading import command_for, parse
from tetdist.config.schema import RunConfig
from tetdist.data.splits import evaluated_split, open_data, open_split
from tetdist.datasets.class_folders import folders_called
from tetdist.datasets.index import Index, check_root, index_file
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.wording import and_more, counted


def evaluation_config(
    raw: dict[str, Any],
    source: str,
    data: Mapping[str, Any] | None = None,
    **changed: Any,
) -> RunConfig:
    """Return the training's configuration with changed keys, without what only affects training.

    Args:
        raw: The training's configuration, which another program may have written.
        source: The checkpoint, for messages.
        data: Changed keys of its section data, checked by the caller.
        changed: Other changed keys, checked by the caller; None: as in the training.
    """
    config = parse(raw, source, only_used=True)
    values = {key: value for key, value in changed.items() if value is not None}
    on_cpu = config.data.model_copy(update={"device": "cpu", **(data or {})})
    always = {"recompute": "none", "execution": "fused", "data": on_cpu}
    return config.model_copy(update=always | values)


def open_evaluated(config: RunConfig, split: str | None, world: World, *, own_data: bool) -> Index:
    """Return the index of a split; None: val, or without one the samples that the run held out.

    Args:
        own_data: The data are the training's, so that its held-out samples are known.
    """
    data = config.data
    file = index_file(data.index_dir, split or "val")
    # Exports have the root data; runs have an absolute one.
    if own_data and data.root == "data" and not file.is_file():
        raise UserError("this network's file does not name its data; give --data FOLDER")
    check_root(Path(data.root), command_for(config.name, data.root), "give --data FOLDER")
    indexed = [one for one in ("train", "val") if index_file(data.index_dir, one).is_file()]
    if file.is_file() or indexed != ["train"] or Path(data.root, split or "val").is_dir():
        return open_split(config.data, split or "val", world)
    if split is not None or not own_data or not data.held_out:
        flags = " and ".join(["--split"] * (split is not None) + ["--data"] * (not own_data))
        other = f"; without {flags}, the run's held-out samples are taken" if data.held_out else ""
        alternative = (*folders_called(Path(data.root), "val"), "train, the training samples")[0]
        raise UserError(
            f"there is no {split or 'validation'} split in {data.root}; add val/ and index it, or "
            f"give --split {alternative}{other}"
        )
    held = open_data(config, world)[1]
    return dataclasses.replace(held, split=evaluated_split(config.data, config.seed) or held.split)


def with_classes_of_model(
    index: Index, trained: list[str] | None, num_classes: int | None, source: str
) -> Index:
    """Return the index with all classes of the model, and labels among them.

    Args:
        index: A split, which may have only some of the classes; they are found by name.
        trained: Names of the network's classes; None: unknown.
        num_classes: Number of the network's classes, if the configuration sets it.
    """
    present = index.classes
    if trained is None:
        # The weights were converted from a file that does not name the classes.
        if num_classes != len(present):
            raise UserError(
                f"the data has {counted(len(present), 'class')}, but {source} has {num_classes} "
                "and does not name them; pass the data set that it was trained on with --data"
            )
        return index
    unknown = sorted(set(present) - set(trained))
    if unknown:
        raise UserError(
            f"the data has other classes than {source} was trained on, such as {unknown[0]}; it "
            f"knows {', '.join(trained[:10])}{and_more(trained, 10)}; give its data with --data"
        )
    labels = np.array([trained.index(name) for name in present], np.int32)[index.labels]
    return dataclasses.replace(index, classes=tuple(trained), labels=labels)
