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
# Largest fraction of missing images (held out, or in an incomplete batch) with which a first epoch
# is compared.
HELD_OUT = 0.05


# Measurements along a training; the training's own are means over the epoch that ends.
MEASURED = ("top1", "train_loss", "train_top1")


@dataclass(frozen=True)
class Reference:
    """Published training on ImageNet."""

    name: str
    curves: dict[str, dict[float, float]]  # by measurement, by epoch; accuracies in percent

    def at(self, epochs: float, measured: str = "top1") -> float | None:
        """Return a measurement after a number of epochs, interpolated in the logarithm of the
        epochs; None before the first and after the last published one, or if none is published."""
        curve = self.curves[measured]
        known = sorted(curve)
        if not known or not (1 - HELD_OUT) * known[0] <= epochs <= 1.01 * known[-1]:
            return None
        values = [curve[epoch] for epoch in known]
        return float(np.interp(math.log(epochs), np.log(known), values))

    def obstacle(self, classes: int) -> str | None:
        """Return why a run with these data cannot be compared with it; None if it can."""
        if classes == IMAGENET_CLASSES:
            return None
        published = f"{self.name} has ImageNet's {IMAGENET_CLASSES:,} classes"
        return f"{published} and these data have {classes:,}"

    def beside(self, images: int) -> dict[str, float]:
        """Return the metrics' entries: the published values after as many images, if known."""
        values = ((name, self.at(images / IMAGES, name)) for name in MEASURED)
        return {f"reference_{name}": value for name, value in values if value is not None}


def references() -> dict[str, Reference]:
    """Return all published curves, by name."""
    return {
        name: Reference(
            name,
            {
                measured: {float(epoch): value for epoch, value in about.get(measured, {}).items()}
                for measured in MEASURED
            },
        )
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
