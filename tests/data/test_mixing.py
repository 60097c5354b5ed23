"""Mixup and CutMix, written out sample by sample."""

import numpy as np
import pytest
import timm.data
import torch
from timm.loss import SoftTargetCrossEntropy

from tetdist.config.sections.data import DataSection, MixingSection
from tetdist.config.sections.loss import LossSection
from tetdist.data.mixing import mixed_images, mixed_targets, on_device
from tetdist.data.transforms import (
    MIXING_DRAWS,
    micro_batch_mix,
    mixes,
    symmetric_beta,
)
from tetdist.losses import tet_loss
from tetdist.order import MIXING, uniforms
from tetdist.training.objective import compute_loss

B, K = 6, 5


def mixing_of(mixup=0.0, cutmix=0.0, **mixing):
    return DataSection(root="", mixup=mixup, cutmix=cutmix, mixing=MixingSection(**mixing))


MIXUP, CUTMIX, BOTH = mixing_of(mixup=0.4), mixing_of(cutmix=1.0), mixing_of(0.4, 1.0)


def drawn(data, height=9, width=7):
    return mixes(uniforms(2, 0, np.arange(B), MIXING_DRAWS), height, width, data)


@pytest.mark.parametrize("shape", [(B, 3, 9, 7), (B, 4, 2, 9, 7)])
@pytest.mark.parametrize("data", [MIXUP, CUTMIX, BOTH])
def test_each_sample_is_mixed_with_the_one_before_it(shape, data):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    mix = drawn(data)
    mixed = mixed_images(images, on_device(mix, images.device))
    assert mixed.stride() == images.stride()
    for i in range(B):
        if mix.boxes[i].any():
            top, left, bottom, right = mix.boxes[i]
            expected = images[i].clone()
            expected[..., top:bottom, left:right] = images[i - 1][..., top:bottom, left:right]
            assert torch.equal(mixed[i], expected)
        else:
            kept = mix.share[i]
            expected = kept * images[i] + (1 - kept) * images[i - 1]
            assert torch.allclose(mixed[i], expected)


def test_the_loss_is_lambda_of_one_and_the_rest_of_the_other():
    values = {"kind": "tet", "lambda": 0.3, "phi": 0.7, "label_smoothing": 0.1}
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, B, K, generator=generator, dtype=torch.float64)
    labels = torch.randint(K, (B,), generator=generator)
    mix = drawn(BOTH)
    targets = mixed_targets(labels, on_device(mix, labels.device), K, torch.float64)

    def of_one(i, label):
        one = logits[:, i : i + 1], label.view(1)
        return tet_loss(*one, lambda_=0.3, phi=0.7, label_smoothing=0.1)

    # Sample by sample: a mean over the batch of what each would be alone. The pull to phi, too, is
    # then lambda + (1 - lambda) times itself: once.
    expected = torch.stack(
        [
            kept * of_one(i, labels[i]) + (1 - kept) * of_one(i, labels[i - 1])
            for i, kept in enumerate(mix.share)
        ]
    ).mean()
    section = LossSection.model_validate(values)
    assert torch.allclose(compute_loss(section, logits, targets), expected)


def timms(draws, data, patch):
    """timm's Mixup, which draws these numbers."""
    chances, places = iter([draws[5], draws[0]]), iter(draws[3:5])

    def beta(alpha, _):
        u, v = np.array(draws[1:3])[:, None]
        return float(symmetric_beta(u, v, np.array([alpha]))[0])

    def integer(low, high, size):
        assert size is None
        return low + int((high - low) * next(places))

    patch.setattr(np.random, "rand", lambda: next(chances))
    patch.setattr(np.random, "beta", beta)
    patch.setattr(np.random, "randint", integer)
    return timm.data.Mixup(
        mixup_alpha=data.mixup,
        cutmix_alpha=data.cutmix,
        prob=data.mixing.probability,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=0.1,
        num_classes=K,
    )


@pytest.mark.parametrize("shape", [(B, 3, 9, 7), (B, 4, 2, 8, 12)])
@pytest.mark.parametrize("data", [MIXUP, CUTMIX, BOTH])
def test_a_whole_micro_batch_is_mixed_as_by_timm(shape, data, monkeypatch):
    """Images, targets, and the loss of these: timm smooths the labels before it mixes them."""
    data = mixing_of(data.mixup, data.cutmix, mode="batch", probability=0.7, off_epoch=9)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, B, K, generator=generator)
    section, kinds = LossSection(kind="sdt", label_smoothing=0.1), set()
    for epoch in range(12):
        images = torch.rand(shape, generator=generator)
        labels = torch.randint(K, (B,), generator=generator)
        positions = np.arange(5 * B, 6 * B)
        mix = micro_batch_mix(2, epoch, positions, shape[-2:], data)
        there = on_device(mix, images.device)
        targets = mixed_targets(labels, there, K, torch.float32)
        with monkeypatch.context() as patch:
            (draws,) = uniforms(2, epoch, positions[:1], MIXING_DRAWS, MIXING).tolist()
            theirs = timms(draws, data, patch)
            theirs.mixup_enabled = epoch < 9
            # timm takes the third axis for rows, of frames of events, too.
            flat = images.flatten(1, -3)
            expected, smoothed = theirs(flat.clone(), labels)
        assert torch.allclose(mixed_images(images, there).flatten(1, -3), expected, atol=1e-7)
        loss = SoftTargetCrossEntropy()(logits.mean(0), smoothed)
        assert torch.allclose(compute_loss(section, logits, targets), loss)
        kinds.add("none" if mix.share[0] == 1 else "mixup" if mix.pixels[0] < 1 else "cutmix")
    assert kinds == {"none"} | {kind for kind in ("mixup", "cutmix") if getattr(data, kind)}


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_mixing_is_a_function_of_the_position(mode):
    mixing = mixing_of(0.4, 1.0, mode=mode, probability=0.5, off_epoch=2)

    def shares(epoch, first):
        positions = np.arange(first, first + B)
        return micro_batch_mix(0, epoch, positions, (9, 7), mixing).share.tolist()

    assert shares(1, 6) == shares(1, 6) != shares(1, 12)
    assert shares(0, 6) != shares(1, 6)
    assert shares(2, 6) == shares(3, 12) == [1.0] * B
    found = np.array([shares(0, B * k) for k in range(200)])
    assert abs((found == 1).mean() - 0.5) < 0.1
    assert (found == found[:, :1]).all() == (mode == "batch")
