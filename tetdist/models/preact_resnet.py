"""PreAct-ResNets: neurons before the convolutions, and a shortcut from membrane to membrane.

A block is neuron-conv-BN twice and adds a current to its input: the stream between blocks is a
real-valued sum of currents, not of spikes. Every convolution except those of the stem and the
projections sees spikes.

`preact_resnet18/34` are the ImageNet networks of two repositories on per-timestep distillation,
Intelli-Chip-Lab/snn_temporal_decoupling_distillation and KaiSUN1/SeAl. Their convolutions have
biases, which the following batch norms cancel in training. The classifier sees the stream's mean
over positions, without a norm or neuron before it. ms_resnet.py has the older networks of this
kind.

`i2e_msnet18/34` are the networks of I2E (Ma et al., AAAI 2026, arXiv 2511.08065) for images as
events. They have no biases, their projections see spikes, and a layer of neurons follows the mean
over positions.
"""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv1x1, conv3x3
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.packed import AvgPool, Conv2d, MaxPool


class Stem(nn.Module):
    """Convolution and batch norm without a neuron: the stream starts real-valued.

    Args:
        conv: One convolution, or several with nothing between them.
    """

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.add = NormAdd(channels)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:
        """Map (1 or T, B, C, H, W) to a current with the same number of timesteps."""
        current: Tensor = self.conv(x)
        return self.add(current, copies=timesteps // current.shape[0])


class Block(nn.Module):
    """Residual block: neuron-conv-BN twice, added to the input.

    Args:
        stride: Stride of the first convolution and the projection.
        pooled_projection: True if the projection averages 2x2 pixels instead of a stride of 2.
        projects_spikes: True if the projection sees the first neurons' spikes instead of the input.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        neuron: NeuronConfig,
        *,
        bias: bool = False,
        pooled_projection: bool = False,
        projects_spikes: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, in_channels)
        self.conv1 = ConvNormNeuron(conv3x3(in_channels, width, stride, bias), neuron)
        self.conv2 = conv3x3(width, width, bias=bias)
        self.add = NormAdd(width, drop_path=drop_path)
        self.pool: nn.Module = nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        self.downsample_norm: BatchNorm | None = None
        projects = stride != 1 or in_channels != width
        self.projects_spikes = projects and projects_spikes
        if projects:
            if pooled_projection:
                self.pool, stride = AvgPool(), 1
            self.downsample = conv1x1(in_channels, width, stride, bias)
            self.downsample_norm = BatchNorm(width)

    def forward(self, x: Tensor, timesteps: int | None = None) -> Tensor:
        """Map (T, B, C, H, W), or (1, ...) for all ``timesteps``, to (T, B, C, H, W)."""
        spikes = self.neuron(x, timesteps)
        residual = self.conv2(self.conv1(spikes))
        shortcut = self.downsample(self.pool(spikes if self.projects_spikes else x))
        return self.add(residual, shortcut, shortcut_norm=self.downsample_norm)


class PreActResNet(SpikingNetwork):
    """PreAct-ResNet.

    Args:
        layers: Number of blocks in each of the stages.
        width: Channels of the first stage; they double from stage to stage.
    """

    spike_levels = None  # blocks exchange currents
    is_of_i2e: ClassVar[bool] = False
    # The first repository's neuron; SeAl's has a hard reset.
    default_neuron = LIF(
        decay=0.2, reset="soft", detach_reset=False, surrogate="sigmoid", surrogate_width=4.0
    )

    def __init__(
        self,
        layers: tuple[int, ...],
        *,
        neuron: NeuronConfig,
        width: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        i2e = self.is_of_i2e
        self.stem = Stem(Conv2d(in_chans, width, 7, stride=2, padding=3, bias=not i2e), width)
        self.pool = MaxPool(3, stride=2, padding=1)
        make = partial(Block, neuron=neuron, bias=not i2e, projects_spikes=i2e)
        self.set_resnet(make, layers, (width, 4), width)
        self.neuron: nn.Module = Neuron(neuron, self.num_features) if i2e else nn.Identity()
        self.set_head(drop_rate)
        base.init_weights(self, "fan_in" if i2e else "kaiming")

    def pooled(self, x: Tensor) -> Tensor:
        return self.neuron(self.over_positions(x))


class I2EMSNet(PreActResNet):
    """I2E's network of these blocks, for event frames (B, T, 2, H, W)."""

    input_kind = "events"
    is_of_i2e = True
    default_neuron = LIF(
        detach_reset=True, surrogate="atan", surrogate_width=2.0, fires_at_threshold=True
    )


# 11,694,312 and 21,806,184 parameters at 1000 classes.
base.register(PreActResNet, "preact_resnet18", layers=(2, 2, 2, 2))
base.register(PreActResNet, "preact_resnet34", layers=(3, 4, 6, 3))
_EVENTS = base.model_cfg(input_size=(8, 2, 224, 224), **base.EVENTS)
base.register(I2EMSNet, "i2e_msnet18", _EVENTS, layers=(2, 2, 2, 2), in_chans=2, timesteps=8)
base.register(I2EMSNet, "i2e_msnet34", _EVENTS, layers=(3, 4, 6, 3), in_chans=2, timesteps=8)
