"""Frames of CIFAR10-DVS as the code makes them that the authors of the TET paper published.

Their arrays are [polarity, x, y], and their y begins at the bottom: a picture turned by a quarter.
It holds 1 where there was any event. Their loader then takes the two polarities for the brightness
and the opacity of an "LA" picture, in 8 bits, and has Pillow resize it. Pillow weights brightness
with opacity before it resizes and divides by it afterwards, as is right for a picture: so what
remains of OFF is the share of the ON pixels that had OFF events, too.
"""

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.recording import Sensor

OPAQUE = 255


def published_frames(
    counts: npt.NDArray[np.float64], size: Sensor | None
) -> npt.NDArray[np.float64]:
    """Make frames (T, 2, width, height), multiples of 1 / 255, of counts (T, 2, H, W).

    Args:
        counts: Events of each pixel, OFF before ON.
        size: Width and height of the frames as they are returned; None for the sensor's, turned.
    """
    from PIL import Image

    turned = np.ascontiguousarray((counts > 0)[:, :, ::-1].transpose(0, 3, 2, 1))
    pictures = [Image.fromarray(OPAQUE * frame.astype(np.uint8), "LA") for frame in turned]
    if size is not None:
        pictures = [picture.resize(size, Image.Resampling.BILINEAR) for picture in pictures]
    levels = np.stack([np.asarray(picture) for picture in pictures])
    return levels.transpose(0, 3, 1, 2) / OPAQUE
