"""Images as events: I2E (Ma et al., AAAI 2026, arXiv 2511.08065), from its authors' definition.

Each of eight frames compares the brightness at two places of the 3x3 pixels around each pixel.
Brightness is the largest of a pixel's three values; beyond the border it continues. If it grows
from the first place to the second by at least ``ratio`` times the image's range of brightness, the
pixel has an ON event, and if it falls by as much an OFF event. The way from the first place to the
second is the frame's own. Where the pair lies within the 3x3 pixels is drawn in training, for each
frame and sample (the authors draw for a whole batch), and fixed in evaluation. An image without any
range has no events (in the authors' code: all of them).
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetdist.data.transfer import on_device
from tetdist.order import named_stream, uniforms


class _Pair(NamedTuple):
    """The places that a frame compares.

    Attributes:
        down, right: The way from the first place to the second.
        row, column: The pair's position in evaluation, of those inside the 3x3 pixels, from 0.
    """

    down: int
    right: int
    row: int
    column: int


_PAIRS = (
    _Pair(-1, -2, row=1, column=0),
    _Pair(-1, +2, row=0, column=0),
    _Pair(+2, -1, row=0, column=1),
    _Pair(-2, -1, row=0, column=0),
    _Pair(+0, +1, row=1, column=1),
    _Pair(-1, +0, row=0, column=1),
    _Pair(-1, +1, row=0, column=1),
    _Pair(-1, -1, row=0, column=0),
)
_STREAM = named_stream("images as events")
_Places = npt.NDArray[np.int64]


def places(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> _Places:
    """Draw the pairs' positions (B, 8, 2), row and column, for the samples of an epoch."""
    counts = np.array([(3 - abs(one.down), 3 - abs(one.right)) for one in _PAIRS])
    draws = uniforms(seed, epoch, positions, counts.size, _STREAM)
    return (draws.reshape(-1, *counts.shape) * counts).astype(np.int64)


def as_events(images: Tensor, ratio: float, drawn: _Places | None) -> Tensor:
    """Convert images to ON and OFF events, (B, 2, H, W) uint8, with a bit for each of 8 frames.

    Args:
        images: (B, H, W, 3), uint8.
        drawn: Positions that `places` drew; None: those of evaluation.
    """
    brightness = torch.maximum(torch.maximum(images[..., 0], images[..., 1]), images[..., 2])
    height, width = brightness.shape[1:]
    around = torch.cat([brightness[:, :1], brightness, brightness[:, -1:]], 1)
    around = torch.cat([around[:, :, :1], around, around[:, :, -1:]], 2)
    silent = _highest_silent(brightness, ratio)
    limits = silent.gather(1, around.flatten(1).long()).view_as(around)
    bits = images.new_zeros(len(images), 2, height, width)
    there = None
    if drawn is not None and not images.is_cpu:
        there = on_device(torch.from_numpy(drawn), images.device)
    for t, (down, right, row, column) in enumerate(_PAIRS):
        first, second = (
            np.s_[:, max(y, 0) : height + 2 + min(y, 0), max(x, 0) : width + 2 + min(x, 0)]
            for y, x in ((-down, -right), (down, right))
        )
        on, off = around[second] > limits[first], around[first] > limits[second]
        planes = torch.stack([on, off], 1).view(torch.uint8)
        if drawn is None:
            bits.add_(planes[..., row : row + height, column : column + width], alpha=1 << t)
        elif there is not None:
            bits.add_(windows(planes, there[:, t], height, width), alpha=1 << t)
        else:
            # On a CPU this is several times as fast.
            for k, (row, column) in enumerate(drawn[:, t].tolist()):
                window = planes[k, :, row : row + height, column : column + width]
                bits[k].add_(window, alpha=1 << t)
    return bits


def frames(bits: Tensor) -> Tensor:
    """Return the frames of events, (B, 8, 2, H, W) uint8 of 0 and 1."""
    places = 1 << torch.arange(len(_PAIRS), dtype=torch.uint8, device=bits.device)
    return (bits[:, None] & places.view(-1, 1, 1, 1)).clamp_(max=1)


def windows(planes: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Return each sample's window at its own corner (B, 2), of planes (B, 2, ...)."""
    every = planes.unfold(2, height, 1).unfold(3, width, 1)
    samples = torch.arange(len(planes), device=planes.device)
    return every[samples, :, corners[:, 0], corners[:, 1]]


def _highest_silent(brightness: Tensor, ratio: float) -> Tensor:
    """Return for each image and level the highest other level without an event: (B, 256) uint8.

    Levels are compared in float32, as the authors do, whose rounding decides at the threshold.
    """
    values = torch.arange(256, device=brightness.device).float() * (1 / 255)
    extent = values[brightness.amax((1, 2)).long()] - values[brightness.amin((1, 2)).long()]
    threshold = torch.where(extent > 0, extent * ratio, math.inf)
    differences = values - values[:, None]  # ascending in each row
    loud = torch.searchsorted(differences, threshold.expand(256, -1).contiguous())
    return (loud.T - 1).to(torch.uint8)
