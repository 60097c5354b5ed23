"""Published training curves on ImageNet, beside which a run is shown while it trains.

published_curves.yaml holds them. A run with other epochs, batches or augmentation has another
curve, and the user must judge whether that explains a gap.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError

CURVES = Path(__file__).with_name("published_curves.yaml")
# Size of the training split and number of classes of ImageNet, which all published curves use.
IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
HELD_OUT = 0.05  # largest fraction of missing images with which a run still trains on ImageNet
# Tolerance in points of top-1 for differences between seeds and between positions in an epoch. It
# is our choice, wide where curves are steep, since nobody has published several seeds. It is at
# most SHARE of the reference's top-1, which matters in the first epochs.
EARLY, LATER, SHARE = 5.0, 1.5, 0.5
STEEP_EPOCHS = 10


@dataclass(frozen=True)
class Reference:
    """Published training on ImageNet."""

    name: str
    top1: dict[float, float]  # percent, by epoch

    def at(self, epochs: float) -> float | None:
        """Return the top-1 after a number of epochs, interpolated in the logarithm of the epochs;
        None before the first and after the last published one."""
        known = sorted(self.top1)
        if not (1 - HELD_OUT) * known[0] <= epochs <= 1.01 * known[-1]:
            return None
        # An epoch has fewer images if some are held out, or without the incomplete batch.
        top1 = [self.top1[epoch] for epoch in known]
        return float(np.interp(math.log(epochs), np.log(known), top1))

    def obstacle(self, classes: int) -> str | None:
        """Return why a run with these data cannot be compared with it; None if it can."""
        if classes == IMAGENET_CLASSES:
            return None
        theirs = f"{self.name} has ImageNet's {IMAGENET_CLASSES:,} classes"
        return f"{theirs} and these data have {classes:,}"

    def beside(self, images: int) -> dict[str, float]:
        """Return the metrics' entry: the published top-1 after as many images, if known."""
        top1 = self.at(images / IMAGES)
        return {} if top1 is None else {"reference_top1": top1}

    def warning(self, top1: float, images: int) -> str | None:
        """Return a warning if a run is far behind after as many of ImageNet's images."""
        epochs = images / IMAGES
        there = self.at(epochs)
        if there is None or there - top1 <= tolerated(epochs, there):
            return None
        return (
            f"{there - top1:.1f} points behind {self.name}, which had {there:.2f} % after as many "
            "images"
        )


def references() -> dict[str, Reference]:
    """Return all published curves, by name."""
    return {
        name: Reference(name, {float(epoch): top1 for epoch, top1 in about["top1"].items()})
        for name, about in read_yaml(CURVES).items()
    }


def find_reference(name: str) -> Reference:
    """Return the published curve that the configuration's key ``reference`` names.

    Raises:
        UserError: There is no such curve; the text lists all.
    """
    known = references()
    if name not in known:
        raise UserError(
            f"reference: there is no published curve {name!r}; choose from {', '.join(known)}"
        )
    return known[name]


def tolerated(epochs: float, top1: float) -> float:
    """Return the points by which a run may be behind a reference with this top-1 and epoch."""
    return min(EARLY if epochs <= STEEP_EPOCHS else LATER, SHARE * top1)


def is_imagenet(images: float) -> bool:
    """Return whether a training split of this size can be ImageNet's, or most of it."""
    return abs(images / IMAGES - 1) <= HELD_OUT
