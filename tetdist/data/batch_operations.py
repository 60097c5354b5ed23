"""Changes of the pixels of a whole batch on a GPU, all images of one operation at once.

On a CPU pixels.py changes one image after another with Pillow. A GPU would then wait for the host:
an operation of torchvision takes some ten kernels per image. Here all images with the same
operation share these kernels, each with its own value, so that the number of kernels depends on the
kinds of operations and not on the batch. The resulting bytes are those of torchvision's functions
for tensors, and Pillow's for operations that only timm has: blur, addition to dark pixels, and
interpolated geometry. Half-way between two pixels, torchvision's shears and rotations may take the
other pixel, since their matrix product rounds differently on each processor.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as vision

from tetdist.data.pixels import WARPS, Output, Rows, solarize_add_levels
from tetdist.data.transfer import on_device
from tetdist.data.transforms import Operation

# A function of images (n, 3, H, W) and their values.
_Change = Callable[[Tensor, list[float]], Tensor]


def operate(images: Tensor, operations: Sequence[list[Operation]], output: Output) -> None:
    """Change images (B, H, W, 3), uint8, in place, each by its operations one after another."""
    planes = images.permute(0, 3, 1, 2)
    for turn in range(max(map(len, operations), default=0)):
        due: dict[str, list[tuple[int, Operation]]] = {}
        for k, of_image in enumerate(operations):
            if turn < len(of_image):
                name = of_image[turn].name
                due.setdefault("warp" if name in WARPS else name, []).append((k, of_image[turn]))
        for name, those in due.items():
            rows = on_device(torch.tensor([k for k, _ in those]), images.device)
            chosen = planes.index_select(0, rows)
            if name == "warp":
                changed = _warped(chosen, [operation for _, operation in those], output)
            else:
                changed = CHANGES[name](chosen, [operation.value for _, operation in those])
            planes.index_copy_(0, rows, changed)


def _numbers(images: Tensor, values: list[float]) -> Tensor:
    """Return one number per image as a tensor (n, 1, 1, 1)."""
    return on_device(torch.tensor(values), images.device)[:, None, None, None]


# --- colours --------------------------------------------------------------------------------------


def _blended(images: Tensor, others: Tensor, shares: list[float]) -> Tensor:
    """Blend each image with another one; weights may be above 1 and below 0.

    The other's weight is computed before it is rounded to float32, as in torchvision.
    """
    rest = _numbers(images, [1.0 - share for share in shares])
    return (_numbers(images, shares) * images + rest * others).clamp(0, 255).to(torch.uint8)


def _contrast(images: Tensor, factors: list[float]) -> Tensor:
    gray = vision.rgb_to_grayscale(images).float()
    return _blended(images, gray.mean(dim=(1, 2, 3), keepdim=True), factors)


# For red, green and blue in each of six hue sectors: index into (value, falling, least, rising).
_SECTORS = ((0, 1, 2, 2, 3, 0), (3, 0, 0, 1, 2, 2), (2, 2, 3, 0, 0, 1))


def _hue(images: Tensor, turns: list[float]) -> Tensor:
    pixels = images.float() / 255
    red, green, _ = pixels.unbind(1)
    value, least = pixels.amax(1), pixels.amin(1)
    spread = value - least
    is_gray = spread == 0
    from_red, from_green, from_blue = (
        (value[:, None] - pixels) / torch.where(is_gray, 1.0, spread)[:, None]
    ).unbind(1)
    sixths = torch.where(
        value == red,
        from_blue - from_green,
        torch.where(value == green, 2 + from_red - from_blue, 4 + from_green - from_red),
    )
    hue = (torch.fmod(sixths / 6 + 1, 1) + _numbers(images, turns)[:, 0]) % 1 * 6
    saturation = spread / torch.where(is_gray, 1.0, value)
    sector = hue.floor()
    into = hue - sector
    levels = [
        value,
        (value * (1 - saturation * into)).clamp(0, 1),
        (value * (1 - saturation)).clamp(0, 1),
        (value * (1 - saturation * (1 - into))).clamp(0, 1),
    ]
    which = on_device(torch.tensor(_SECTORS), images.device)[:, sector.long() % 6]
    colours = torch.stack(levels, 1).gather(1, which.movedim(0, 1))
    # Each byte covers an equal part of [0, 1], by torchvision's rule.
    return (colours * (256 - 1e-3)).to(torch.uint8)


def _posterize(images: Tensor, bits: list[float]) -> Tensor:
    masks = torch.tensor([256 - 2 ** (8 - int(number)) for number in bits], dtype=torch.uint8)
    return images & on_device(masks, images.device)[:, None, None, None]


def _equalize(images: Tensor, _: list[float]) -> Tensor:
    channels = images.flatten(2).long()  # (n, 3, H * W)
    counts = channels.new_zeros(*channels.shape[:2], 256)
    counts.scatter_add_(2, channels, torch.ones_like(channels))
    # Pixels of the brightest level are not spread out.
    others = channels.shape[2] - counts.gather(2, channels.amax(2, keepdim=True))
    step = others // 255
    levels = (counts.cumsum(2) + step // 2) // step.clamp(min=1)
    levels = F.pad(levels, (1, -1)).clamp(max=255)
    levels = torch.where(step == 0, torch.arange(256, device=images.device), levels)
    return levels.gather(2, channels).to(torch.uint8).view_as(images)


def _solarize_add(images: Tensor, adds: list[float]) -> Tensor:
    levels = torch.tensor([solarize_add_levels(add) for add in adds], dtype=torch.uint8)
    levels = on_device(levels, images.device)
    return levels.gather(1, images.flatten(1).long()).view_as(images)


def _gaussian_blur(images: Tensor, radii: list[float]) -> Tensor:
    """Apply Pillow's blur: three box filters in each direction, with weighted ends."""
    weights = on_device(torch.tensor([_window(radius) for radius in radii]), images.device)
    middle, *others = weights[:, :, None, None, None].unbind(1)
    values = images.long()
    for dim in (3, 3, 3, 2, 2, 2):
        last = values.shape[dim] - 1
        places = torch.arange(last + 1, device=images.device)
        total = middle * values + 2**23
        for distance, weight in enumerate(others, start=1):
            before = values.index_select(dim, (places - distance).clamp(min=0))
            behind = values.index_select(dim, (places + distance).clamp(max=last))
            total = total + weight * (before + behind)
        values = total >> 24
    return values.to(torch.uint8)


