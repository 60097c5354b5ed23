"""E-SpikeFormer (Yao et al., TPAMI 2025), the small networks of the Spike-driven Transformer V3.

The authors' code is github.com/BICLab/Spike-Driven-Transformer-V3, where they are called
Efficient_Spiking_Transformer. Convolutional blocks, then transformer blocks, work on a real-valued
stream: each half of a block begins with neurons and adds a current to the stream. So the classifier
and every convolution except the first see spikes.

**T and D.** The authors train at T=1, with neurons that fire up to D=4 times in their one timestep
(`NILIF`: a number of spikes over D; without an earlier timestep the membrane has no effect). So
networks have T=1 by default, and their recipe has NI-LIF neurons of D=4. A device runs D
sub-timesteps, in each of which a neuron fires or not, with the same result.

With more timesteps the image is shown again: the rest of a membrane after rounding and the limit of
D spikes is carried to the next timestep, times the neuron's decay, and all logits are averaged. The
authors have not trained such a network of these sizes. With ``decay: 0`` all timesteps would be
equal, so T > 1 would have no effect.

As in all networks, any other kind of neuron can be used.
"""

import dataclasses
from collections import OrderedDict

from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.attention import (
    StreamAttention,
    StreamMlp,
    StreamTransformer,
    check_heads,
    init_as_published,
)
from tetdist.models.base import ConvNormNeuron, conv1x1, conv3x3
from tetdist.nn.dropout import rising_rates
from tetdist.nn.integer_neurons import ILIF, NILIF
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.packed import Conv2d

# Ratio of attention's value channels to the stream's channels.
VALUE_RATIO = 4


def counting_neuron(neuron: NeuronConfig) -> NeuronConfig:
    """Return the neuron before the classifier, derived from that of the other layers.

    If that neuron sends its spikes divided by D, this one sends their number.
    """
    if type(neuron) is not NILIF:
        return neuron
    return ILIF(**{one.name: getattr(neuron, one.name) for one in dataclasses.fields(neuron)})


class Stem(nn.Module):
    """A 7x7 convolution of stride 2 and its norm, without neurons: it returns a current."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, channels, 7, stride=2, padding=3)
        self.norm = NormAdd(channels)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:
        """Map (1 or T, B, C, H, W) to a current (T, B, C', H', W')."""
        current: Tensor = self.norm(self.conv(x), copies=timesteps // x.shape[0])
        return current.expand(timesteps, *current.shape[1:])


class SeparableConv(nn.Module):
    """A depthwise convolution between two 1x1 ones, twice as wide as the stream and added to it."""

    def __init__(self, channels: int, kernel: int, neuron: NeuronConfig, drop_path: float) -> None:
        super().__init__()
        hidden = 2 * channels
        depthwise = Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.neuron = Neuron(neuron, channels)
        self.widen = ConvNormNeuron(conv1x1(channels, hidden), neuron)
        self.depthwise = ConvNormNeuron(depthwise, neuron)
        self.narrow = conv1x1(hidden, channels)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.depthwise(self.widen(self.neuron(x)))
        return self.add(self.narrow(spikes), x)


class ConvMlp(nn.Module):
    """Two 3x3 convolutions, the first one wider, added to the stream."""

    def __init__(self, channels: int, hidden: int, neuron: NeuronConfig, drop_path: float) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, channels)
        self.conv1 = ConvNormNeuron(conv3x3(channels, hidden), neuron)
        self.conv2 = conv3x3(hidden, channels)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv2(self.conv1(self.neuron(x))), x)


class ConvBlock(nn.Sequential):
    """A separable convolution of 7x7, then two of 3x3."""

    def __init__(
        self, channels: int, mlp_ratio: int, neuron: NeuronConfig, drop_path: float
    ) -> None:
        separable = SeparableConv(channels, 7, neuron, drop_path)
        mlp = ConvMlp(channels, mlp_ratio * channels, neuron, drop_path)
        super().__init__(OrderedDict[str, nn.Module](separable=separable, mlp=mlp))


