"""Operations on event frames against torchvision's."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing, functional

from tetdist import order
from tetdist.data.event_augment import (
    OPERATION_DRAWS,
    OPERATION_STREAM,
    Operation,
    operated,
    operations,
)

T, H, W = 3, 22, 30


def some_frames(dtype=np.uint8):
    return np.random.default_rng(0).integers(1, 9, (T, 2, H, W)).astype(dtype)


def drawn(count, columns, stream=OPERATION_STREAM):
    return order.uniforms(3, 1, np.arange(count), columns, stream)


def erased(frames, numbers, patch):
    """What torchvision's RandomErasing makes of frames if it draws these numbers."""
    left = itertools.chain([numbers[0], 0.5], numbers[1:])

    def uniform(tensor, low, high):
        return tensor.fill_(low + (high - low) * next(left))

    def integer(low, high, **_):
        return torch.tensor([low + int((high - low) * next(left))])

    with patch.context() as context:
        context.setattr(torch.Tensor, "uniform_", uniform)
        context.setattr(torch, "randint", integer)
        context.setattr(torch, "rand", lambda *_: torch.zeros(1))
        return RandomErasing(p=1, scale=(0.001, 0.11), ratio=(1, 1))(frames)


def snn_augment_wide(frames, row, patch):
    """The recipe's definition, in torchvision's words, on (T, 2, H, W) in float32."""
    which, first, second, third = row
    kind = int(6 * which)

    def magnitude(most):
        value = float(torch.linspace(-most, most, 31)[int(first * 31)])
        return -value if second < 0.5 else value

    def affine(across=0, down=0, shear=0.0):
        return functional.affine(frames, 0.0, [across, down], 1.0, [shear, 0.0])

    match kind:
        case 0:
            return frames
        case 1:
            return affine(shear=math.degrees(magnitude(0.3)))
        case 2:
            return affine(across=int(magnitude(5.0)))
        case 3:
            return affine(down=int(magnitude(5.0)))
        case 4:
            return functional.rotate(frames, magnitude(30.0))
        case _:
            return erased(frames, [first, second, third], patch)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_snn_augment_wide_is_torchvisions_with_the_same_draws(dtype, monkeypatch):
    draws, frames = drawn(90, OPERATION_DRAWS), some_frames(dtype)
    seen = Counter[str]()
    for row, operation in zip(
        draws.tolist(), operations(draws, "snn_augment_wide", (H, W)), strict=True
    ):
        ours = operated(frames.copy(), operation)
        theirs = snn_augment_wide(torch.from_numpy(frames.astype(np.float32)), row, monkeypatch)
        assert ours.dtype == dtype
        assert np.array_equal(ours.astype(np.float32), theirs.numpy()), (row, operation)
        seen[operation.name] += 1
    assert set(seen) == {"identity", "shear_x", "translate", "rotate", "cutout"}
    assert seen["translate"] > seen["rotate"]  # along x and along y


def test_nda_is_torchvisions_with_the_same_draws():
    draws, frames = drawn(60, OPERATION_DRAWS), some_frames()
    whole = torch.from_numpy(frames.astype(np.float32))
    seen = set()
    for (which, first, second, _), operation in zip(
        draws.tolist(), operations(draws, "nda", (H, W)), strict=True
    ):
        angle, rolls = -30 + 60 * first, (int(11 * first) - 5, int(11 * second) - 5)
        expected = (
            lambda rolls=rolls: torch.roll(whole, rolls, (2, 3)),
            lambda angle=angle: functional.rotate(whole, angle),
            lambda angle=angle: functional.affine(whole, 0.0, [0, 0], 1.0, [angle, 0.0]),
        )[int(3 * which)]()
        assert np.array_equal(operated(frames.copy(), operation), expected.numpy())
        seen.add(operation.name)
    assert seen == {"roll", "rotate", "shear_x"}


def test_a_square_that_does_not_fit_is_none():
    """As torchvision's, which then erases nothing."""
    cut = operations(np.array([[0.99, 0.99, 0.5, 0.5]]), "snn_augment_wide", (2, 100))
    assert cut == [Operation("cutout", (0, 0, 0, 0))]


def test_draws_are_of_streams_of_their_own():
    positions = np.arange(4)
    streams = (order.AUGMENTATION, order.MIXING, OPERATION_STREAM)
    draws = [order.uniforms(0, 0, positions, 50, stream) for stream in streams]
    assert len(np.unique(draws)) == 3 * 4 * 50
