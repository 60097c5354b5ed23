"""Images as events: I2E (Ma et al., AAAI 2026, arXiv 2511.08065), from its authors' definition.

Each of eight frames compares the brightness at two places of the 3x3 pixels around each pixel.
Brightness is the largest of a pixel's three values; beyond the border it continues. If it grows
from the first place to the second by at least ``ratio`` times the image's range of brightness, the
pixel has an ON event, and if it falls by as much an OFF event. The way from the first place to the
second is the frame's own. Where the pair lies within the 3x3 pixels is drawn in training, for each
frame and sample (the authors draw for a whole batch), and fixed in evaluation. An image without any
range has no events (in the authors' code: all of them).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetdist.data.transfer import on_device
from tetdist.order import named_stream, uniforms

# Offset (rows, columns) from a frame's first place to its second.
_WAYS = np.array([(-1, -2), (-1, 2), (2, -1), (-2, -1), (0, 1), (-1, 0), (-1, 1), (-1, -1)])
# The first place (row, column, from 0) in evaluation.
_EVALUATED = np.array([(2, 2), (1, 0), (0, 2), (2, 1), (1, 1), (1, 1), (1, 1), (1, 1)])
_STREAM = named_stream("images as events")
_Places = npt.NDArray[np.int64]


def places(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> _Places:
    """Draw the frames' first places (B, 8, 2), row and column, for the samples of an epoch."""
    counts = 3 - abs(_WAYS)
    draws = uniforms(seed, epoch, positions, counts.size, _STREAM)
    corners = (draws.reshape(-1, *counts.shape) * counts).astype(np.int64)
    return corners + np.maximum(-_WAYS, 0)


def as_events(images: Tensor, ratio: float, drawn: _Places | None) -> Tensor:
    """Convert images to ON and OFF events, (B, 2, H, W) uint8, with a bit for each of 8 frames.

    Args:
        images: (B, H, W, 3), uint8.
        drawn: First places that `places` drew; None: those of evaluation.
    """
    count, height, width = images.shape[:3]
    around = _brightness(images)
    silent = _highest_silent(around, ratio)
    firsts = np.tile(_EVALUATED, (count, 1, 1)) if drawn is None else drawn
    pairs = np.stack([firsts, firsts + _WAYS], 2)  # (B, 8, 2, row and column)
    if not images.is_cpu:
        bits = images.new_zeros(2, count, height, width)
        limits = silent.gather(1, around.flatten(1).long()).view_as(around)
        windows = [one.unfold(1, height, 1).unfold(2, width, 1) for one in (around, limits)]
        samples = torch.arange(count, device=images.device)
        chosen = on_device(torch.from_numpy(pairs), images.device).permute(1, 2, 3, 0)
        _collect(bits, windows, [[(samples, *place) for place in pair] for pair in chosen])
        return bits.transpose(0, 1)
    # Several times as fast as torch: an image is one long row, and a place is an offset in it.
    wide, bits = width + 2, images.new_empty(count, 2, height, width)
    shape = (2 * wide + 3, height * wide - 2)
    starts = (pairs @ (wide, 1)).tolist()
    for k, (levels, table) in enumerate(zip(around.numpy(), silent.numpy(), strict=True)):
        both = (levels, _looked_up(table, levels))
        shifted = [np.ndarray(shape, np.uint8, one, strides=(1, 1)) for one in both]
        own = np.zeros((2, height * wide), np.uint8)
        _collect(own[:, :-2], shifted, starts[k])
        bits[k].numpy()[:] = own.reshape(2, height, wide)[..., :width]
    return bits


def frames(bits: Tensor) -> Tensor:
    """Return the frames of events, (B, 8, 2, H, W) uint8 of 0 and 1, ON before OFF."""
    places = 1 << torch.arange(len(_WAYS), dtype=torch.uint8, device=bits.device)
    return (bits[:, None] & places.view(-1, 1, 1, 1)).clamp_(max=1)


def _collect(bits: Any, windows: Any, pairs: Any) -> None:
    """Set ON and OFF bits (2, ...) by the windows of brightness and limits at pairs' places."""
    brightness, limits = windows
    for first, second in reversed(pairs):
        for plane, low, high in ((bits[0], first, second), (bits[1], second, first)):
            plane += plane
            plane += (brightness[high] > limits[low]).view(plane.dtype)


def _brightness(images: Tensor) -> Tensor:
    """Return the brightness of images and of one more pixel on each side, (B, H + 2, W + 2)."""
    count, height, width = images.shape[:3]
    around = images.new_empty(count, height + 2, width + 2)
    inner = around[:, 1:-1, 1:-1]
    if images.is_cpu:
        for pixels, found in zip(images.numpy(), inner.numpy(), strict=True):
            # Of any three neighbouring values: several times as fast as pixel by pixel.
            values = pixels.reshape(-1)
            highest = np.maximum(np.maximum(values[:-2], values[1:-1]), values[2:])
            found[:] = highest[::3].reshape(height, width)
    else:
        inner.copy_(images.amax(-1))
    around[:, 0], around[:, -1] = around[:, 1], around[:, -2]
    around[:, :, 0], around[:, :, -1] = around[:, :, 1], around[:, :, -2]
    return around


def _highest_silent(brightness: Tensor, ratio: float) -> Tensor:
    """Return for each image and level the highest other level without an event: (B, 256) uint8.

    Levels are compared in float32, as the authors do, whose rounding decides at the threshold.
    """
    levels = torch.arange(256, device=brightness.device)
    values = levels.float() * (1 / 255)
    extent = values[brightness.amax((1, 2)).long()] - values[brightness.amin((1, 2)).long()]
    threshold = torch.where(extent > 0, extent * ratio, 1.0)[:, None]
    # Rounding decides only at this level: lower ones are silent, higher ones are not.
    nearest = levels + (threshold * 255).round().long()
    loud = values[nearest.clamp(max=255)] - values >= threshold
    return torch.where(loud, nearest - 1, nearest).clamp_(max=255).to(torch.uint8)


def _looked_up(table: Any, levels: Any) -> Any:
    """Return a table's values of levels, both arrays of bytes."""
    more, both = table[0], (np.arange(256, dtype=np.uint8), levels)
    # An array, since numpy's minimum with a number is slow.
    every, shifted = (np.minimum(one, np.full_like(one, 255 - more)) + more for one in both)
    # Most tables add the same to all levels, which is several times as fast.
    return shifted if np.array_equal(every, table) else table[levels]
