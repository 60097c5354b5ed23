"""Mixup and CutMix, written out sample by sample."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tetdist.config.schema import LossSection
from tetdist.data.mixing import mixed_images, mixed_targets, on_device
from tetdist.data.order import uniforms
from tetdist.data.transforms import MIXING_DRAWS, Mix, Mixing, mixes
from tetdist.losses import sdt_loss, tet_loss
from tetdist.training.trainer import CORRECT, _sums, compute_loss

B, K = 6, 5


def drawn(mixing: Mixing, height: int = 9, width: int = 7) -> Mix:
    return mixes(uniforms(2, 0, np.arange(B), MIXING_DRAWS), height, width, mixing)


@pytest.mark.parametrize("shape", [(B, 3, 9, 7), (B, 4, 2, 9, 7)])
@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0), Mixing(0.4, 1.0)])
def test_each_sample_is_mixed_with_the_one_before_it(
    shape: tuple[int, ...], mixing: Mixing
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    mix = drawn(mixing)
    mixed = mixed_images(images, on_device(mix, images.device))
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


def test_memory_format_and_dtype_stay() -> None:
    images = torch.rand(B, 3, 9, 7).contiguous(memory_format=torch.channels_last)
    mixed = mixed_images(images, on_device(drawn(Mixing(0.4, 1.0)), images.device))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixed.dtype == torch.float32


def _plain_losses() -> list[tuple[LossSection, Callable[[Tensor, Tensor], Tensor]]]:
    def tet(logits: Tensor, labels: Tensor) -> Tensor:
        return tet_loss(logits, labels, lambda_=0.3, phi=0.7, label_smoothing=0.1)

    sections = (
        LossSection.model_validate(
            {"kind": "tet", "lambda": 0.3, "phi": 0.7, "label_smoothing": 0.1}
        ),
        LossSection(kind="sdt"),
    )
    return [(sections[0], tet), (sections[1], sdt_loss)]


@pytest.mark.parametrize(("section", "plain"), _plain_losses())
def test_the_loss_is_lambda_of_one_and_the_rest_of_the_other(
    section: LossSection, plain: Callable[[Tensor, Tensor], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, B, K, generator=generator, dtype=torch.float64)
    labels = torch.randint(K, (B,), generator=generator)
    mix = drawn(Mixing(0.4, 1.0))
    targets = mixed_targets(labels, on_device(mix, labels.device), K, torch.float64)
    # Sample by sample: a mean over the batch of what each would be alone. The pull to phi, too, is
    # then lambda + (1 - lambda) times itself: once.
    expected = torch.stack(
        [
            kept * plain(logits[:, i : i + 1], labels[i : i + 1])
            + (1 - kept) * plain(logits[:, i : i + 1], labels[i - 1].view(1))
            for i, kept in enumerate(mix.share)
        ]
    ).mean()
    assert torch.allclose(compute_loss(section, logits, targets), expected)


def test_a_prediction_is_as_right_as_its_share() -> None:
    labels = torch.tensor([0, 1, 1])
    mix = Mix(np.array([0.75, 0.25, 0.5]), np.ones(3), np.zeros((3, 4), np.int32))
    targets = mixed_targets(labels, on_device(mix, labels.device), K, torch.float32)
    logits = torch.zeros(2, 3, K)
    logits[:, :, 0] = 1  # predicts class 0 thrice: shares 0.75, 0.75 and 0
    assert _sums(logits, targets, torch.tensor(0.0))[CORRECT] == 1.5
    logits[:, :, 1] = 2  # class 1: shares 0.25, 0.25 and 1
    assert _sums(logits, targets, torch.tensor(0.0))[CORRECT] == 1.5
    assert _sums(logits, labels, torch.tensor(0.0))[CORRECT] == 2
