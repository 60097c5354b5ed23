"""Random changes of training images: which there are, and what becomes of each sample."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from tetdist.data.auto_augment import Policy, auto_augment
from tetdist.data.erasing import Erasing, erased
from tetdist.data.pixels import Edits
from tetdist.data.rand_augment import (
    RANDOM_POLICY,
    RandomPolicy,
    num_draws,
    random_operations,
)
from tetdist.data.transforms import (
    NO_MIXING,
    ColorJitter,
    Mixing,
    Transform,
    color_jitter,
    cutout_boxes,
    flips,
    image_draws,
    padded_crop,
    random_resized_crop,
)
from tetdist.datasets.index import Index
from tetdist.order import uniforms

NO_JITTER, NO_ERASING = ColorJitter(), Erasing()


@dataclass(frozen=True, kw_only=True)
class ImageAugmentation:
    """Random changes of training images.

    After the crop come the flip, the policy's operations, the colours, normalisation, the cutout,
    the erasing, and the transforms.

    Attributes:
        scale: Least and greatest part of the image's area in a crop.
        ratio: Least and greatest width / height of a crop.
        flip: Probability of mirroring left to right.
        padding: Instead of a crop by scale and ratio, one of the output's size from the image with
            so many black pixels on each side; no image may be too small for it.
        policy: AutoAugment's, or one that nobody searched for; None for none.
        jitter: Reach of the changes of colour.
        cutout: Side of a square that is 0 after normalisation.
        erasing: Rectangles that are replaced after that.
        mixing: What the batches say about mixing; the images come unmixed.
        transforms: Transforms of one's own, in their order.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    padding: int | None = None
    policy: Policy | RandomPolicy | None = None
    jitter: ColorJitter = NO_JITTER
    cutout: int = 0
    erasing: Erasing = NO_ERASING
    mixing: Mixing = NO_MIXING
    transforms: tuple[Transform, ...] = ()


def augmented(
    index: Index,
    ids: npt.NDArray[np.int64],
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    image_size: int,
    augmentation: ImageAugmentation,
) -> tuple[npt.NDArray[np.int32], Edits]:
    """Windows (B, 4) of the images at some positions of an epoch, and what becomes of them.

    Args:
        index: The training split.
        ids: (B,) sample numbers.
        seed: Of augmentation.
        epoch: Counted from 0.
        positions: (B,) in the epoch's order.
        image_size: Height and width that they come out with.
        augmentation: How they are changed.
    """
    draws = image_draws(seed, epoch, positions)
    heights, widths = index.heights[ids], index.widths[ids]
    if augmentation.padding is None:
        window = random_resized_crop(
            heights, widths, draws.crop, augmentation.scale, augmentation.ratio
        )
        size = np.full((len(ids), 2), image_size, np.int32)
        corner = np.zeros_like(size)
    else:
        window, corner = padded_crop(
            heights, widths, draws.crop[:, :2], augmentation.padding, image_size
        )
        size = window[:, 2:]
    operations = []
    match augmentation.policy:
        case None:
            pass
        case "cifar10" | "imagenet" as policy:
            operations.append(auto_augment(draws.auto_augment, policy, image_size))
        case policy:
            own_draws = uniforms(seed, epoch, positions, num_draws(policy), RANDOM_POLICY)
            operations.append(random_operations(own_draws, policy, image_size))
    if any(augmentation.jitter):
        operations.append(color_jitter(draws.color_jitter, augmentation.jitter))
    side, erasing = augmentation.cutout, augmentation.erasing
    return window, Edits(
        size=size,
        corner=corner,
        mirror=flips(draws.flip[:, 0], augmentation.flip),
        operations=[list(chain(*of_a_sample)) for of_a_sample in zip(*operations, strict=True)],
        cutout=cutout_boxes(draws.cutout, image_size, image_size, side) if side else None,
        erased=erased(seed, epoch, positions, image_size, erasing) if erasing.probability else None,
    )
