"""AutoAugment (Cubuk et al., 2019): policies found by search, as torchvision defines them.

A policy has 25 sub-policies of two operations; a sample gets one of these, and each operation with
its own probability.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tetdist.data.transforms import AUTO_AUGMENT_DRAWS, Operation

Policy = Literal["cifar10", "imagenet"]

# An operation is a name, a probability in tenths, and a level from 0 to 9 (- where it has none).
_CIFAR10 = """
invert 1 - contrast 2 6; rotate 7 2 translate_x 3 9; sharpness 8 1 sharpness 9 3;
shear_y 5 8 translate_y 7 9; autocontrast 5 - equalize 9 -; shear_y 2 7 posterize 3 7;
saturation 4 3 brightness 6 7; sharpness 3 9 brightness 7 9; equalize 6 - equalize 5 -;
contrast 6 7 sharpness 6 5; saturation 7 7 translate_x 5 8; equalize 3 - autocontrast 4 -;
translate_y 4 3 sharpness 2 6; brightness 9 6 saturation 2 8; solarize 5 2 invert 0 -;
equalize 2 - autocontrast 6 -; equalize 2 - equalize 6 -; saturation 9 9 equalize 6 -;
autocontrast 8 - solarize 2 8; brightness 1 3 saturation 7 0; solarize 4 5 autocontrast 9 -;
translate_y 9 9 translate_y 7 9; autocontrast 9 - solarize 8 3; equalize 8 - invert 1 -;
translate_y 7 9 autocontrast 9 -
"""
_IMAGENET = """
posterize 4 8 rotate 6 9; solarize 6 5 autocontrast 6 -; equalize 8 - equalize 6 -;
posterize 6 7 posterize 6 6; equalize 4 - solarize 2 4; equalize 4 - rotate 8 8;
solarize 6 3 equalize 6 -; posterize 8 5 equalize 10 -; rotate 2 3 solarize 6 8;
equalize 6 - posterize 4 6; rotate 8 8 saturation 4 0; rotate 4 9 equalize 6 -;
equalize 0 - equalize 8 -; invert 6 - equalize 10 -; saturation 6 4 contrast 10 8;
rotate 8 8 saturation 10 2; saturation 8 8 solarize 8 7; sharpness 4 7 invert 6 -;
shear_x 6 5 equalize 10 -; saturation 4 0 equalize 6 -; equalize 4 - solarize 2 4;
solarize 6 5 autocontrast 6 -; invert 6 - equalize 10 -; saturation 6 4 contrast 10 8;
equalize 8 - equalize 6 -
"""
_SubPolicy = list[tuple[str, float, int]]


def _parsed(text: str) -> list[_SubPolicy]:
    def operation(name: str, tenths: str, level: str) -> tuple[str, float, int]:
        return name, int(tenths) / 10, 0 if level == "-" else int(level)

    words = [part.split() for part in text.split(";")]
    return [[operation(*part[:3]), operation(*part[3:])] for part in words]


_POLICIES: dict[Policy, list[_SubPolicy]] = {
    "cifar10": _parsed(_CIFAR10),
    "imagenet": _parsed(_IMAGENET),
}


def auto_augment(
    draws: npt.NDArray[np.float64], policy: Policy, image_size: int
) -> list[list[Operation]]:
    """Choose the operations that each sample gets.

    Args:
        draws: (B, AUTO_AUGMENT_DRAWS) uniform in [0, 1): which sub-policy; of its two operations,
            whether they are done and in which of two directions.
        image_size: Pixels, of which translations are a share.
    """
    assert draws.shape[1] == AUTO_AUGMENT_DRAWS
    sub_policies = _POLICIES[policy]
    found = []
    for choice, *chances in draws.tolist():
        chosen = sub_policies[int(choice * len(sub_policies))]
        found.append(
            [
                Operation(name, _value(name, level, -1 if back < 0.5 else 1, image_size))
                for (name, probability, level), chance, back in zip(
                    chosen, chances[:2], chances[2:], strict=True
                )
                if chance < probability
            ]
        )
    return found


def _value(name: str, level: int, sign: int, image_size: int) -> float:
    """An operation's value at a level from 0 to 9."""
    match name:
        case "brightness" | "saturation" | "contrast" | "sharpness":
            return 1 + sign * _between(0, 0.9, level)
        case "shear_x" | "shear_y":
            return sign * _between(0, 0.3, level)
        case "translate_x" | "translate_y":
            return sign * _between(0, 150 / 331 * image_size, level)
        case "rotate":
            return sign * _between(0, 30, level)
        case "posterize":
            return 8 - round(level / (9 / 4))
        case "solarize":  # a threshold: what is above is inverted
            return _between(255, 0, level)
        case "autocontrast" | "equalize" | "invert":  # their value is not used
            return 0.0
        case _:
            raise AssertionError(name)


def _between(least: float, most: float, level: int) -> float:
    # Torch computes it in float32, as torchvision does: another last digit can be another pixel.
    return torch.linspace(least, most, 10)[level].item()
