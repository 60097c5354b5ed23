"""RandAugment, 3-Augment, TrivialAugment: timm's and torchvision's pixels with the same draws."""

import numpy as np
import pytest
import torch
from samples import picture
from timm.data import auto_augment as timms
from torchvision.transforms import TrivialAugmentWide

from tetdist.config.rand_augment import rand_augment
from tetdist.data import pixels
from tetdist.data.rand_augment import num_draws, random_operations
from tetdist.order import uniforms

IMAGE = picture(32, 32)
OUTPUT = pixels.Output(
    size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic"
)
# What timm derives from the same mean and interpolation.
HYPERPARAMETERS = {"img_mean": (124, 116, 104), "interpolation": 3}


class Draws:
    """Takes the place of Python's generator, and answers with what was put in."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def random(self):
        return self.answers.pop(0)

    def gauss(self, mean, deviation):
        return mean + deviation * self.answers.pop(0)

    def uniform(self, low, high):
        return low + (high - low) * self.answers.pop(0)

    def choice(self, items):
        return items[int(self.answers.pop(0) * len(items))]


def posterize(image, bits):
    """Pillow's as it was up to 12, when it took any number of bits; timm asks for 0, too."""
    mask = ~(2 ** (8 - bits) - 1)
    return image.point([level & mask for level in range(256)] * 3)


def ours(policy, count):
    """Draws, operations and pixels of so many samples."""
    draws = uniforms(3, 1, np.arange(count), num_draws(policy))
    operations = random_operations(draws, policy, 32)
    image = torch.from_numpy(np.array(IMAGE))
    return draws, operations, [pixels.operated(image, o, OUTPUT) for o in operations]


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-n1-mstd0.4-inc1",
        "rand-m5-n3-p0.8",
        "rand-m18-mmax20-mstd101-inc1",
        "rand",
    ],
)
def test_rand_augment_is_timms_bitwise(monkeypatch, text):
    policy = rand_augment(text)
    theirs = timms.rand_augment_transform(text, dict(HYPERPARAMETERS))
    monkeypatch.setattr(timms.ImageOps, "posterize", posterize)
    draws, operations, images = ours(policy, 150)
    found = set()
    for row, done, got in zip(draws.reshape(150, policy.n, 5), operations, images, strict=True):
        expected = IMAGE
        for choice, chance, u, v, back in row.tolist():
            normal = (-2 * np.log(1 - u)) ** 0.5 * np.cos(2 * np.pi * v)
            varied = [] if policy.mstd == 0 else [u if policy.mstd > 100 else normal]
            monkeypatch.setattr(timms, "random", Draws(chance, *varied, 1 - back))
            expected = theirs.ops[int(choice * len(theirs.ops))](expected)
        assert torch.equal(got, torch.from_numpy(np.array(expected))), done
        found |= {name for name, _ in done}
    assert len(found) == 15


def test_three_augment_is_timms_bitwise(monkeypatch):
    theirs = timms.auto_augment_transform("3a", dict(HYPERPARAMETERS))
    draws, operations, images = ours("3a", 40)
    for (choice, level), got in zip(draws.tolist(), images, strict=True):
        monkeypatch.setattr(timms, "random", Draws(choice, level))
        assert torch.equal(got, torch.from_numpy(np.array(theirs(IMAGE))))
    assert len({done.name for (done,) in operations}) == 3


def test_trivial_augment_is_torchvisions_bitwise(monkeypatch):
    draws, operations, images = ours("trivial", 300)
    for (choice, level, back), got in zip(draws.tolist(), images, strict=True):
        answers = {14: int(choice * 14), 31: int(level * 31), 2: int(back < 0.5)}
        monkeypatch.setattr(torch, "randint", lambda n, *_, a=answers, **__: torch.tensor([a[n]]))
        assert torch.equal(got, torch.from_numpy(np.array(TrivialAugmentWide()(IMAGE))))
    assert len({name for done in operations for name, _ in done}) == 13


def test_the_mean_comes_in_from_outside():
    assert OUTPUT.fill == HYPERPARAMETERS["img_mean"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rand-m9-w0", "consist of m, n, p, mstd, mmax and inc, each .*unknown: 'w0'"),
        ("rand-m9-tweights", "unknown: 'tweights'"),
        ("rand-m9.5", "m as an integer from 0 to 100"),
        ("rand-m9-p2", "p as a number from 0 to 1"),
        ("rand-m9-m8", "m once"),
        ("rand-", "unknown: ''"),
    ],
)
def test_allowed_texts_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        rand_augment(text)