def _window(radius: float) -> list[int]:
    """Return the weights, in units of 2**-24, of a pixel and of those one and two away from it.

    They are Pillow's: three windows together have the variance of the Gaussian, computed in float32
    (Gwosdek et al., 2011).
    """
    one = np.float32
    variance = one(radius) * one(radius) / one(3)
    whole = one(math.floor((math.sqrt(12 * float(variance) + 1) - 1) / 2))
    assert whole <= 1, f"a radius of {radius} takes a longer window"
    next_one = whole + one(1)
    part = (2 * whole + one(1)) * (whole * next_one - 3 * variance)
    part = part / (6 * (variance - next_one * next_one))
    inner = int(one(2**24) / (2 * (whole + part) + one(1)))
    outer = (2**24 - (2 * int(whole) + 1) * inner) // 2
    return [inner, inner, outer] if whole else [inner, outer, 0]


# --- geometry -------------------------------------------------------------------------------------


def _moved(rows_of: Callable[[float, int, int], Rows]) -> _Change:
    """Make a change that moves pixels, with nearest neighbours and black from outside.

    Args:
        rows_of: Returns the matrix of a value, height and width; x and y are 0 in the middle of
            the image.
    """

    def change(images: Tensor, values: list[float]) -> Tensor:
        height, width = images.shape[2:]
        rows = torch.tensor([rows_of(value, height, width) for value in values])
        # From pixels to grid_sample's unit, half of the width or height.
        halves = torch.tensor([[0.5 * width], [0.5 * height]])
        rows = on_device(rows.view(-1, 2, 3) / halves, images.device)[..., None, None]
        x = torch.linspace(0.5 - width / 2, width / 2 - 0.5, width, device=images.device)
        y = torch.linspace(0.5 - height / 2, height / 2 - 0.5, height, device=images.device)
        places = x * rows[:, :, 0] + y[:, None] * rows[:, :, 1] + rows[:, :, 2]  # (n, 2, H, W)
        found = F.grid_sample(
            images.float(), places.movedim(1, 3), mode="nearest", align_corners=False
        )
        return found.to(torch.uint8)

    return change


