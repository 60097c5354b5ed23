"""AutoAugment, colours and geometry on pixels, against torchvision and Pillow."""

import numpy as np
import pytest
import torch
from samples import picture
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, ColorJitter
from torchvision.transforms import functional as tv

from tetdist.data import auto_augment, pixels, transforms
from tetdist.order import uniforms

# What timm takes for images of ImageNet.
TIMMS = pixels.Output(size=0, mean=(0.485, 0.456, 0.406), std=(1, 1, 1), interpolation="bicubic")


def tensor(image):
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("policy", ["cifar10", "imagenet"])
def test_auto_augment_is_torchvisions(policy, monkeypatch):
    image = picture(32, 32)
    theirs = AutoAugment(AutoAugmentPolicy(policy))
    draws = uniforms(3, 0, np.arange(400), transforms.AUTO_AUGMENT_DRAWS)
    ours = auto_augment.auto_augment(draws, policy, 32)
    used = set()
    for row, operations in zip(draws, ours, strict=True):
        parameters = int(row[0] * 25), torch.tensor(row[1:3]), torch.tensor((row[3:] >= 0.5) * 1)
        monkeypatch.setattr(theirs, "get_params", lambda _, found=parameters: found)
        expected = theirs(image)
        got = pixels.operated(tensor(image), operations, TIMMS)
        assert torch.equal(got, tensor(expected)), operations
        used |= {(parameters[0], len(operations))}
    assert {number for number, _ in used} == set(range(25))


def test_colour_jitter_is_torchvisions(monkeypatch):
    image = picture(40, 30)
    reach = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    theirs, draws = ColorJitter(**reach), uniforms(0, 0, np.arange(20), 8)
    for operations in transforms.color_jitter(draws, tuple(reach.values())):
        order = torch.tensor([list(reach).index(name) for name, _ in operations])
        factors = dict(operations)
        parameters = (order, *(factors[name] for name in reach))
        monkeypatch.setattr(theirs, "get_params", lambda *_, found=parameters: found)
        assert torch.equal(pixels.operated(tensor(image), operations, TIMMS), tensor(theirs(image)))


def test_normalising_is_torchvisions():
    image = picture(24, 24)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    output = pixels.Output(size=24, mean=mean, std=std, interpolation="bilinear")
    box = np.array([[2, 3, 9, 24]], np.int32)
    (got,) = pixels.finished(tensor(image)[None], pixels.Rest(output, cutout=box))
    expected = tv.normalize(tv.to_tensor(image), mean, std)
    expected[:, 2:9, 3:24] = 0
    assert torch.allclose(got, expected, atol=1e-5)
