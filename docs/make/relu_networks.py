"""ReLU networks with the convolutions of our spiking ones, for performance.py."""

from collections.abc import Sequence
from typing import Any

import timm
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from tetdist.apps.benchmarks import bench

_LAYERS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "104": (3, 8, 32, 8)}


def relu_network(name: str) -> nn.Module | None:
    """Make the ReLU network with the convolutions of a spiking one; None if there is none."""
    if (known := bench.relu_baseline(name)) is not None:
        return known
    family, _, depth = name.rpartition("resnet")
    match family, depth:
        case ("psn_sew_", depth):
            baseline: nn.Module = timm.create_model(f"resnet{depth}")
            baseline.maxpool = nn.AvgPool2d(3, 2, 1)
            return baseline
        case ("preact_", depth):
            stem = nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
            return _of_blocks(_LAYERS[depth], stem, first_stride=1, bias=True)
        case ("ms_", "14_cifar"):
            return _ms_baseline((2, 2, 2), nn.Conv2d(3, 64, 3, 1, 1, bias=False), num_classes=10)
        case ("ms_", "104"):
            deep = [nn.Conv2d(3, 64, 3, 2, 1), *(nn.Conv2d(64, 64, 3, 1, 1) for _ in range(2))]
            return _ms_baseline(_LAYERS["104"], *deep, pooled=True)
        case ("ms_", depth):
            return _ms_baseline(_LAYERS[depth], nn.Conv2d(3, 64, 7, 2, 3, bias=False))
        case ("spiking_", "19"):
            return _for_small_images((3, 3, 2), stem=64, width=128)
        case ("spiking_", "19_dvs"):
            return _for_small_images((3, 3, 2), stem=128, width=128, in_channels=2)
        case ("spiking_", "18_cifar"):
            return _for_small_images((2, 2, 2, 2), stem=64, width=64)
    return _vgg_baseline() if name == "vggsnn" else None


def _for_small_images(
    layers: tuple[int, ...], *, stem: int, width: int, in_channels: int = 3
) -> nn.Module:
    """Make timm's ResNet with a 3x3 convolution as its stem, for 10 classes."""
    channels = tuple(width * 2**stage for stage in range(len(layers)))
    baseline = ResNet(BasicBlock, layers, channels=channels, num_classes=10)
    baseline.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
    baseline.maxpool = nn.Identity()
    if stem != 64:
        baseline.bn1 = nn.BatchNorm2d(stem)
        if stem == width:
            baseline.layer1[0].downsample = None
        first = baseline.layer1[0].conv1
        baseline.layer1[0].conv1 = nn.Conv2d(stem, first.out_channels, 3, padding=1, bias=False)
    if len(layers) == 3:
        baseline.layer4 = nn.Identity()
    return baseline


class _Block(nn.Module):
    """Two ReLU-conv-BN layers, added to the input."""

    def __init__(
        self, inputs: int, width: int, stride: int, *, bias: bool = False, pooled: bool = False
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(inputs, width, 3, stride, 1, bias=bias),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=bias),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(2) if pooled else nn.Identity(),
                nn.Conv2d(inputs, width, 1, 1 if pooled else stride, bias=bias),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(x)
        return y.add_(self.shortcut(x))


def _of_blocks(
    layers: tuple[int, ...],
    stem: Sequence[nn.Module],
    *,
    last: Sequence[nn.Module] = (),
    num_classes: int = 1000,
    first_stride: int = 2,
    **kind: bool,
) -> nn.Module:
    """Network of `_Block`s between a stem and a classifier."""
    blocks: list[nn.Module] = []
    channels = 64
    for stage, count in enumerate(layers):
        for i in range(count):
            stride = 1 if i else 2 if stage else first_stride
            blocks.append(_Block(channels, 64 << stage, stride, **kind))
            channels = 64 << stage
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    return nn.Sequential(*stem, *blocks, *last, *head)


def _ms_baseline(layers: tuple[int, ...], *stem: nn.Module, **settings: Any) -> nn.Module:
    stem = (*stem, nn.BatchNorm2d(64))
    return _of_blocks(layers, stem, last=[nn.ReLU(inplace=True)], **settings)


def _vgg_baseline() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 2
    for width in (64, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.AvgPool2d(2))
            continue
        layers += [
            nn.Conv2d(channels, int(width), 3, padding=1),
            nn.BatchNorm2d(int(width)),
            nn.ReLU(inplace=True),
        ]
        channels = int(width)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 9, 10))
