"""The parameters of augmentation and evaluation, computed for a batch with numpy.

The rules are torchvision's, so that published recipes keep their meaning. Random numbers come from
order.py, and pixels.py applies the parameters. Windows are in pixels of the image as stored, rows
before columns.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tetdist.config.sections.data import DataSection
from tetdist.errors import UserError
from tetdist.order import MIXING, transform_stream, uniforms
from tetdist.plugins import Registry

_TRIES = 10
RANDOM_RESIZED_CROP_DRAWS = 2 * _TRIES + 2
AUTO_AUGMENT_DRAWS = 5

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int32]


def random_resized_crop(
    heights: _Ints,
    widths: _Ints,
    draws: _Floats,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> _Ints:
    """Draw windows of torchvision's RandomResizedCrop.

    Args:
        heights, widths: (B,) pixels.
        draws: (B, RANDOM_RESIZED_CROP_DRAWS) uniform in [0, 1).
        scale: Smallest and largest fraction of the image's area.
        ratio: Smallest and largest width / height of the window.

    Returns:
        (B, 4): top, left, height, width; always inside the image.
    """
    size = np.stack([heights, widths], axis=1).astype(np.int64)
    area = np.prod(size, axis=1)[:, None] * _between(*scale, draws[:, :_TRIES])
    log_ratio = _between(math.log(ratio[0]), math.log(ratio[1]), draws[:, _TRIES : 2 * _TRIES])
    aspect = np.exp(log_ratio)
    tries = np.rint(np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=2))
    fits = ((tries > 0) & (tries <= size[:, None, :])).all(axis=2)
    # argmax of booleans is the first that fits, or 0 where none does.
    drawn = tries[np.arange(len(size)), fits.argmax(axis=1)].astype(np.int64)
    any_fits = fits.any(axis=1)[:, None]
    window = np.where(any_fits, drawn, _clamped_ratio(size, ratio))
    free = size - window
    corner = np.minimum((draws[:, 2 * _TRIES :] * (free + 1)).astype(np.int64), free)
    corner = np.where(any_fits, corner, free // 2)
    return np.concatenate([corner, window], axis=1).astype(np.int32)


def _between(low: Any, high: Any, draws: _Floats) -> _Floats:
    return low + (high - low) * draws


def _clamped_ratio(
    size: npt.NDArray[np.int64], ratio: tuple[float, float]
) -> npt.NDArray[np.int64]:
    """Return the largest height and width of an allowed ratio that fit into the image: (B, 2)."""
    height, width = size.T
    tallest = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    widest = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    # torchvision's rounding may leave nothing of an image that is one pixel wide.
    return np.maximum(np.stack([tallest, widest], axis=1), 1).astype(np.int64)


def padded_crop(
    heights: _Ints, widths: _Ints, draws: _Floats, padding: int, size: int
) -> tuple[_Ints, _Ints]:
    """Draw windows of torchvision's RandomCrop(size, padding), with a black border.

    Args:
        heights, widths: (B,) pixels, at least size - 2 * padding.
        draws: (B, 2) uniform in [0, 1).
        padding: Pixels added on each side, fewer than `size`.

    Returns:
        (B, 4): top, left, height, width of the part of the crop inside the image; (B, 2): row and
        column of the crop where that part begins.
    """
    image = np.stack([heights, widths], axis=1).astype(np.int64)
    free = image + 2 * padding - size
    assert (free >= 0).all()
    assert padding < size
    start = np.minimum((draws * (free + 1)).astype(np.int64), free) - padding
    first, end = np.maximum(start, 0), np.minimum(start + size, image)
    window = np.concatenate([first, end - first], axis=1)
    return window.astype(np.int32), (first - start).astype(np.int32)


def centre_crop(heights: _Ints, widths: _Ints, resize: int, crop: int) -> tuple[_Ints, _Ints]:
    """Compute the sizes of torchvision's Resize(resize), and the corners of its CenterCrop(crop).

    The longer side is rounded down.

    Returns:
        (B, 2): height and width to resize to; (B, 2): row and column of the crop's first pixel.
    """
    if crop > resize:
        raise UserError(
            f"evaluation cannot crop {crop} pixels from images resized to {resize}; set"
            f" data.resize to {crop} or more"
        )
    size = np.stack([heights, widths], axis=1).astype(np.int64)
    resized = (resize * size // size.min(axis=1, keepdims=True)).astype(np.int32)
    return resized, np.rint((resized - crop) / 2).astype(np.int32)


def shifts(draws: _Floats, largest: int) -> _Ints:
    """Draw shifts by whole pixels, uniform from -largest to +largest, one for each draw."""
    return (draws * (2 * largest + 1)).astype(np.int32) - np.int32(largest)


class Operation(NamedTuple):
    """A change of an image's pixels, by a name that pixels.py knows."""

    name: str
    value: float


