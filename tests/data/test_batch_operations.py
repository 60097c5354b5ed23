"""Operations on whole batches, as a GPU does them: against torchvision's on each image by itself,
and against Pillow's where torchvision has none.

They are run here on tensors of the CPU, which are the same to them.
"""

import dataclasses

import numpy as np
import pytest
import torch
from samples import picture
from torch import Tensor

from tetdist.data import auto_augment, pixels
from tetdist.data.batch_operations import CHANGES, operate
from tetdist.data.transforms import AUTO_AUGMENT_DRAWS, Operation, color_jitter
from tetdist.order import uniforms

OUTPUT = pixels.Output(size=0, mean=(0.485, 0.456, 0.406), std=(1, 1, 1), interpolation="bicubic")
ONLY_TIMMS = ("solarize_add", "gaussian_blur")
TORCHVISIONS = [name for name in CHANGES if name not in ONLY_TIMMS]


def images(count: int, height: int, width: int) -> Tensor:
    """Pictures, noise, one colour, and pixels of nothing or everything, in turn; (B, H, W, 3)."""
    noise = np.random.default_rng(0)
    kinds = (
        np.array(picture(height, width)),
        noise.integers(0, 256, (height, width, 3), np.uint8),
        np.full((height, width, 3), 77, np.uint8),
        255 * noise.integers(0, 2, (height, width, 3)).astype(np.uint8),
    )
    return torch.stack([torch.from_numpy(kinds[k % 4]) for k in range(count)])


def product_of_rounded(places: Tensor, matrix: Tensor) -> Tensor:
    """The product of (1, N, 3) and (1, 3, 2) by products and sums that are rounded one by one.

    torch's own fuses some of them on some processors, and a shear has many places half-way between
    two pixels.
    """
    x, y, one = places[..., None].unbind(2)
    return x * matrix[:, 0] + y * matrix[:, 1] + one * matrix[:, 2]


def one_by_one(batch: Tensor, operations: list[list[Operation]]) -> Tensor:
    """The same with torchvision's functions for tensors, an image at a time."""
    changed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bmm", product_of_rounded)  # of places with a shear or rotation
        for image, of_image in zip(batch, operations, strict=True):
            planes = image.permute(2, 0, 1)
            for name, value in of_image:
                planes = pixels._OPERATIONS[name](planes, value)
            changed.append(planes.permute(1, 2, 0))
    return torch.stack(changed)


def values_of(name: str, size: int) -> list[float]:
    """All that AutoAugment may ask for, or the colours' jitter."""
    if name == "hue":
        return [-0.5, -0.3, -0.1, 0.0, 0.07, 0.25, 0.5]
    return [auto_augment._value(name, level, sign, size) for level in range(10) for sign in (-1, 1)]


@pytest.mark.parametrize("size", [(40, 30), (33, 65)])
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_each_operation_is_torchvisions_bitwise(name, size):
    values = values_of(name, size[1])
    operations = [[Operation(name, value)] for value in values for _ in range(4)]
    batch = images(len(operations), *size)
    expected = one_by_one(batch, operations)
    operate(batch, operations, OUTPUT)
    assert torch.equal(batch, expected)


def test_a_batch_of_mixed_operations_is_torchvisions():
    count = 60
    draws = uniforms(1, 0, np.arange(count), AUTO_AUGMENT_DRAWS)
    first = auto_augment.auto_augment(draws, "cifar10", 48)
    second = color_jitter(uniforms(2, 0, np.arange(count), 8), (0.4, 0.4, 0.4, 0.1))
    operations = [a + b for a, b in zip(first, second, strict=True)]
    operations[3] = []
    batch = images(count, 48, 48)
    expected = one_by_one(batch, operations)
    operate(batch, operations, OUTPUT)
    assert torch.equal(batch, expected)


TIMMS_VALUES = {
    "warp_rotate": [-30.0, -13.3, 0.0, 0.7, 27.0, 90.0],
    "warp_shear_x": [-0.3, 0.0, 0.271],
    "warp_shear_y": [-0.3, 0.0, 0.271],
    "warp_translate_x": [-14.9, 0.0, 0.4, 13.0],
    "warp_translate_y": [-14.9, 0.0, 0.4, 13.0],
    "posterize": [0],
    "solarize_add": [0, 9, 128],
    "gaussian_blur": [0.1, 0.37, 0.9, 1.41, 1.5, 2.0],
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 30), (33, 65)])
def test_what_only_timm_has_is_pillows_bitwise(interpolation, size):
    output = dataclasses.replace(OUTPUT, interpolation=interpolation)
    each = [Operation(name, value) for name, values in TIMMS_VALUES.items() for value in values]
    operations = [[operation] for operation in each for _ in range(4)]
    batch = images(len(operations), *size)
    expected = [
        pixels.operated(image, one, output) for image, one in zip(batch, operations, strict=True)
    ]
    operate(batch, operations, output)
    for got, image, one in zip(batch, expected, operations, strict=True):
        assert torch.equal(got, image), one
