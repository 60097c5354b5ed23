"""The geometry of augmentation and evaluation, computed for a batch with numpy.

The rules are torchvision's, so that published recipes mean what they say; the randomness comes as
uniform numbers from order.py, and DALI carries the result out. Windows and regions are in pixels of
the image as stored, rows before columns.
"""

import math

import numpy as np
import numpy.typing as npt

from tetdist.errors import UserError

_TRIES = 10
RANDOM_RESIZED_CROP_DRAWS = 2 * _TRIES + 2

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int32]


def random_resized_crop(
    heights: _Ints,
    widths: _Ints,
    draws: _Floats,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> _Ints:
    """Windows of torchvision's RandomResizedCrop.

    Args:
        heights: (B,) pixels.
        widths: (B,) pixels.
        draws: (B, RANDOM_RESIZED_CROP_DRAWS) uniform in [0, 1).
        scale: least and greatest part of the image's area.
        ratio: least and greatest width / height of the window.

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


def _between(low: float, high: float, draws: _Floats) -> _Floats:
    return low + (high - low) * draws


def _clamped_ratio(
    size: npt.NDArray[np.int64], ratio: tuple[float, float]
) -> npt.NDArray[np.int64]:
    """Greatest height and width of an allowed ratio that the image holds: (B, 2)."""
    height, width = size.T
    tallest = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    widest = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    # Of an image one pixel wide, torchvision's rounding may leave nothing.
    return np.maximum(np.stack([tallest, widest], axis=1), 1).astype(np.int64)


def resized_size(heights: _Ints, widths: _Ints, shorter: int) -> _Ints:
    """Sizes after torchvision's Resize(shorter): the longer side is cut to a whole number.

    Returns:
        (B, 2): height, width.
    """
    size = np.stack([heights, widths], axis=1).astype(np.int64)
    return (shorter * size // size.min(axis=1, keepdims=True)).astype(np.int32)


def centre_region(heights: _Ints, widths: _Ints, resize: int, crop: int) -> npt.NDArray[np.float32]:
    """What torchvision's Resize(resize) and CenterCrop(crop) show, as a region of the stored image.

    Sampling `crop` x `crop` pixels from the region equals resizing the whole image and cropping.

    Returns:
        (B, 4): top, left, bottom, right; not whole numbers.

    Raises:
        UserError: if the crop is larger than the resized image; torchvision would pad it with
            black.
    """
    if crop > resize:
        raise UserError(
            f"evaluation cannot crop {crop} pixels from images resized to {resize}: the resize must"
            " be at least as large as the crop"
        )
    size = np.stack([heights, widths], axis=1)
    resized = resized_size(heights, widths, resize)
    start = np.rint((resized - crop) / 2)
    pixel = size / resized
    return np.concatenate([start * pixel, (start + crop) * pixel], axis=1).astype(np.float32)


def flips(draws: _Floats, probability: float) -> npt.NDArray[np.bool_]:
    """Which samples are mirrored left to right, from (B,) uniform draws."""
    return draws < probability


def shifts(draws: _Floats, largest: int) -> _Ints:
    """Whole pixels from -largest to +largest, equally likely, one for each uniform draw."""
    return (draws * (2 * largest + 1)).astype(np.int32) - np.int32(largest)


def flip_and_roll(
    frames: npt.NDArray[np.generic], flip: bool, down: int, right: int
) -> npt.NDArray[np.generic]:
    """Mirror (T, 2, H, W) frames left to right if asked, then shift them all alike.

    What leaves at one side comes in at the other.
    """
    return np.roll(frames[..., ::-1] if flip else frames, (down, right), axis=(-2, -1))
