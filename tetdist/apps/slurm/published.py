"""Sizes of published data sets, all that a plan needs if the data are not on this machine."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.config.schema import RunConfig
from tetdist.datasets.index import Index
from tetdist.errors import UserError

# Training images, validation images and classes, by the name of the data's folder.
SIZES = {
    "imagenet": (1_281_167, 50_000, 1000),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
}


def indexes(config: RunConfig, images: int | None) -> tuple[Index, Index] | None:
    """Return indexes of a published or given size, without files; None: read the data's own."""
    root = Path(config.data.root)
    if images is not None and config.data.kind == "events":
        raise UserError(
            "--images does not apply to recordings, whose index the plan reads; leave it out"
        )
    if images is None and (root.is_dir() or config.data.kind == "events"):
        return None
    if images is None and root.name not in SIZES:
        raise UserError(
            f"data.root: there is no folder {root}; set data.root=FOLDER, or give the plan the "
            "number of training images: --images N"
        )
    train, val, classes = SIZES.get(root.name, (0, 0, 1000))
    train = images or train
    if config.data.held_out:
        val = round(config.data.held_out * train)
        train -= val
    return _without_files(train, classes), _without_files(val, classes)


def _without_files(images: int, classes: int) -> Index:
    nothing: Any = np.zeros(0, np.int64)
    values = {field.name: nothing for field in fields(Index)}
    values |= {"kind": "images", "timesteps": None, "labels": np.zeros(images, np.int32)}
    return Index(**values | {"classes": tuple(map(str, range(classes)))})
