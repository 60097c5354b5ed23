"""VGGSNN, the network of TET for 48x48 two-channel event frames (CIFAR10-DVS)."""

from torch import nn

from tetdist.models import base
from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv3x3
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.packed import AvgPool


class VGGSNN(SpikingNetwork):
    """64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2-FC.

    Args:
        input_size: Height and width of the frames, which determine the classifier's inputs.
    """

    input_kind = "events"
    global_pool = "flatten"
    spike_levels = 4  # means of 2x2 spikes

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        input_size: int = 48,
        in_chans: int = 2,
        num_classes: int = 10,
        timesteps: int = 10,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps)
        if input_size < 16:
            raise ValueError(f"input_size must be at least 16 (four poolings), not {input_size}")

        self.input_size = input_size

        def layer(in_channels: int, out_channels: int) -> nn.Module:
            return ConvNormNeuron(conv3x3(in_channels, out_channels, bias=True), neuron)

        self.stem = layer(in_chans, 64)
        self.blocks = nn.Sequential(
            nn.Sequential(layer(64, 128), AvgPool()),
            nn.Sequential(layer(128, 256), layer(256, 256), AvgPool()),
            nn.Sequential(layer(256, 512), layer(512, 512), AvgPool()),
            nn.Sequential(layer(512, 512), layer(512, 512), AvgPool()),
        )
        self.set_stages((64, 1), (128, 2, 1), (256, 4, 1), (512, 8, 1), (512, 16, 1))
        self.set_head(drop_rate, 512 * (input_size // 16) ** 2)
        base.init_weights(self)


_CFG = base.model_cfg(num_classes=10, input_size=(10, 2, 48, 48), **base.FIXED_EVENTS)
base.register(VGGSNN, "vggsnn", _CFG)  # 9.27 million parameters at 48x48 and 10 classes
