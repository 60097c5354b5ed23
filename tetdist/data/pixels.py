"""Changes of a decoded image's pixels, with parameters from transforms.py.

Images are uint8 (H, W, 3) until they are normalised, or converted to events. On a CPU torch resizes
them, several times as fast as DALI. Its kernel for bytes has Pillow's arithmetic with shorter
weights, so that a few values in a thousand differ by one level (docs/data.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as vision

from tetdist.config.sections.data import ImagesAsEventsSection
from tetdist.data.boxes import inside
from tetdist.data.erasing import Erased, erase
from tetdist.data.images_as_events import as_events
from tetdist.data.transfer import on_device
from tetdist.data.transforms import Operation

Interpolation = Literal["bilinear", "bicubic"]
Channels = tuple[float, float, float]
_Ints = npt.NDArray[np.int32]


class Edits(NamedTuple):
    """Changes of each of B decoded windows.

    Attributes:
        window: (B, 4) top, left, height, width of the decoded part of an image.
        size: (B, 2) height and width after resizing.
        corner: (B, 2) row and column of the resized window in the output; negative: so many are
            cut off. The rest of the output is black.
        mirror: (B,) True to mirror the output left to right after that.
        operations: Operations on each image after that; empty: none.
    """

    window: _Ints
    size: _Ints
    corner: _Ints
    mirror: npt.NDArray[np.bool_]
    operations: Sequence[list[Operation]] = ()


@dataclass(frozen=True, kw_only=True)
class Output:
    """Format of all output images.

    Attributes:
        size: Height and width.
        mean: Mean of each channel, where white is 1.
        std: Standard deviation of each channel, where white is 1.
        interpolation: Interpolation of the resize, with antialiasing, and of timm's geometric
            operations, without.
        events: Conversion to events, in place of normalisation; None: none.
    """

    size: int
    mean: Channels
    std: Channels
    interpolation: Interpolation
    events: ImagesAsEventsSection | None = None

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour, which timm's geometric operations fill in from outside."""
        red, green, blue = (min(max(round(255 * mean), 0), 255) for mean in self.mean)
        return red, green, blue


def edited(window: Tensor, edits: Edits, k: int, output: Output) -> Tensor:
    """Return a sample's image (size, size, 3) before normalisation.

    Args:
        window: (H, W, 3), on the CPU.
    """
    height, width = edits.size[k].tolist()
    row, column = edits.corner[k].tolist()
    image = placed(resized(window, height, width, output.interpolation), row, column, output.size)
    if edits.mirror[k]:
        image = mirrored(image)
    if edits.operations and edits.operations[k]:
        image = operated(image, edits.operations[k], output)
    return image


