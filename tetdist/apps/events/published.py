"""Frames of CIFAR10-DVS as in the published code of the TET paper.

Its arrays are [polarity, x, y] with y from the bottom: an image rotated by 90 degrees, with 1 where
there was any event. The loader then uses the two polarities as brightness and opacity of an 8-bit
"LA" image, and resizes it with Pillow. Pillow multiplies brightness by opacity before resizing and
divides by it afterwards, as is right for images. So the OFF channel becomes the fraction of ON
pixels that also had OFF events.
"""

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.recording import Sensor

OPAQUE = 255


def published_frames(
    counts: npt.NDArray[np.float64], size: Sensor | None
) -> npt.NDArray[np.float64]:
    """Convert counts (T, 2, H, W) to frames (T, 2, width, height), multiples of 1 / 255.

    Args:
        counts: Number of events of each pixel, OFF before ON.
        size: Width and height of the returned frames; None: the sensor's, rotated.
    """
    from PIL import Image

    turned = np.ascontiguousarray((counts > 0)[:, :, ::-1].transpose(0, 3, 2, 1))
    frames = [Image.fromarray(OPAQUE * frame.astype(np.uint8), "LA") for frame in turned]
    if size is not None:
        frames = [frame.resize(size, Image.Resampling.BILINEAR) for frame in frames]
    levels = np.stack([np.asarray(frame) for frame in frames])
    return levels.transpose(0, 3, 1, 2) / OPAQUE
