"""Max-Former (Fang et al., NeurIPS 2025, github.com/bic-L/MaxFormer).

QKFormer's hierarchy of stages on a real-valued stream: layers add currents to it, and neurons
precede every convolution except the first. Neurons pass an image's low frequencies better than its
high ones; so embeddings max-pool their currents, and the first stages' blocks mix positions by a
depthwise convolution instead of attention. The last stage has self-attention without a softmax.
"""

from collections import OrderedDict

from torch import nn

from tetdist.models import base
from tetdist.models.attention import (
    HALVING_NEURON,
    StreamAttention,
    StreamConv,
    StreamEmbedding,
    StreamMlp,
    StreamTransformer,
    check_heads,
    convolutions_outside,
    init_as_published,
    stages,
)
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.packed import Conv2d


class Block(nn.Sequential):
    """A mixer of positions, then an MLP."""

    def __init__(self, mixer: StreamConv | StreamAttention, mlp: StreamMlp) -> None:
        super().__init__(OrderedDict[str, nn.Module](mixer=mixer, mlp=mlp))


class MaxFormer(StreamTransformer):
    """Max-Former.

    Args:
        neuron: All neurons; those of attention have another threshold, see `attention_neuron`.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        kernels: Kernel sizes of the depthwise convolutions, per stage except the last, which has
            self-attention.
        mlp_ratio: Ratio of an MLP's inner to its outer channels.
        attention_threshold: Threshold of the neurons in attention.
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
        super().__init__(num_classes, timesteps, drop_path_rate)
        if len(widths) != len(kernels) + 1:
            raise ValueError(
                f"widths {widths} must have one entry per stage, and kernels {kernels} one per "
                "stage except the last"
            )
        if even := [kernel for kernel in kernels if kernel % 2 == 0]:
            raise ValueError(f"kernels must be odd, not {even[0]}")
        check_heads(widths[-1:], heads)
        first = widths[0]
        layers = [(first // 2, True), (first, True), (first, False)]
        self.stem = StreamEmbedding(in_chans, layers, 1, neuron, strided=True)

        def embedding(before: int, width: int) -> StreamEmbedding:
            layers = [(width, True), (width, False)]
            return StreamEmbedding(before, layers, 0, neuron, pooled_shortcut=True)

        def block(stage: int, rate: float) -> Block:
            width = widths[stage]
            mixer: StreamConv | StreamAttention
            if stage < len(kernels):
                side = kernels[stage]
                conv = Conv2d(width, width, side, padding=side // 2, groups=width)
                mixer = StreamConv(conv, neuron, rate)
            else:
                mixer = StreamAttention(width, heads, neuron, attention_threshold, drop_path=rate)
            return Block(mixer, StreamMlp(width, mlp_ratio * width, neuron, rate))

        self.blocks = stages(widths, depths, drop_path_rate, embedding, block)
        self.set_stages((first, 4), *base.stages_of(widths, depths, 4, embeddings=1))
        self.head_neuron = Neuron(neuron, widths[-1])
        self.set_head(drop_rate)
        # As in the authors' code: attention keeps torch's own initialisation.
        init_as_published(convolutions_outside(self, StreamAttention))


_CFG = base.model_cfg(first_conv="stem.layers.0.conv", interpolation="bicubic")
# 16.24, 28.65 and 63.99 million parameters at 1000 classes. As in the paper, names have the number
# of blocks and the last stage's channels.
base.register(MaxFormer, "maxformer_10_384", _CFG, widths=(96, 192, 384), heads=6)
base.register(MaxFormer, "maxformer_10_512", _CFG, widths=(128, 256, 512), heads=8)
base.register(MaxFormer, "maxformer_10_768", _CFG, widths=(192, 384, 768), heads=12)