def resized(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize an image (H, W, 3)."""
    if image.shape[:2] == (height, width):
        return image
    batch = image.permute(2, 0, 1)[None]
    batch = F.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)
    return batch[0].permute(1, 2, 0)


def placed(image: Tensor, row: int, column: int, size: int) -> Tensor:
    """Place (H, W, 3) in a black square, with its corner at a row and column, maybe outside."""
    image = image[max(-row, 0) :, max(-column, 0) :]
    row, column = max(row, 0), max(column, 0)
    image = image[: size - row, : size - column]
    if image.shape[:2] == (size, size):
        return image
    square = image.new_zeros(size, size, image.shape[2])
    square[row : row + image.shape[0], column : column + image.shape[1]] = image
    return square


def mirrored(image: Tensor) -> Tensor:
    """Mirror an image (H, W, 3) left to right."""
    # torch would divide this among threads, which costs more than it saves.
    pixels = np.ascontiguousarray(image.numpy()).view("V3")
    return torch.from_numpy(
        np.ascontiguousarray(pixels[:, ::-1]).view(np.uint8).reshape(image.shape)
    )


def operated(image: Tensor, operations: list[Operation], output: Output) -> Tensor:
    """Apply operations to an image (H, W, 3) with Pillow, as published recipes do.

    batch_operations.py does the same on a GPU."""
    picture = Image.fromarray(image.numpy())
    for name, value in operations:
        if name in WARPS:
            picture = picture.transform(
                picture.size,
                Image.Transform.AFFINE,
                WARPS[name](value, picture.height, picture.width),
                resample=_FILTERS[output.interpolation],
                fillcolor=output.fill,
            )
        else:
            picture = _OPERATIONS[name](picture, value)
    return torch.from_numpy(np.array(picture))


_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Two rows of a matrix that maps an output pixel to its x and y in the input.
Rows = tuple[float, float, float, float, float, float]


def _rotation(degrees: float, height: int, width: int) -> Rows:
    # Rounded as in Pillow, hence bitwise identical.
    angle = -math.radians(degrees)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


# timm's geometry, which interpolates between pixels; torchvision's, below, takes the nearest.
WARPS: dict[str, Callable[[float, int, int], Rows]] = {
    "warp_rotate": _rotation,
    "warp_shear_x": lambda v, *_: (1, v, 0, 0, 1, 0),
    "warp_shear_y": lambda v, *_: (1, 0, 0, v, 1, 0),
    "warp_translate_x": lambda v, *_: (1, 0, v, 0, 1, 0),
    "warp_translate_y": lambda v, *_: (1, 0, 0, 0, 1, v),
}


def _affine(image: Any, across: int = 0, down: int = 0, *shear: float) -> Any:
    degrees = [math.degrees(math.atan(one)) for one in shear] or [0.0, 0.0]
    centre = [0, 0] if shear else None
    return vision.affine(image, 0.0, [across, down], 1.0, degrees, center=centre)


# Functions of a Pillow image and the operation's value. Pixels from outside are black.
_OPERATIONS: dict[str, Callable[[Any, float], Any]] = {
    "brightness": vision.adjust_brightness,
    "contrast": vision.adjust_contrast,
    "saturation": vision.adjust_saturation,
    "hue": vision.adjust_hue,
    "sharpness": vision.adjust_sharpness,
    "shear_x": lambda image, v: _affine(image, 0, 0, v, 0),
    "shear_y": lambda image, v: _affine(image, 0, 0, 0, v),
    "translate_x": lambda image, v: _affine(image, int(v)),
    "translate_y": lambda image, v: _affine(image, 0, int(v)),
    "rotate": vision.rotate,
    # Newer versions of Pillow refuse 0 bits, which timm still uses: the image becomes black.
    "posterize": lambda image, v: (
        vision.posterize(image, int(v)) if v else Image.new(image.mode, image.size)
    ),
    "solarize": vision.solarize,
    "autocontrast": lambda image, _: vision.autocontrast(image),
    "equalize": lambda image, _: vision.equalize(image),
    "invert": lambda image, _: vision.invert(image),
    "solarize_add": lambda image, v: image.point(3 * solarize_add_levels(v)),
    "gaussian_blur": lambda image, v: image.filter(ImageFilter.GaussianBlur(v)),
}


def solarize_add_levels(add: float) -> list[int]:
    """Return the new value of each of 256 levels: the darker half is raised by ``add``."""
    return [min(255, level + int(add)) if level < 128 else level for level in range(256)]


class Rest(NamedTuple):
    """Last changes of a batch of edited images: normalisation or conversion, cutout, erasing.

    Attributes:
        output: Mean and standard deviation of the images, or their conversion to events.
        cutout: (B, 4) top, left, bottom, right of a box set to 0 after that; None: none.
        erased: Rectangles erased in the end; None: none.
        places: (B, 8, 2) drawn by `images_as_events.places`; None: those of evaluation.
    """

    output: Output
    cutout: _Ints | None = None
    erased: Erased | None = None
    places: npt.NDArray[np.int64] | None = None


def finished(pixels: Tensor, rest: Rest | None) -> Tensor:
    """Finish a batch on the device where it is.

    Args:
        pixels: (B, size, size, 3), uint8; or frames of events as they are stored.
        rest: The remaining changes; None for events.

    Returns:
        (B, 3, size, size) in channels_last memory, or the frames, float32; or the bits of
        `as_events`.
    """
    if rest is None:
        return pixels.float()
    if rest.output.events is not None:
        images = as_events(pixels, rest.output.events.ratio, rest.places)
    else:
        mean, scale = _scale(pixels.device, rest.output)
        # Row by row: on a CPU torch is slow with an innermost dimension of only three channels.
        rows = pixels.flatten(2).float().sub_(mean).mul_(scale)
        images = rows.view_as(pixels).permute(0, 3, 1, 2)
    if rest.cutout is not None:
        boxes = on_device(torch.from_numpy(rest.cutout), images.device)
        images.masked_fill_(inside(boxes, *images.shape[2:])[:, None], 0)
    if rest.erased is not None:
        erase(images, rest.erased)
    return images


@lru_cache
def _scale(device: torch.device, output: Output) -> tuple[Tensor, ...]:
    """Return the offset to subtract from a row's bytes, and the factor, (3 * size,) each."""
    wide = (255 * np.array(output.mean), 1 / (255 * np.array(output.std)))
    # The host waits for these copies, since other loaders use them on other streams.
    return tuple(torch.from_numpy(one).float().repeat(output.size).to(device) for one in wide)


def cut_out(image: Any, box: _Ints) -> None:
    """Set a box of an image (..., H, W) to 0, in place."""
    top, left, bottom, right = box.tolist()
    image[..., top:bottom, left:right] = 0
