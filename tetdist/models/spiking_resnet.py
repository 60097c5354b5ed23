"""Spiking ResNets: the shortcut joins as a current, before the neuron.

`spiking_resnet18/34/50` are the ImageNet networks of tdBN (Zheng et al., AAAI 2021), which the TET
paper trains, too: batch norms are scaled to the threshold, and by 1/sqrt(2) where two branches are
added. `spiking_resnet19` is the CIFAR network as released with TET: plain batch norm and a hidden
spiking layer in the head.

Two repositories on per-timestep distillation (see preact_resnet.py) have three more, with plain
batch norm: `spiking_resnet18_cifar`; `spiking_resnet19` with `stem_width=128`; and
`spiking_resnet19_dvs` for events.
"""

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.base import INV_SQRT_2, ConvNormNeuron, SpikingNetwork, conv1x1, conv3x3
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormNeuron
from tetdist.nn.packed import Conv2d, MaxPool

Norm = Literal["bn", "tdbn"]


class _Merge(nn.Module):
    """End of a block: conv-BN of the residual branch plus the shortcut, into the last neuron."""

    def __init__(
        self,
        conv: Conv2d,
        in_channels: int,
        stride: int,
        neuron: NeuronConfig,
        norm_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.neuron = NormNeuron(
            conv.out_channels, neuron, norm_scale=norm_scale, drop_path=drop_path
        )
        self.downsample: nn.Module = nn.Identity()
        self.downsample_norm: BatchNorm | None = None
        if stride != 1 or in_channels != conv.out_channels:
            self.downsample = conv1x1(in_channels, conv.out_channels, stride)
            self.downsample_norm = BatchNorm(conv.out_channels, scale=norm_scale)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        return self.neuron(
            self.conv(residual),
            x.shape[0],
            shortcut=self.downsample(x),
            shortcut_norm=self.downsample_norm,
        )


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        neuron: NeuronConfig,
        norm: Norm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        scale, merged_scale = _norm_scales(neuron, norm)
        self.conv1 = ConvNormNeuron(conv3x3(in_channels, width, stride), neuron, norm_scale=scale)
        conv = conv3x3(width, width)
        self.merge = _Merge(conv, in_channels, stride, neuron, merged_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.conv1(x), x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        neuron: NeuronConfig,
        norm: Norm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        scale, merged_scale = _norm_scales(neuron, norm)
        self.conv1 = ConvNormNeuron(conv1x1(in_channels, width), neuron, norm_scale=scale)
        self.conv2 = ConvNormNeuron(conv3x3(width, width, stride), neuron, norm_scale=scale)
        conv = conv1x1(width, 4 * width)
        self.merge = _Merge(conv, in_channels, stride, neuron, merged_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.conv2(self.conv1(x)), x)


def _norm_scales(neuron: NeuronConfig, norm: Norm) -> tuple[float, float]:
    """Return batch norm's scale in a chain, and where two branches meet."""
    scales: dict[Norm, tuple[float, float]] = {
        "bn": (1.0, 1.0),
        "tdbn": (neuron.threshold, neuron.threshold * INV_SQRT_2),
    }
    if norm not in scales:
        raise ValueError(f"norm must be 'bn' or 'tdbn', not {norm!r}")
    return scales[norm]


class SpikingResNet(SpikingNetwork):
    """Spiking ResNet.

    Args:
        layers: Number of blocks in each stage.
        norm: ``tdbn`` scales batch norms to the threshold, ``bn`` does not.
        stem: ``imagenet``: a 7x7 convolution of stride 2 and max-pooling; ``cifar``: a 3x3
            convolution.
        width: Channels of the first stage; they double from stage to stage.
        hidden_features: Width of a spiking layer before the classifier; 0: none.
        init: Initialisation of convolutions; see `base.init_weights`.
        input_size: Height and width of event frames; None: any.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        *,
        neuron: NeuronConfig,
        norm: Norm = "tdbn",
        stem: Literal["imagenet", "cifar"] = "imagenet",
        stem_width: int = 64,
        width: int = 64,
        hidden_features: int = 0,
        init: base.Init = "kaiming",
        input_size: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        self.input_size = input_size
        scale, _ = _norm_scales(neuron, norm)
        self.pool: nn.Module = nn.Identity()
        match stem:
            case "imagenet":
                conv = Conv2d(in_chans, stem_width, 7, stride=2, padding=3, bias=False)
                self.pool = MaxPool(3, stride=2, padding=1)
            case "cifar":
                conv = conv3x3(in_chans, stem_width)
            case _:
                raise ValueError(f"stem must be 'imagenet' or 'cifar', not {stem!r}")
        self.stem = ConvNormNeuron(conv, neuron, norm_scale=scale)
        self.set_resnet(
            partial(block, neuron=neuron, norm=norm),
            layers,
            (stem_width, 1 if stem == "cifar" else 4),
            width,
            expansion=block.expansion,
        )
        self.hidden: nn.Module = nn.Identity()
        if hidden_features:
            self.hidden = nn.Sequential(
                nn.Linear(self.num_features, hidden_features), Neuron(neuron, hidden_features)
            )
        self.set_head(drop_rate, hidden_features)
        base.init_weights(self, init)

    def pooled(self, x: Tensor) -> Tensor:
        return self.hidden(self.over_positions(x))


class SpikingResNetDVS(SpikingResNet):
    """The same network for event frames, (B, T, 2, H, W)."""

    input_kind = "events"


# From the paper's code. Its standard deviation, a widespread one, is the mean of each image's own;
# that of all pixels together is 0.2470, 0.2435, 0.2616.
_CIFAR = base.model_cfg(32, **base.CIFAR | {"std": (0.2023, 0.1994, 0.2010)})
_EVENTS = base.model_cfg(num_classes=10, input_size=(10, 2, 48, 48), **base.FIXED_EVENTS)

base.register(SpikingResNet, "spiking_resnet18", block=BasicBlock, layers=(2, 2, 2, 2))
base.register(SpikingResNet, "spiking_resnet34", block=BasicBlock, layers=(3, 4, 6, 3))
base.register(SpikingResNet, "spiking_resnet50", block=Bottleneck, layers=(3, 4, 6, 3))
_SMALL: dict[str, Any] = {"block": BasicBlock, "norm": "bn", "stem": "cifar"}
_SMALL_19 = _SMALL | {"layers": (3, 3, 2), "width": 128, "hidden_features": 256}
# For 32x32 images: 11,173,962 parameters, and 12.63 million at 10 classes.
base.register(SpikingResNet, "spiking_resnet18_cifar", _CIFAR, **_SMALL, layers=(2, 2, 2, 2))
base.register(SpikingResNet, "spiking_resnet19", _CIFAR, **_SMALL_19)
# For 48x48 event frames: 12,696,842 parameters.
_DVS = _SMALL_19 | {"stem_width": 128, "input_size": 48, "in_chans": 2, "timesteps": 10}
base.register(SpikingResNetDVS, "spiking_resnet19_dvs", _EVENTS, **_DVS)
