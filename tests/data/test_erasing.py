"""Random erasing: its rectangles are timm's with the same draws, and its noise has the same bits
on a GPU, whose part is run here on tensors of the CPU."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import random_erasing
from torch import Tensor

from tetdist.data.erasing import _BOXES, Erasing, erase, erase_batch, erased, normals
from tetdist.order import position_keys, uniforms

POSITIONS = np.arange(60)


class Draws:
    """Takes the place of Python's generator, and answers with what was put in."""

    def __init__(self, first: list[float], boxes: np.ndarray) -> None:
        self.first, self.boxes = list(first), [box.tolist() for box in boxes]
        self.number = self.tries = 0

    def random(self) -> float:
        return self.first.pop(0)

    def uniform(self, low: float, high: float) -> float:
        # An area and a ratio in turn, of which ours has ten in a row.
        which = self.tries // 2 + 10 * (self.tries % 2)
        self.tries += 1
        return low + (high - low) * self.boxes[self.number][which]

    def randint(self, low: int, high: int) -> int:
        if low == 1:
            return low + int(self.first.pop(0) * (high - low + 1))
        box = self.boxes[self.number]
        value = box[20 if len(box) == 22 else 21]
        box.append(0.0)
        if len(box) == 24:
            self.number, self.tries = self.number + 1, 0
        return low + int(value * (high - low + 1))


@pytest.mark.parametrize("count", [1, 3])
def test_rectangles_are_timms(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    erasing = Erasing(0.7, "const", count)
    what = erased(5, 2, POSITIONS, 24, erasing)
    theirs = random_erasing.RandomErasing(0.7, mode="const", max_count=count, device="cpu")
    draws = uniforms(5, 2, POSITIONS, 2 + 22 * count, _BOXES)
    some = 0
    for k, row in enumerate(draws):
        monkeypatch.setattr(random_erasing, "random", Draws(row[:2], row[2:].reshape(count, 22)))
        expected, got = theirs(torch.ones(3, 24, 24)), np.ones((24, 24, 3), np.float32)
        erase(got, what, k)
        assert torch.equal(torch.from_numpy(got).permute(2, 0, 1), expected)
        some += not expected.all()
    assert 30 < some < 55


def images(count: int = len(POSITIONS)) -> Tensor:
    """(B, H, W, 3), of numbers that noise has not."""
    return torch.full((count, 24, 24, 3), 9.0)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_a_batch_is_erased_as_its_images_are_to_the_bit(mode: Any) -> None:
    what = erased(1, 0, POSITIONS, 24, Erasing(0.5, mode, 2))
    one_by_one, batch = images(), images().permute(0, 3, 1, 2)
    for k, image in enumerate(one_by_one):
        erase(image.numpy(), what, k)
    erase_batch(batch, what)
    assert torch.equal(batch.permute(0, 2, 3, 1), one_by_one)
    for image, boxes in zip(one_by_one, what.boxes, strict=True):
        untouched = torch.ones(24, 24, dtype=torch.bool)
        for top, left, bottom, right in boxes.tolist():
            untouched[top:bottom, left:right] = False
        assert torch.equal((image == 9).all(2), untouched)
        assert len(image[~untouched].unique()) <= {"pixel": 24**2 * 3, "rand": 6, "const": 1}[mode]


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_host_waits_for_no_pixel(mode: Any) -> None:
    """Tensors without numbers cannot be waited for."""
    what = erased(1, 0, POSITIONS, 24, Erasing(0.5, mode, 2))
    erase_batch(torch.empty(len(POSITIONS), 3, 24, 24, device="meta"), what)


def test_erasing_depends_on_seed_epoch_and_position_alone() -> None:
    erasing = Erasing(1.0)
    whole = erased(1, 0, POSITIONS, 24, erasing)
    alone = erased(1, 0, POSITIONS[40:41], 24, erasing)
    first, second = images(1)[0].numpy(), images(1)[0].numpy()
    erase(first, whole, 40)
    erase(second, alone, 0)
    assert np.array_equal(first, second)
    for seed, epoch in ((2, 0), (1, 1)):
        other = erased(seed, epoch, POSITIONS, 24, erasing)
        assert not np.isin(other.keys, whole.keys).any()
        assert not np.array_equal(other.boxes, whole.boxes)
    nothing = erased(1, 0, POSITIONS, 24, dataclasses.replace(erasing, probability=0.0))
    assert not nothing.boxes.any()


def test_noise_is_normal_and_of_each_channel_and_pixel_by_itself() -> None:
    keys = position_keys(0, 0, np.arange(4), 7)
    noise = normals(keys[:, None], np.arange(50_000, dtype=np.uint64))  # (4, 50000, 3)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    columns = [*noise[0].T, noise[1, :, 0], np.roll(noise[0, :, 0], 1)]
    assert np.abs(np.corrcoef(columns) - np.eye(5)).max() < 0.02