def _rotation(degrees: float, *_: int) -> Rows:
    angle = math.radians(-degrees)
    return (math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0)


def _warped(images: Tensor, operations: list[Operation], output: Output) -> Tensor:
    """Interpolate each pixel between others as Pillow does, in its order of sums and products."""
    height, width = images.shape[2:]
    rows = [WARPS[name](value, height, width) for name, value in operations]
    table = on_device(torch.tensor(rows, dtype=torch.float64).view(-1, 2, 3, 1, 1), images.device)
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    place_x, place_y = (table[:, :, 0] * x + table[:, :, 1] * y + table[:, :, 2]).unbind(1)
    is_inside = (place_x >= 0) & (place_x < width) & (place_y >= 0) & (place_y < height)
    place_x, place_y = place_x - 0.5, place_y - 0.5
    left, top = place_x.floor(), place_y.floor()
    right_of, below = (place_x - left)[:, None], (place_y - top)[:, None]
    between, offsets = _BETWEEN[output.interpolation]
    columns = [(left.long() + offset).clamp(0, width - 1) for offset in offsets]
    pixels, warped_rows = images.flatten(2), []
    for offset in offsets:
        first = (top.long() + offset).clamp(0, height - 1) * width
        row = [
            pixels.gather(2, (first + column).flatten(1)[:, None].expand(-1, 3, -1))
            for column in columns
        ]
        warped_rows.append(between([one.view_as(images).double() for one in row], right_of))
    warped = between(warped_rows, below).clamp(0, 255).to(torch.uint8)
    fill = on_device(torch.tensor(output.fill, dtype=torch.uint8), images.device)
    return torch.where(is_inside[:, None], warped, fill[:, None, None])


def _linear(values: list[Tensor], d: Tensor) -> Tensor:
    first, second = values
    return first + (second - first) * d


def _cubic(values: list[Tensor], d: Tensor) -> Tensor:
    """Interpolate between the second and third value with the cubic kernel of a = -1."""
    a, b, c, e = values
    return b + d * (-a + c + d * (2 * (a - b) + c - e + d * (-a + b - c + e)))


# Each with its pixels, counted from the one to the left of a place, or above it.
_BETWEEN: dict[str, tuple[Callable[[list[Tensor], Tensor], Tensor], tuple[int, ...]]] = {
    "bilinear": (_linear, (0, 1)),
    "bicubic": (_cubic, (-1, 0, 1, 2)),
}


# By the names in transforms.py, auto_augment.py and rand_augment.py. timm's geometry is missing
# because `_warped` does all of it at once.
CHANGES: dict[str, _Change] = {
    "brightness": lambda images, v: _blended(images, torch.zeros_like(images), v),
    "contrast": _contrast,
    "saturation": lambda images, v: _blended(images, vision.rgb_to_grayscale(images), v),
    "hue": _hue,
    "sharpness": lambda images, v: _blended(images, vision.adjust_sharpness(images, 0.0), v),
    "shear_x": _moved(lambda value, height, _: (1, value, value * height / 2, 0, 1, 0)),
    "shear_y": _moved(lambda value, _, width: (1, 0, 0, value, 1, value * width / 2)),
    "translate_x": _moved(lambda value, *_: (1, 0, -int(value), 0, 1, 0)),
    "translate_y": _moved(lambda value, *_: (1, 0, 0, 0, 1, -int(value))),
    "rotate": _moved(_rotation),
    "posterize": _posterize,
    "solarize": lambda images, v: torch.where(images >= _numbers(images, v), 255 - images, images),
    "autocontrast": lambda images, _: vision.autocontrast(images),
    "equalize": _equalize,
    "invert": lambda images, _: 255 - images,
    "solarize_add": _solarize_add,
    "gaussian_blur": _gaussian_blur,
}
