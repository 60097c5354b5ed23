"""Changes of the pixels of a whole batch on a GPU, each kind of them at once.

On a CPU pixels.py changes one image after another with Pillow. A GPU would wait for the host: an
operation of torchvision is some ten kernels an image. Here all images that are due to have the same
operation, each with its own value, share these kernels, so that their number depends on the kinds
of operations, and not on the batch. The bytes are those of torchvision's functions for tensors.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as vision

from tetdist.data.transfer import on_device
from tetdist.data.transforms import Operation

# It takes images (n, 3, H, W) and a value of each.
_Change = Callable[[Tensor, list[float]], Tensor]


def operate(images: Tensor, operations: list[list[Operation]]) -> None:
    """Change images (B, H, W, 3), uint8, in place, each by its operations one after another."""
    planes = images.permute(0, 3, 1, 2)
    for turn in range(max(map(len, operations), default=0)):
        due: dict[str, list[tuple[int, float]]] = {}
        for k, of_image in enumerate(operations):
            if turn < len(of_image):
                due.setdefault(of_image[turn].name, []).append((k, of_image[turn].value))
        for name, those in due.items():
            rows = on_device(torch.tensor([k for k, _ in those]), images.device)
            values = [value for _, value in those]
            planes.index_copy_(0, rows, CHANGES[name](planes.index_select(0, rows), values))


def _numbers(images: Tensor, values: list[float]) -> Tensor:
    """A number of each image, (n, 1, 1, 1)."""
    return on_device(torch.tensor(values), images.device)[:, None, None, None]


# --- colours --------------------------------------------------------------------------------------


def _blended(images: Tensor, others: Tensor, shares: list[float]) -> Tensor:
    """A share of each image and the rest of another, which may be more than all and less than none.

    The rest is computed before it is rounded to float32, as torchvision does.
    """
    rest = _numbers(images, [1.0 - share for share in shares])
    return (_numbers(images, shares) * images + rest * others).clamp(0, 255).to(torch.uint8)


def _brightness(images: Tensor, factors: list[float]) -> Tensor:
    return _blended(images, torch.zeros_like(images), factors)


def _contrast(images: Tensor, factors: list[float]) -> Tensor:
    gray = vision.rgb_to_grayscale(images).float()
    return _blended(images, gray.mean(dim=(1, 2, 3), keepdim=True), factors)


def _saturation(images: Tensor, factors: list[float]) -> Tensor:
    return _blended(images, vision.rgb_to_grayscale(images), factors)


def _sharpness(images: Tensor, factors: list[float]) -> Tensor:
    return _blended(images, vision.adjust_sharpness(images, 0.0), factors)


# Of the six sectors of hues: which of (value, falling, least, rising) red, green and blue are.
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
    # Each byte gets an equal part of [0, 1], by torchvision's rule.
    return (colours * (256 - 1e-3)).to(torch.uint8)


def _posterize(images: Tensor, bits: list[float]) -> Tensor:
    masks = torch.tensor([256 - 2 ** (8 - int(number)) for number in bits], dtype=torch.uint8)
    return images & on_device(masks, images.device)[:, None, None, None]


def _solarize(images: Tensor, thresholds: list[float]) -> Tensor:
    return torch.where(images >= _numbers(images, thresholds), 255 - images, images)


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


# --- geometry -------------------------------------------------------------------------------------

# Two rows of a matrix: where in the input, from its middle, x and y of an output pixel come from.
_Rows = tuple[float, float, float, float, float, float]


def _moved(rows_of: Callable[[float, int, int], _Rows]) -> _Change:
    """Take each pixel from another place, the nearest one; what comes from outside is black.

    Args:
        rows_of: Gives the matrix of a value, and height and width of the images.
    """

    def change(images: Tensor, values: list[float]) -> Tensor:
        height, width = images.shape[2:]
        rows = torch.tensor([rows_of(value, height, width) for value in values])
        # From pixels to the halves of width and height in which grid_sample reckons.
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


def _shear_x(value: float, height: int, _: int) -> _Rows:
    return (1, value, value * height / 2, 0, 1, 0)


def _shear_y(value: float, _: int, width: int) -> _Rows:
    return (1, 0, 0, value, 1, value * width / 2)


def _translate_x(value: float, _: int, __: int) -> _Rows:
    return (1, 0, -int(value), 0, 1, 0)


def _translate_y(value: float, _: int, __: int) -> _Rows:
    return (1, 0, 0, 0, 1, -int(value))


def _rotate(degrees: float, _: int, __: int) -> _Rows:
    angle = math.radians(-degrees)
    return (math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0)


# By the names that transforms.py and auto_augment.py use.
CHANGES: dict[str, _Change] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "sharpness": _sharpness,
    "shear_x": _moved(_shear_x),
    "shear_y": _moved(_shear_y),
    "translate_x": _moved(_translate_x),
    "translate_y": _moved(_translate_y),
    "rotate": _moved(_rotate),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda images, _: vision.autocontrast(images),
    "equalize": _equalize,
    "invert": lambda images, _: 255 - images,
}
