"""Random operations by policies without a search: RandAugment, TrivialAugment, 3-Augment.

RandAugment (Cubuk et al., 2020) and 3-Augment (Touvron et al., 2022) are timm's, TrivialAugment
(Müller and Hutter, 2021) is torchvision's.
"""

import math
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt
import torch

from tetdist.config.rand_augment import RandAugment
from tetdist.data.transforms import Operation
from tetdist.order import named_stream

RandomPolicy = RandAugment | Literal["trivial", "3a"]
RANDOM_POLICY = named_stream("random policy")

_RAND_AUGMENT = (
    *("autocontrast", "equalize", "invert", "warp_rotate", "posterize", "solarize"),
    *("solarize_add", "saturation", "contrast", "brightness", "sharpness"),
    *("warp_shear_x", "warp_shear_y", "warp_translate_x", "warp_translate_y"),
)
_DRAWS_OF_ONE = 5


def num_draws(policy: RandomPolicy) -> int:
    """Return the number of random numbers per sample."""
    match policy:
        case RandAugment():
            return policy.n * _DRAWS_OF_ONE
        case "trivial":
            return 3
        case "3a":
            return 2
        case _:
            assert_never(policy)


def random_operations(
    draws: npt.NDArray[np.float64], policy: RandomPolicy, image_size: int
) -> list[list[Operation]]:
    """Choose the operations of each sample.

    Args:
        draws: (B, num_draws(policy)) uniform in [0, 1).
        image_size: Image size in pixels, to which RandAugment's translations are relative.
    """
    match policy:
        case RandAugment():
            each = draws.reshape(len(draws), policy.n, _DRAWS_OF_ONE).tolist()
            return [
                [
                    _drawn(policy, image_size, choice, *others)
                    for choice, chance, *others in of_a_sample
                    if chance < policy.p
                ]
                for of_a_sample in each
            ]
        case "trivial":
            return [_trivial_augment(*row) for row in draws.tolist()]
        case "3a":
            return [[_three_augment(*row)] for row in draws.tolist()]
        case _:
            assert_never(policy)


def _drawn(
    policy: RandAugment, image_size: int, choice: float, u: float, v: float, back: float
) -> Operation:
    """Return one of RandAugment's operations, with its own magnitude."""
    name = _RAND_AUGMENT[int(choice * len(_RAND_AUGMENT))]
    level = _magnitude(policy, u, v) / 10
    return Operation(name, _value(name, level, -1 if back < 0.5 else 1, policy.inc, image_size))


def _magnitude(policy: RandAugment, u: float, v: float) -> float:
    magnitude = policy.m
    if policy.mstd > 100:
        magnitude *= u
    else:
        # A normal number by the transform of Box and Muller; u is never 1.
        normal = math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
        magnitude += policy.mstd * normal
    return max(0.0, min(magnitude, policy.mmax))


def _value(name: str, level: float, sign: int, increasing: bool, image_size: int) -> float:
    """Return an operation's value at a level, usually from 0 to 1."""
    match name:
        case "brightness" | "saturation" | "contrast" | "sharpness":
            return max(0.1, 1 + sign * (level * 0.9)) if increasing else level * 1.8 + 0.1
        case "warp_shear_x" | "warp_shear_y":
            return sign * (level * 0.3)
        case "warp_translate_x" | "warp_translate_y":
            return sign * (level * 0.45) * image_size
        case "warp_rotate":
            return sign * (level * 30)
        case "posterize":  # bits that are left
            bits = int(level * 4)
            return min(max(4 - bits if increasing else bits, 0), 8)
        case "solarize":  # a threshold: what is not below it is inverted
            threshold = min(256, int(level * 256))
            return 256 - threshold if increasing else threshold
        case "solarize_add":
            return min(128, int(level * 110))
        case "autocontrast" | "equalize" | "invert":  # their value is not used
            return 0.0
        case _:
            raise AssertionError(name)


def _levels(most: float) -> list[float]:
    # Torch computes it in float32, as torchvision does.
    values: list[float] = torch.linspace(0.0, most, 31).tolist()
    return values


_NO_VALUE = [0.0]
# The operations of TrivialAugment's wide space, in torchvision's order, with the values of each.
# Values of those in _SIGNED are negated half of the time.
_TRIVIAL = {
    "identity": _NO_VALUE,
    "shear_x": _levels(0.99),
    "shear_y": _levels(0.99),
    "translate_x": _levels(32.0),
    "translate_y": _levels(32.0),
    "rotate": _levels(135.0),
    "brightness": _levels(0.99),
    "saturation": _levels(0.99),
    "contrast": _levels(0.99),
    "sharpness": _levels(0.99),
    "posterize": [8.0 - round(k / 5) for k in range(31)],
    "solarize": torch.linspace(255.0, 0.0, 31).tolist(),
    "autocontrast": _NO_VALUE,
    "equalize": _NO_VALUE,
}
_FACTORS = ("brightness", "saturation", "contrast", "sharpness")
_SIGNED = (*_FACTORS, "shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def _trivial_augment(choice: float, level: float, back: float) -> list[Operation]:
    name = list(_TRIVIAL)[int(choice * len(_TRIVIAL))]
    if name == "identity":
        return []
    value = _TRIVIAL[name][int(level * len(_TRIVIAL[name]))]
    if name in _SIGNED and back < 0.5:
        value = -value
    return [Operation(name, 1 + value if name in _FACTORS else value)]


def _three_augment(choice: float, level: float) -> Operation:
    match int(choice * 3):
        case 0:
            return Operation("solarize", 128)
        case 1:
            return Operation("saturation", 0.0)  # gray
        case _:
            return Operation("gaussian_blur", 0.1 + 1.9 * level)
