"""MS-ResNet (Hu et al., TNNLS 2024): residual networks whose shortcuts join membranes.

Blocks are those of preact_resnet.py, without biases. Differences from there: the stem has no
pooling, so all four stages begin with a stride of 2; a layer of neurons precedes the classifier;
batch norm weights start at the threshold, or at 0 at the end of a residual branch. In the network
of 104 layers the stem is three 3x3 convolutions with nothing between them, projections average 2x2
pixels, and a fifth of the features is dropped in training. `ms_resnet14_cifar` is tetdist's own: a
stem of one 3x3 convolution, and three stages.
"""

from functools import partial
from typing import Literal

from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.base import SpikingNetwork, conv3x3
from tetdist.models.preact_resnet import Block, Stem
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.packed import Conv2d


class MSResNet(SpikingNetwork):
    """MS-ResNet.

    Args:
        layers: Number of blocks in each of the stages.
        stem: ``plain``: a 7x7 convolution; ``deep``: three 3x3 ones with biases, both of stride 2;
            ``cifar``: one 3x3 convolution of stride 1.
        pooled_projections: True if projections average 2x2 pixels instead of using a stride of 2.
        width: Channels of the first stage; they double from stage to stage.
        init: Initialisation of convolutions; see `base.init_weights`.
    """

    spike_levels = None  # blocks exchange currents
    default_neuron = LIF(
        decay=0.25,
        threshold=0.5,
        reset="hard",
        detach_reset=True,
        surrogate="rectangle",
        surrogate_width=0.5,
    )

    def __init__(
        self,
        layers: tuple[int, ...],
        *,
        neuron: NeuronConfig,
        stem: Literal["plain", "deep", "cifar"] = "plain",
        pooled_projections: bool = False,
        width: int = 64,
        init: base.Init = "torch",
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        conv: nn.Module
        match stem:
            case "plain":
                conv = Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
            case "deep":
                conv = nn.Sequential(
                    conv3x3(in_chans, width, 2, bias=True),
                    conv3x3(width, width, bias=True),
                    conv3x3(width, width, bias=True),
                )
            case "cifar":
                conv = conv3x3(in_chans, width)
            case _:
                raise ValueError(f"stem must be 'plain', 'deep' or 'cifar', not {stem!r}")
        self.stem = Stem(conv, width)
        self.set_resnet(
            partial(Block, neuron=neuron, pooled_projection=pooled_projections),
            layers,
            (width, 1 if stem == "cifar" else 2),
            width,
            first=2,
        )
        self.neuron = Neuron(neuron, self.num_features)
        self.set_head(drop_rate)
        base.init_weights(self, init)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                nn.init.constant_(module.weight, neuron.threshold)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.add.norm.weight)

    def pooled(self, x: Tensor) -> Tensor:
        return self.over_positions(self.neuron(x))


# 11,693,736, 21,801,896 and 77,350,504 parameters at 1000 classes.
base.register(MSResNet, "ms_resnet18", layers=(2, 2, 2, 2))
base.register(MSResNet, "ms_resnet34", layers=(3, 4, 6, 3))
base.register(
    MSResNet,
    "ms_resnet104",
    base.model_cfg(first_conv="stem.conv.0"),
    layers=(3, 8, 32, 8),
    stem="deep",
    pooled_projections=True,
    drop_rate=0.2,
)
# For 32x32 images: 2,781,898 parameters at 10 classes.
_CIFAR = base.model_cfg(32, **base.CIFAR)
base.register(MSResNet, "ms_resnet14_cifar", _CIFAR, layers=(2, 2, 2), stem="cifar", timesteps=4)
