"""Max-Former (Fang et al., NeurIPS 2025, github.com/bic-L/MaxFormer).

QKFormer's hierarchy of stages on a real-valued stream: layers add currents to it, and neurons
precede every convolution except the first. Neurons pass an image's low frequencies better than its
high ones; so embeddings max-pool their currents, and the first stages' blocks mix positions by a
depthwise convolution instead of attention. The last stage has self-attention without a softmax.
"""

from collections import OrderedDict
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.attention import (
    HALVING_NEURON,
    ConvPoolNeuron,
    StreamAttention,
    StreamMlp,
    StreamTransformer,
    init_as_published,
)
from tetdist.models.base import ConvNormNeuron, conv1x1, conv3x3
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.dropout import rising_rates
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import Conv2d

# Factor on self-attention's sums of products, independent of the number of channels.
SCALE = 0.125


class Stem(nn.Module):
    """Three 3x3 convolutions, the first two of stride 2, and a shortcut around the last two.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the returned current.
        neuron: All neurons.
    """

    def __init__(self, in_channels: int, channels: int, neuron: NeuronConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                ConvNormNeuron(conv3x3(in_channels, channels // 2, 2), neuron),
                ConvNormNeuron(conv3x3(channels // 2, channels, 2), neuron),
            ]
        )
        self.conv = conv3x3(channels, channels)
        self.shortcut = conv1x1(channels // 2, channels, 2)
        self.shortcut_norm = BatchNorm(channels)
        self.add = NormAdd(channels)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:
        """Map (1 or T, B, C, H, W) to a current (T, B, C', H', W')."""
        first = self.layers[0](x, timesteps)
        current = self.conv(self.layers[1](first))
        return self.add(current, self.shortcut(first), self.shortcut_norm)


class Embedding(nn.Module):
    """Halve height and width: max-pooling of 3x3 of a current, here and on the shortcut.

    Args:
        in_channels: Channels of the stream before it.
        channels: Channels of the stream after it.
        neuron: All neurons.
    """

    def __init__(self, in_channels: int, channels: int, neuron: NeuronConfig) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, in_channels)
        self.layer = ConvPoolNeuron(conv3x3(in_channels, channels), neuron)
        self.conv = conv3x3(channels, channels)
        self.shortcut = conv1x1(in_channels, channels)
        self.shortcut_norm = NormPool(channels)
        self.add = NormAdd(channels)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x)
        shortcut = self.shortcut_norm(self.shortcut(spikes))
        return self.add(self.conv(self.layer(spikes)), shortcut)


class DepthwiseMixer(nn.Module):
    """Depthwise convolution that mixes positions and is added to the stream."""

    def __init__(
        self, channels: int, kernel: int, neuron: NeuronConfig, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, channels)
        self.conv = Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv(self.neuron(x)), x)


class Block(nn.Sequential):
    """A mixer of positions, then an MLP."""

    def __init__(self, mixer: DepthwiseMixer | StreamAttention, mlp: StreamMlp) -> None:
        super().__init__(OrderedDict[str, nn.Module](mixer=mixer, mlp=mlp))


class MaxFormer(StreamTransformer):
    """Max-Former.

    Args:
        neuron: All neurons; those of attention have another threshold, see `attention_neuron`.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        kernels: Kernel sizes of the depthwise convolutions, per stage except the last, which has
            self-attention.
        heads: Number of attention heads.
        mlp_ratio: Ratio of an MLP's inner to its outer channels.
        attention_threshold: Threshold of the neurons in attention.
        in_chans: Channels of the input.
        num_classes, timesteps, drop_rate, drop_path_rate: See `SpikingNetwork`.
    """

    default_neuron = HALVING_NEURON

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        widths: tuple[int, ...],
        depths: tuple[int, ...] = (1, 2, 7),
        kernels: tuple[int, ...] = (7, 5),
        heads: int,
        mlp_ratio: int = 4,
        attention_threshold: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            num_classes=num_classes, timesteps=timesteps, drop_path_rate=drop_path_rate
        )
        if not len(widths) == len(depths) == len(kernels) + 1:
            raise ValueError(
                f"widths {widths} and depths {depths} must have one entry per stage, and kernels "
                f"{kernels} one per stage except the last"
            )
        if even := [kernel for kernel in kernels if kernel % 2 == 0]:
            raise ValueError(f"kernels must be odd, not {even[0]}")
        if widths[-1] % heads:
            raise ValueError(f"{widths[-1]} channels cannot be divided among {heads} heads")
        self.stem = Stem(in_chans, widths[0], neuron)
        blocks: list[nn.Module] = []
        rates = iter(rising_rates(drop_path_rate, sum(depths)))
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage > 0:
                blocks.append(Embedding(widths[stage - 1], width, neuron))
            for _ in range(depth):
                mixer: DepthwiseMixer | StreamAttention
                drop_path = next(rates)
                if stage < len(kernels):
                    mixer = DepthwiseMixer(width, kernels[stage], neuron, drop_path)
                else:
                    mixer = StreamAttention(
                        width,
                        heads,
                        neuron,
                        attention_threshold,
                        scale=SCALE,
                        bias=True,
                        drop_path=drop_path,
                    )
                blocks.append(Block(mixer, StreamMlp(width, mlp_ratio * width, neuron, drop_path)))
        self.blocks = nn.Sequential(*blocks)
        self.head_neuron = Neuron(neuron, widths[-1])
        self.set_head(widths[-1], drop_rate)
        # As in the authors' code: attention keeps torch's own initialisation.
        of_attention = {
            layer
            for module in self.modules()
            if isinstance(module, StreamAttention)
            for layer in module.modules()
        }
        convolutions = (module for module in self.modules() if isinstance(module, nn.Conv2d))
        init_as_published(conv for conv in convolutions if conv not in of_attention)


_IMAGENET: dict[str, Any] = {"first_conv": "stem.layers.0.conv", "interpolation": "bicubic"}
default_cfgs = generate_default_cfgs(
    {f"maxformer_10_{width}": base.model_cfg(**_IMAGENET) for width in (384, 512, 768)}
)

# 16.24, 28.65 and 63.99 million parameters at 1000 classes. As in the paper, names have the number
# of blocks and the last stage's channels.
maxformer_10_384 = base.register(MaxFormer, "maxformer_10_384", widths=(96, 192, 384), heads=6)
maxformer_10_512 = base.register(MaxFormer, "maxformer_10_512", widths=(128, 256, 512), heads=8)
maxformer_10_768 = base.register(MaxFormer, "maxformer_10_768", widths=(192, 384, 768), heads=12)
