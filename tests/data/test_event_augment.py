"""Operations on event frames against torchvision's, EventDrop against its definition on events."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing, functional

from tetdist import order
from tetdist.data.event_augment import (
    DROP_DRAWS,
    DROP_STREAM,
    OPERATION_DRAWS,
    OPERATION_STREAM,
    Operation,
    dropped,
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


def sample(number, **fixed):
    """Numbers of one sample, some of them fixed by their place, and how they are asked for."""
    numbers = drawn(number + 1, DROP_DRAWS + T * 2 * H * W, DROP_STREAM)[number].copy()
    for i, name in enumerate(("which", "first", "second", "third")):
        numbers[i] = fixed.get(name, numbers[i])
    return (lambda count: numbers[:count]), numbers


def test_a_stretch_of_time_is_dropped():
    frames = some_frames()
    for number in range(30):
        draw, (_, length, begin, *_) = sample(number, which=0.0)
        end = begin + (1 + int(9 * length)) / 10
        expected = frames.copy()
        for t in range(T):
            if begin <= (t + 0.5) / T <= end:
                expected[t] = 0
        left = dropped(frames.copy(), draw, 1.0)
        assert np.array_equal(left, expected if expected.any() else frames)


def test_an_area_is_dropped():
    """That of the original's code: the events in it, whose rows and columns are both between its
    bounds."""
    frames = some_frames()
    rows, columns = np.arange(H)[:, None], np.arange(W)
    for number in range(30):
        draw, (_, share, row, column, *_) = sample(number, which=0.4)
        share = (1 + int(5 * share)) / 20
        x0 = int(max(0, column * W - W * share / 2))
        y0 = int(max(0, row * H - H * share / 2))
        x1, y1 = min(W, x0 + W * share), min(H, y0 + H * share)
        inside = (y0 <= rows) & (rows <= y1) & (x0 <= columns) & (columns <= x1)
        assert inside.any()
        assert np.array_equal(dropped(frames.copy(), draw, 1.0), np.where(inside, 0, frames))


def test_events_are_dropped_at_random():
    frames = some_frames()
    for number in range(5):
        draw, numbers = sample(number, which=0.9)
        share, left = (1 + int(9 * numbers[1])) / 10, dropped(frames.copy(), draw, 1.0)
        assert ((left == 0) | (left == frames)).all()
        assert abs((left == 0).mean() - share) < 0.06


def test_a_share_of_the_samples_is_dropped_from_and_none_loses_all():
    frames = some_frames()[:1]  # one timestep: a stretch of time is all of it, or nothing
    changed, number = Counter[int](), 1000
    draws = drawn(number, DROP_DRAWS + frames.size, DROP_STREAM)
    for numbers in draws:
        left = dropped(frames.copy(), lambda count, n=numbers: n[:count], 0.75)
        assert left.any()
        kind = int(3 * numbers[0] / 0.75) if numbers[0] < 0.75 else 3
        changed[kind] += not np.array_equal(left, frames)
    assert changed[0] == changed[3] == 0
    assert abs(changed[1] / number - 0.25) < 0.05
    assert abs(changed[2] / number - 0.25) < 0.05


def test_draws_are_of_streams_of_their_own():
    positions = np.arange(4)
    streams = (order.AUGMENTATION, order.MIXING, OPERATION_STREAM, DROP_STREAM)
    draws = [order.uniforms(0, 0, positions, 50, stream) for stream in streams]
    assert len(np.unique(draws)) == 4 * 4 * 50