class TransformerBlock(nn.Sequential):
    """A separable convolution of 3x3, self-attention, and an MLP.

    Args:
        neuron: All neurons except those behind attention's products.
        drop_path: Probability of dropping each of the three in training.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        mlp_ratio: int,
        neuron: NeuronConfig,
        threshold: float,
        drop_path: float,
    ) -> None:
        separable = SeparableConv(channels, 3, neuron, drop_path)
        attention = StreamAttention(
            channels,
            heads,
            neuron,
            threshold,
            scale=2 * (channels // heads) ** -0.5,
            value_channels=VALUE_RATIO * channels,
            bias=False,
            drop_path=drop_path,
        )
        mlp = StreamMlp(channels, mlp_ratio * channels, neuron, drop_path)
        layers = OrderedDict[str, nn.Module](separable=separable, attention=attention, mlp=mlp)
        super().__init__(layers)


class Downsampling(nn.Module):
    """Neurons, a 3x3 convolution and its norm; returns a current of another width."""

    def __init__(self, in_channels: int, channels: int, stride: int, neuron: NeuronConfig) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, in_channels)
        self.conv = conv3x3(in_channels, channels, stride, bias=True)
        self.norm = NormAdd(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(self.neuron(x)))
        return y


class ESpikeFormer(StreamTransformer):
    """E-SpikeFormer.

    Args:
        neuron: All neurons; for those of attention see `attention_neuron`, for those before the
            classifier `counting_neuron`.
        widths: Channels at 1/4, 1/8 and 1/16 of the sides, and of the last blocks, also at 1/16; at
            1/2 half of the first.
        depths: Numbers of transformer blocks of the third and the fourth width. Before them come
            one convolutional block at half the first width, one at the first and two at the second.
        mlp_ratio: Ratio of an MLP's inner to its outer channels.
        attention_threshold: Threshold of the neurons behind attention's products.
    """

    # Published at T=1, where the decay has no effect; its value here is that of the I-LIF paper.
    default_neuron = NILIF(most_spikes=4, threshold=1.0, decay=0.25)

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        widths: tuple[int, ...],
        depths: tuple[int, ...] = (6, 2),
        heads: int = 8,
        mlp_ratio: int = 4,
        attention_threshold: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        if len(widths) != 4 or len(depths) != 2:
            raise ValueError(
                f"widths must have 4 entries and depths 2, not {len(widths)} and {len(depths)}"
            )
        check_heads(widths[2:], heads)
        rates = iter(rising_rates(drop_path_rate, 4 + sum(depths)))

        def convolutional(width: int) -> ConvBlock:
            return ConvBlock(width, mlp_ratio, neuron, next(rates))

        def transformer(width: int) -> TransformerBlock:
            return TransformerBlock(
                width, heads, mlp_ratio, neuron, attention_threshold, next(rates)
            )

        first, second, third, fourth = widths
        self.stem = Stem(in_chans, first // 2)
        self.blocks = nn.Sequential(
            convolutional(first // 2),
            Downsampling(first // 2, first, 2, neuron),
            convolutional(first),
            Downsampling(first, second, 2, neuron),
            convolutional(second),
            convolutional(second),
            Downsampling(second, third, 2, neuron),
            *(transformer(third) for _ in range(depths[0])),
            Downsampling(third, fourth, 1, neuron),
            *(transformer(fourth) for _ in range(depths[1])),
        )
        self.set_stages(
            (first // 2, 2),
            *((first // 2, 2, 1), (first, 4, 2), (second, 8, 3)),
            *((third, 16, 1 + depths[0]), (fourth, 16, 1 + depths[1])),
        )
        self.head_neuron = Neuron(counting_neuron(neuron), fourth)
        self.set_head(drop_rate)
        init_as_published([self.fc])


_CFG = base.model_cfg(first_conv="stem.conv", crop_pct=224 / 232, interpolation="bicubic")
# 2.70, 5.11, 10.0 and 19.0 million parameters at 1000 classes.
base.register(ESpikeFormer, "espikeformer_t", _CFG, widths=(24, 48, 96, 128))
base.register(ESpikeFormer, "espikeformer_s", _CFG, widths=(32, 64, 128, 192))
base.register(ESpikeFormer, "espikeformer_m", _CFG, widths=(48, 96, 192, 240))
base.register(ESpikeFormer, "espikeformer_l", _CFG, widths=(64, 128, 256, 360))
