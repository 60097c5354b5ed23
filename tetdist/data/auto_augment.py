"""AutoAugment (Cubuk et al., 2019): policies found by search, as torchvision defines them.

A policy has 25 sub-policies of two operations. Each sample gets one sub-policy, and applies each of
its operations with that operation's probability.
"""

import functools
import re
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from tetdist.data.transforms import AUTO_AUGMENT_DRAWS, Operation

Policy = Literal["cifar10", "imagenet"]

_SubPolicy = list[tuple[str, float, int]]


@functools.cache
def _sub_policies(policy: Policy) -> list[_SubPolicy]:
    """Return torchvision's table: each operation's name, probability and level from 0 to 9."""

    def ours(name: str, probability: float, level: int | None) -> tuple[str, float, int]:
        name = re.sub("([XY])$", r"_\1", name).lower().replace("color", "saturation")
        return name, probability, level or 0

    policies = AutoAugment(AutoAugmentPolicy(policy)).policies
    return [[ours(*operation) for operation in operations] for operations in policies]


def auto_augment(
    draws: npt.NDArray[np.float64], policy: Policy, image_size: int
) -> list[list[Operation]]:
    """Choose the operations of each sample.

    Args:
        draws: (B, AUTO_AUGMENT_DRAWS) uniform in [0, 1): for the sub-policy, and for each of its
            two operations whether it is applied and in which direction.
        image_size: Image size in pixels, to which translations are relative.
    """
    assert draws.shape[1] == AUTO_AUGMENT_DRAWS
    sub_policies = _sub_policies(policy)
    chosen_operations = []
    for choice, *chances in draws.tolist():
        chosen = sub_policies[int(choice * len(sub_policies))]
        chosen_operations.append(
            [
                Operation(name, _value(name, level, -1 if back < 0.5 else 1, image_size))
                for (name, probability, level), chance, back in zip(
                    chosen, chances[:2], chances[2:], strict=True
                )
                if chance < probability
            ]
        )
    return chosen_operations


def _value(name: str, level: int, sign: int, image_size: int) -> float:
    """Return an operation's value at a level from 0 to 9."""
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
    # In float32, as in torchvision: a different last digit could move a pixel.
    return torch.linspace(least, most, 10)[level].item()
