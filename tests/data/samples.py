"""What several tests of the data room share."""

from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image that no flip, turn or shift leaves as it is."""
    rows = np.linspace(0, 1, height)[:, None]
    columns = np.linspace(0, 1, width)[None, :]
    phase = np.random.default_rng(seed).uniform(0, 6, 6)
    channels = [
        np.sin(5 * rows + 3 * columns + phase[i]) + np.cos(2 * rows - 7 * columns + phase[i + 3])
        for i in range(3)
    ]
    return Image.fromarray((np.stack(channels, axis=2) * 60 + 127).astype(np.uint8))
