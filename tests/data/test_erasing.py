"""Random erasing: its rectangles are timm's with the same draws, and its noise has the same bits
on a GPU, whose part is run here on tensors of the CPU."""

import numpy as np
import pytest
import torch
from timm.data import random_erasing

from tetdist.config.sections.data import ErasingSection
from tetdist.data.erasing import _BOXES, erase, erased
from tetdist.order import hashed, uniforms

POSITIONS = np.arange(60)


class Draws:
    """Takes the place of Python's generator, and answers with what was put in."""

    def __init__(self, draws):
        (self.first, _), self.box = draws[:2], draws[2:]
        self.tries, self.corner = 0, iter(self.box[20:])

    def random(self):
        return self.first

    def uniform(self, low, high):
        # An area and a ratio in turn, of which ours has ten in a row.
        which = self.tries // 2 + 10 * (self.tries % 2)
        self.tries += 1
        return low + (high - low) * self.box[which]

    def randint(self, low, high):
        return low + int(next(self.corner) * (high - low + 1))


def test_rectangles_are_timms(monkeypatch):
    erasing = ErasingSection(probability=0.7, mode="const")
    # With this seed a try has a side of just 24.
    what = erased(2, 2, POSITIONS, 24, erasing)
    theirs = random_erasing.RandomErasing(0.7, mode="const", device="cpu")
    draws = uniforms(2, 2, POSITIONS, 2 + 22, _BOXES)
    batch, some = torch.ones(len(POSITIONS), 3, 24, 24), 0
    erase(batch, what)
    for got, row in zip(batch, draws, strict=True):
        monkeypatch.setattr(random_erasing, "random", Draws(row.tolist()))
        expected = theirs(torch.ones(3, 24, 24))
        assert torch.equal(got, expected)
        some += not expected.all()
    assert 30 < some < 55


def images():
    """(B, 3, H, W), of numbers that noise has not."""
    return torch.full((len(POSITIONS), 3, 24, 24), 9.0)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_rectangles_and_nothing_else_are_erased(mode):
    what = erased(1, 0, POSITIONS, 24, ErasingSection(probability=0.5, mode=mode))
    batch = images()
    erase(batch, what)
    for image, box, key in zip(batch, what.boxes, what.keys, strict=True):
        untouched = torch.ones(24, 24, dtype=torch.bool)
        top, left, bottom, right = box
        untouched[top:bottom, left:right] = False
        assert torch.equal((image == 9).all(0), untouched)
        assert (
            len(image[:, ~untouched].unique()) <= {"pixel": 24**2 * 3, "rand": 3, "const": 1}[mode]
        )
        for row, column in (~untouched).nonzero()[::50].tolist() if mode == "pixel" else ():
            (word,) = hashed(np.array([key]), np.array([24 * row + column], np.uint64))
            bits = np.array([int(word) >> by & 0xFFFF for by in (48, 32, 16)])
            noise = torch.special.ndtri(torch.from_numpy((bits + 0.5) / 2**16)).float()
            assert torch.equal(image[:, row, column], noise)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_host_waits_for_no_pixel(mode):
    """Tensors without numbers cannot be waited for."""
    what = erased(1, 0, POSITIONS, 24, ErasingSection(probability=0.5, mode=mode))
    erase(torch.empty(len(POSITIONS), 3, 24, 24, device="meta"), what)


def test_erasing_depends_on_seed_epoch_and_position_alone():
    erasing = ErasingSection(probability=1.0)
    whole = erased(1, 0, POSITIONS, 24, erasing)
    alone = erased(1, 0, POSITIONS[40:41], 24, erasing)
    first, second = images(), images()[:1]
    erase(first, whole)
    erase(second, alone)
    assert torch.equal(first[40], second[0])
    for seed, epoch in ((2, 0), (1, 1)):
        other = erased(seed, epoch, POSITIONS, 24, erasing)
        assert not np.isin(other.keys, whole.keys).any()
        assert not np.array_equal(other.boxes, whole.boxes)
    nothing = erased(1, 0, POSITIONS, 24, ErasingSection(probability=0.0))
    assert not nothing.boxes.any()
