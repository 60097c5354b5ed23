"""Random changes of training images, drawn for each sample.

The order is: crop, flip, the policy's operations, colour jitter, normalisation (or conversion to
events), cutout, erasing, the user's transforms.
"""

from itertools import chain
from typing import assert_never

import numpy as np
import numpy.typing as npt

from tetdist.config.rand_augment import rand_augment
from tetdist.config.sections.data import DataSection
from tetdist.data import images_as_events
from tetdist.data.auto_augment import auto_augment
from tetdist.data.erasing import erased
from tetdist.data.pixels import Edits, Output, Rest
from tetdist.data.rand_augment import RANDOM_POLICY, RandomPolicy, num_draws, random_operations
from tetdist.data.transforms import (
    color_jitter,
    cutout_boxes,
    image_draws,
    padded_crop,
    random_resized_crop,
)
from tetdist.datasets.index import Index
from tetdist.order import uniforms


def augmented(
    index: Index,
    ids: npt.NDArray[np.int64],
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    output: Output,
    data: DataSection,
) -> tuple[Edits, Rest]:
    """Draw the changes of the images at some positions of an epoch.

    Args:
        ids: (B,) sample numbers.
        positions: (B,) in the epoch's order.
    """
    draws, side = image_draws(seed, epoch, positions), output.size
    sizes = index.whole().heights[ids], index.widths[ids]
    match data.crop:
        case "resized":
            window = random_resized_crop(*sizes, draws.crop, data.scale, data.ratio)
            size = np.full((len(ids), 2), side, np.int32)
            corner = np.zeros_like(size)
        case "padded":
            window, corner = padded_crop(*sizes, draws.crop[:, :2], data.padding, side)
            size = window[:, 2:]
        case _:
            assert_never(data.crop)
    operations = []
    match data.auto_augment:
        case "none":
            pass
        case "cifar10" | "imagenet" as searched:
            operations.append(auto_augment(draws.auto_augment, searched, side))
        case text:
            policy = _random_policy(text)
            own_draws = uniforms(seed, epoch, positions, num_draws(policy), RANDOM_POLICY)
            operations.append(random_operations(own_draws, policy, side))
    if any(data.color_jitter):
        operations.append(color_jitter(draws.color_jitter, data.color_jitter))
    edits = Edits(
        window=window,
        size=size,
        corner=corner,
        mirror=draws.flip[:, 0] < data.flip,
        operations=[list(chain(*of_a_sample)) for of_a_sample in zip(*operations, strict=True)],
    )
    boxes = cutout_boxes(draws.cutout, side, side, data.cutout) if data.cutout else None
    gone = erased(seed, epoch, positions, side, data.erasing) if data.erasing.probability else None
    places = images_as_events.places(seed, epoch, positions) if data.images_as_events else None
    return edits, Rest(output, boxes, gone, places)


def _random_policy(text: str) -> RandomPolicy:
    match text:
        case "trivial" | "3a" as policy:
            return policy
        case _:
            return rand_augment(text)