COLOR_JITTER_DRAWS = 8


def color_jitter(draws: _Floats, reaches: Sequence[float]) -> list[list[Operation]]:
    """Draw each sample's changes of brightness, contrast, saturation and hue, in random order.

    Args:
        draws: (B, COLOR_JITTER_DRAWS) uniform in [0, 1).
        reaches: Largest change of each.
    """
    names, (*factors, hue) = ("brightness", "contrast", "saturation", "hue"), reaches
    low = [max(0.0, 1 - reach) for reach in factors] + [-hue]
    high = [1 + reach for reach in factors] + [hue]
    values = _between(np.array(low), np.array(high), draws[:, 4:])
    orders = draws[:, :4].argsort(axis=1, kind="stable")
    return [
        [Operation(names[i], float(row[i])) for i in order if reaches[i]]
        for row, order in zip(values, orders.tolist(), strict=True)
    ]


def cutout_boxes(draws: _Floats, height: int, width: int, side: int) -> _Ints:
    """Draw squares of DeVries and Taylor's Cutout, centred on any pixel and clipped at borders.

    Args:
        draws: (B, 2) uniform in [0, 1).

    Returns:
        (B, 4): top, left, bottom, right.
    """
    size = np.array([height, width])
    first = (draws * size).astype(np.int64) - side // 2
    box = np.concatenate([np.maximum(first, 0), np.minimum(first + side, size)], axis=1)
    return box.astype(np.int32)


class Mix(NamedTuple):
    """Weights of each of B samples in its mix with a partner from the micro-batch.

    Attributes:
        share: (B,) weight of the sample in the target.
        pixels: (B,) weight of the sample in pixels outside the box: `share`, or 1 with cutmix.
        boxes: (B, 4) top, left, bottom, right of the partner's box; empty with mixup.
        mirrored: True if the partner of sample i is B - 1 - i, False if it is i - 1.
    """

    share: _Floats
    pixels: _Floats
    boxes: _Ints
    mirrored: bool = False


MIXING_DRAWS = 6


def micro_batch_mix(
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    size: tuple[int, int],
    data: DataSection,
) -> Mix | None:
    """Draw the mix of a micro-batch's samples, at some positions of an epoch; None without mixing.

    An epoch from ``off_epoch`` on has a mix, too, with weights of 1: targets are class
    probabilities in all epochs, so that a CUDA graph of the step stays the same.
    """
    if not (data.mixup or data.cutmix):
        return None
    is_batch, off = data.mixing.mode == "batch", data.mixing.off_epoch
    rows = np.zeros_like(positions) if is_batch else np.arange(len(positions))
    draws = uniforms(seed, epoch, positions[rows], MIXING_DRAWS, MIXING)
    probability = 0.0 if off and epoch >= off else data.mixing.probability
    return mixes(draws, *size, data, probability)._replace(mirrored=is_batch)


def mixes(
    draws: _Floats, height: int, width: int, data: DataSection, probability: float = 1.0
) -> Mix:
    """Draw mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019), and a lambda, for each row.

    Args:
        draws: (B, MIXING_DRAWS) uniform in [0, 1).
        probability: Probability of mixing a row.
    """
    # If both are on, each is equally likely.
    switch = 0.5 if data.mixup and data.cutmix else float(data.cutmix > 0)
    cut = draws[:, 0] < switch
    alpha = np.where(cut, data.cutmix or 1.0, data.mixup or 1.0)
    kept = symmetric_beta(draws[:, 1], draws[:, 2], alpha)
    kept = np.where(draws[:, 5] < probability, kept, 1.0)
    boxes = _mixing_boxes(draws[:, 3:5], kept, (height, width), data.mixing.mode)
    boxes[~cut] = 0
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    share = np.where(cut, 1 - area / (height * width), kept)
    return Mix(share, np.where(cut, 1.0, kept), boxes.astype(np.int32))


