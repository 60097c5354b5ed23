"""Random erasing (Zhong et al., 2020) by timm's rules: parts of normalised images are replaced.

Noise is a function of seed, epoch, the sample's position in it, and pixel. It is computed from
integers and a table, so that it is bitwise identical on a CPU and a GPU.
"""

import functools
import math
from typing import NamedTuple, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetdist.config.sections.data import ErasingSection
from tetdist.data.boxes import inside
from tetdist.data.transfer import on_device
from tetdist.order import named_stream, position_keys, uniforms

_BOXES, _NOISE = named_stream("erasing"), named_stream("erasing: noise")
_TRIES = 10
_AREA = (0.02, 1 / 3)
_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))

_Floats = npt.NDArray[np.float64]


class Erased(NamedTuple):
    """Rectangles to erase from B images, and their new contents.

    Attributes:
        boxes: (B, 4) top, left, bottom, right; empty where nothing is erased.
        colours: (B, 3) float32, one colour per rectangle; None: noise.
        keys: (B,) keys of the noise.
    """

    boxes: npt.NDArray[np.int32]
    colours: npt.NDArray[np.float32] | None
    keys: npt.NDArray[np.uint64]


def erased(
    seed: int, epoch: int, positions: npt.NDArray[np.int64], size: int, erasing: ErasingSection
) -> Erased:
    """Draw a rectangle to erase from images (size, size) at some positions of an epoch."""
    draws = uniforms(seed, epoch, positions, 2 + 2 * _TRIES + 2, _BOXES)
    boxes = _rectangles(draws[:, 2:], size)  # timm draws the number of rectangles second
    boxes[draws[:, 0] >= erasing.probability] = 0
    keys = position_keys(seed, epoch, positions, _NOISE)
    colours: npt.NDArray[np.float32] | None
    match erasing.mode:
        case "pixel":
            colours = None
        case "rand":
            # Its word comes after those of all pixels.
            word = torch.tensor([2**62])
            colours = normals(torch.from_numpy(keys.view(np.int64)), word)[:, :, 0].numpy()
        case "const":
            colours = np.zeros((len(positions), 3), np.float32)
        case _:
            assert_never(erasing.mode)
    return Erased(boxes, colours, keys)


def _rectangles(draws: _Floats, size: int) -> npt.NDArray[np.int32]:
    """Choose the first of several tries that fits into the image, or an empty rectangle.

    Args:
        draws: (B, 2 * _TRIES + 2) uniform in [0, 1).
    """
    areas, log_ratios, corners = np.split(draws, [_TRIES, 2 * _TRIES], axis=1)
    areas = (_AREA[0] + (_AREA[1] - _AREA[0]) * areas) * size**2
    ratios = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * log_ratios)
    sides = np.rint(np.stack([np.sqrt(areas * ratios), np.sqrt(areas / ratios)], axis=2))
    fits = (sides < size).all(axis=2)
    side = sides[np.arange(len(sides)), fits.argmax(axis=1)].astype(np.int64)
    side[~fits.any(axis=1)] = 0
    corner = (corners * (size - side + 1)).astype(np.int64)
    return np.concatenate([corner, corner + side], axis=1).astype(np.int32)


# --- noise ----------------------------------------------------------------------------------------


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """Return normal quantiles of all 16-bit numbers: (65536,), from -4.3 to 4.3, float32."""
    shares = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return on_device(torch.special.ndtri(shares).float(), device)


def normals(keys: Tensor, words: Tensor) -> Tensor:
    """Compute normal numbers (n, 3, m) of three channels from int64 keys (n,) and words (m,)."""
    hashes = _hashed(keys[:, None], words)
    bits = torch.stack([_shifted(hashes, by) & 0xFFFF for by in (48, 32, 16)], dim=1)
    return _quantiles(keys.device)[bits]


def _hashed(key: Tensor, word: Tensor) -> Tensor:
    """Compute `order.hashed` in int64, where sums and products wrap around to the same bits."""
    z = (key ^ word) + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift to the right, filling with zeros instead of the sign."""
    return (z >> by) & (2 ** (64 - by) - 1)


def _signed(word: int) -> int:
    return word - 2**64


# --- pixels ---------------------------------------------------------------------------------------


def erase(images: Tensor, what: Erased) -> None:
    """Erase rectangles of images (B, 3, H, W) on the device where they are, in place."""
    device, (height, width) = images.device, images.shape[2:]
    some = np.flatnonzero(what.boxes.any(axis=1))
    if not some.size:
        return
    rows = on_device(torch.from_numpy(some), device)
    boxes = on_device(torch.from_numpy(what.boxes[some]), device)
    if what.colours is None:
        keys = on_device(torch.from_numpy(what.keys[some].view(np.int64)), device)
        noise = normals(keys, torch.arange(height * width, device=device))
        filled = noise.view(len(some), 3, height, width)
    else:
        filled = on_device(torch.from_numpy(what.colours[some]), device)[..., None, None]
    kept = images.index_select(0, rows)
    changed = torch.where(inside(boxes, height, width)[:, None], filled, kept)
    images.index_copy_(0, rows, changed)
