"""A small convolutional network for small images and event frames: minutes of training on a CPU.

`make quickstart` trains it on digits.
"""

import itertools

from torch import nn

from tetdist.models import base
from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv3x3
from tetdist.nn.neurons import NeuronConfig


class SpikingConvNet(SpikingNetwork):
    """3x3 convolutions, each with batch norm and neurons; all but the first have stride 2.

    The classifier sees all positions: a stroke's position distinguishes digits, and averaging over
    positions cost 17 points of accuracy.

    Args:
        channels: Output channels of the convolutions.
        input_size: Height and width of the images.
    """

    global_pool = "flatten"

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        channels: tuple[int, ...] = (16, 32, 64),
        input_size: int = 28,
        in_chans: int = 3,
        num_classes: int = 10,
        timesteps: int = 4,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps)
        self.stem = ConvNormNeuron(conv3x3(in_chans, channels[0]), neuron)
        self.blocks = nn.Sequential(
            *(
                ConvNormNeuron(conv3x3(narrow, wide, stride=2), neuron)
                for narrow, wide in itertools.pairwise(channels)
            )
        )
        self.input_size = side = input_size
        for _ in channels[1:]:
            side = (side + 1) // 2
        first, *stages = ((wide, 2**i, 1) for i, wide in enumerate(channels))
        self.set_stages(first[:2], *stages)
        self.set_head(drop_rate, channels[-1] * side**2)
        base.init_weights(self)


class SpikingConvNetDVS(SpikingConvNet):
    """The same network for event frames, (B, T, 2, H, W)."""

    input_kind = "events"


_GREY = (0.5, 0.5, 0.5)
_CFG = {"num_classes": 10, "fixed_input_size": True, "crop_pct": 1.0, "mean": _GREY, "std": _GREY}
base.register(SpikingConvNet, "spiking_convnet", base.model_cfg(28, **_CFG))  # 55,000 parameters
# For event frames of 34x34, those of N-MNIST.
base.register(
    SpikingConvNetDVS,
    "spiking_convnet_dvs",
    base.model_cfg(num_classes=10, input_size=(10, 2, 34, 34), **base.FIXED_EVENTS),
    channels=(32, 64, 128, 128),
    input_size=34,
    in_chans=2,
    timesteps=10,
)