def _mixing_boxes(
    draws: _Floats, kept: _Floats, image: tuple[int, int], mode: Literal["sample", "batch"]
) -> npt.NDArray[np.int64]:
    """Draw boxes (B, 4) of CutMix around any pixel, clipped at borders; empty if ``kept`` is 1."""
    size = np.array(image)
    centre = (draws * size).astype(np.int64)
    cut = np.sqrt(1 - kept)[:, None] * size
    # torchvision's CutMix (mode=sample) rounds half of the side down on both sides; timm's rounds
    # the whole side down, with the larger half below and to the right.
    before = (0.5 * cut).astype(np.int64)
    after = (cut.astype(np.int64) + 1) // 2 if mode == "batch" else before
    return np.concatenate([np.maximum(centre - before, 0), np.minimum(centre + after, size)], 1)


def symmetric_beta(u: _Floats, v: _Floats, alpha: _Floats) -> _Floats:
    """Beta(alpha, alpha) from two uniform numbers, by Bailey's polar form of Student's t.

    t = sqrt(n (u^(-2/n) - 1)) cos(2 pi v) has n degrees of freedom, and (1 + t / sqrt(n + t^2)) / 2
    is Beta(n/2, n/2). Unlike numpy's sampler, this needs a fixed number of draws per sample.
    """
    with np.errstate(over="ignore", divide="ignore"):
        # u may be 0 and is never 1, so 1 - u is never 0. A small alpha makes infinities, for which
        # 1 / (1 + 1 / inf) = 1 is right.
        squared = (np.power(1 - u, -1 / alpha) - 1) * np.square(np.cos(2 * np.pi * v))
        distance = 1 / np.sqrt(1 + 1 / squared)
    return 0.5 + 0.5 * np.copysign(distance, np.cos(2 * np.pi * v))


class ImageDraws(NamedTuple):
    """Random numbers of B images, each field (B, n).

    Never change their order: add new ones at the end, so that no old run changes.
    """

    crop: _Floats
    flip: _Floats
    auto_augment: _Floats
    color_jitter: _Floats
    cutout: _Floats


class EventDraws(NamedTuple):
    """Random numbers of B event tensors, in an order that must never change."""

    flip: _Floats
    roll: _Floats
    cutout: _Floats


def image_draws(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> ImageDraws:
    """Draw for the images at some positions of an epoch."""
    widths = (RANDOM_RESIZED_CROP_DRAWS, 1, AUTO_AUGMENT_DRAWS, COLOR_JITTER_DRAWS, 2)
    return ImageDraws(*_columns(seed, epoch, positions, widths))


def event_draws(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> EventDraws:
    """Draw for the event tensors at some positions of an epoch."""
    return EventDraws(*_columns(seed, epoch, positions, (1, 2, 2)))


def _columns(
    seed: int, epoch: int, positions: npt.NDArray[np.int64], widths: tuple[int, ...]
) -> list[_Floats]:
    draws = uniforms(seed, epoch, positions, sum(widths))
    return np.split(draws, np.cumsum(widths)[:-1], axis=1)


TransformFunction = Callable[[Tensor, tuple[float, ...]], Tensor]


@dataclass(frozen=True)
class Transform:
    """A user's transform of finished training samples.

    Attributes:
        function: Takes a sample in float32, (3, H, W) after normalisation or the frames
            (T, 2, H, W) of events, and its draws; returns a sample of the same shape.
    """

    name: str
    function: TransformFunction
    num_draws: int

    def draws(self, seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> _Floats:
        """Draw for the samples at some positions of an epoch: (B, num_draws), in [0, 1)."""
        return uniforms(seed, epoch, positions, self.num_draws, transform_stream(self.name))


TRANSFORMS: Registry[Transform] = Registry("transform", "data.transforms")


def register_transform(
    name: str, draws: int = 0
) -> Callable[[TransformFunction], TransformFunction]:
    """Make a decorator that enters a function in `TRANSFORMS`; see `Transform`.

    Args:
        draws: Number of random numbers, uniform in [0, 1), that the function gets for a sample.
    """

    def enter(function: TransformFunction) -> TransformFunction:
        TRANSFORMS.enter(name, Transform(name, function, draws), function.__module__)
        return function

    return enter


def transforms_called(names: Sequence[str]) -> tuple[Transform, ...]:
    """Return the transforms of some names."""
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        # Both would get the same random numbers.
        raise UserError(f"data.transforms: {repeated[0]!r} is listed twice; list each once")
    return tuple(TRANSFORMS[name] for name in names)
