"""Networks beside those that performance.py and zeros.py measure: of ReLU, and spikingjelly's."""

import itertools
from collections.abc import Callable
from typing import Any

import timm
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from tetdist.apps.benchmarks import bench


def relu_network(name: str) -> nn.Module | None:
    """Make the ReLU network with the convolutions of a spiking one; None if there is none."""
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=name == "preact_resnet34"), nn.BatchNorm2d(64)
    match name:
        case "ms_resnet18":
            return nn.Sequential(*stem, *_blocks((2, 2, 2, 2), first_stride=2, bias=False))
        case "psn_sew_resnet18" | "psn_sew_resnet34":
            baseline: nn.Module = timm.create_model(name.removeprefix("psn_sew_"))
            baseline.maxpool = nn.AvgPool2d(3, 2, 1)
            return baseline
        case "preact_resnet34":
            return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *_blocks(first_stride=1, bias=True))
        case "ms_resnet34":
            return nn.Sequential(*stem, *_blocks(first_stride=2, bias=False))
        case "spiking_resnet19":
            return _resnet19()
        case "vggsnn":
            return _vgg()
    return bench.relu_baseline(name)


def spikingjelly_network(name: str) -> nn.Module | None:
    """Make spikingjelly's SEW-, spiking or MS-ResNet with the neuron of our SEW-ResNets."""
    from spikingjelly.activation_based.model import ms_resnet, sew_resnet, spiking_resnet

    match name.partition("_")[0]:
        case "sew":
            model = getattr(sew_resnet, name)(spiking_neuron=_lif, cnf="ADD")
        case "spiking":
            model = getattr(spiking_resnet, name)(spiking_neuron=_lif)
        case "ms" if name == "ms_resnet18":
            model = ms_resnet.MSResNet(T=4, spiking_neuron=_lif)
        case _:
            return None
    return _resetting(model)


def spikingjelly_convnet(channels: tuple[int, ...], in_chans: int, side: int) -> nn.Module:
    """Make spikingjelly's layers of a spiking_convnet; arguments as of `convnet`."""
    from spikingjelly.activation_based import layer

    return _resetting(convnet(channels, in_chans, side, _lif, layer))


def _resetting(model: nn.Module) -> nn.Module:
    """Return it as a network of all timesteps, which resets its neurons before each pass."""
    from spikingjelly.activation_based import functional

    functional.set_step_mode(model, "m")
    model.register_forward_pre_hook(lambda *_: functional.reset_net(model))
    return model


def _lif(**_: Any) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    made: nn.Module = neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=False,
    )
    return made


def _resnet19() -> nn.Module:
    """Make timm's ResNet with a 3x3 convolution as its stem, for 10 classes."""
    baseline = ResNet(BasicBlock, (3, 3, 2), channels=(128, 256, 512), num_classes=10)
    baseline.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    baseline.maxpool = nn.Identity()
    baseline.layer4 = nn.Identity()
    return baseline


class _Block(nn.Module):
    """Two ReLU-conv-BN layers, added to the input."""

    def __init__(self, inputs: int, width: int, stride: int, bias: bool) -> None:
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
            convolution = nn.Conv2d(inputs, width, 1, stride, bias=bias)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(x)
        return y.add_(self.shortcut(x))


def _blocks(
    counts: tuple[int, ...] = (3, 4, 6, 3), *, first_stride: int, bias: bool
) -> list[nn.Module]:
    """Make the blocks and classifier of a ResNet, by default of 34 layers, after its stem."""
    layers: list[nn.Module] = []
    channels = 64
    for stage, count in enumerate(counts):
        for i in range(count):
            stride = 1 if i else 2 if stage else first_stride
            layers.append(_Block(channels, 64 << stage, stride, bias))
            channels = 64 << stage
    last = [] if bias else [nn.ReLU(inplace=True)]
    return [*layers, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def convnet(
    channels: tuple[int, ...],
    in_chans: int,
    side: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    library: Any = nn,
) -> nn.Module:
    """Make the layers of a spiking_convnet, of torch's or of spikingjelly's."""
    layers: list[nn.Module] = []
    for i, (inputs, width) in enumerate(itertools.pairwise((in_chans, *channels))):
        stride = 2 if i else 1
        layers.append(library.Conv2d(inputs, width, 3, stride, 1, bias=False))
        layers += [library.BatchNorm2d(width), activation()]
        side = -(-side // stride)
    return nn.Sequential(*layers, library.Flatten(), library.Linear(width * side**2, 10))


def _vgg() -> nn.Module:
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
