"""MS-QKFormer, QKFormer with membrane shortcuts (Fang et al., NeurIPS 2025,
github.com/bic-L/MaxFormer).

QKFormer's stages on a real-valued stream, as Max-Former has: embeddings, attention and MLPs add
currents to it, and neurons precede every convolution except the first. So no layer sees sums of
spikes. In the authors' code, too, no sample sees another, unlike in that of QKFormer.
"""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.attention import (
    HALVING_NEURON,
    Block,
    StreamAttention,
    StreamConv,
    StreamEmbedding,
    StreamMlp,
    StreamTransformer,
    attention_neuron,
    check_heads,
    convolutions_outside,
    init_as_published,
    stages,
)
from tetdist.models.base import ConvNormNeuron, conv1x1
from tetdist.models.qkformer import DVS_SIZE, IMAGE_SIZES, stage_layers, stem_layers
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.products import HeadSum, masked


class StreamTokenAttention(nn.Module):
    """QKFormer's token attention, whose current is added to a real-valued stream.

    Args:
        heads: Number of heads; each has its own mask.
        neuron: All neurons except the mask's.
        threshold: Threshold of the mask's neurons, in spikes of the query.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        neuron: NeuronConfig,
        threshold: float,
        *,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, channels)
        self.q = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.k = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.sum = HeadSum(heads)
        self.mask = Neuron(attention_neuron(neuron, threshold), heads)
        self.proj = conv1x1(channels, channels, bias=True)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x)
        mask = self.mask(self.sum(self.q(spikes)))
        return self.add(self.proj(masked(self.k(spikes), mask)), x)


def new_mlp(channels: int, ratio: int, neuron: NeuronConfig, drop_path: float) -> nn.Module:
    """Return an MLP; with a ratio of 1, as in the authors' code, each layer has a shortcut."""
    if ratio != 1:
        return StreamMlp(channels, ratio * channels, neuron, drop_path)
    fc1, fc2 = (
        StreamConv(conv1x1(channels, channels, bias=True), neuron, drop_path) for _ in range(2)
    )
    return nn.Sequential(OrderedDict(fc1=fc1, fc2=fc2))


class MSQKFormer(StreamTransformer):
    """MS-QKFormer.

    Args:
        neuron: All neurons; those of attention have another threshold, see `attention_neuron`.
        widths, depths, heads, mlp_ratio, embedding, attention_threshold, in_chans: See `QKFormer`.
    """

    default_neuron = HALVING_NEURON

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        heads: int,
        mlp_ratio: int = 4,
        embedding: Literal["imagenet", "cifar", "dvs"] = "imagenet",
        attention_threshold: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        check_heads(widths, heads)
        self.embedding = embedding
        layers, branch = stem_layers(embedding, widths[0])
        self.stem = StreamEmbedding(in_chans, layers, branch, neuron)

        def embed(before: int, width: int) -> StreamEmbedding:
            return StreamEmbedding(before, stage_layers(embedding, width), 0, neuron)

        def block(stage: int, rate: float) -> Block:
            width = widths[stage]
            attention = StreamAttention if stage == len(widths) - 1 else StreamTokenAttention
            return Block(
                attention(width, heads, neuron, attention_threshold, drop_path=rate),
                new_mlp(width, mlp_ratio, neuron, rate),
            )

        self.blocks = stages(widths, depths, drop_path_rate, embed, block)
        reduction = 2 ** sum(pools for _, pools in layers)
        self.set_stages((widths[0], reduction), *base.stages_of(widths, depths, reduction, 1))
        self.head_neuron = Neuron(neuron, widths[-1])
        self.set_head(drop_rate)
        # As in the authors' code; the other layers keep torch's own initialisation.
        of_attention = StreamAttention, StreamTokenAttention
        is_large = embedding == "imagenet"
        init_as_published(convolutions_outside(self, of_attention) if is_large else [self.fc])


class MSQKFormerDVS(MSQKFormer):
    """The same network for event frames, (B, T, 2, H, W)."""

    input_kind = "events"


# With as many parameters as QKFormer's. The last one is for DVS128 Gesture, too.
for _name, _size in IMAGE_SIZES.items():
    base.register(MSQKFormer, f"ms_qkformer_{_name}", **_size)
base.register(MSQKFormerDVS, "ms_qkformer_2_256_dvs", **DVS_SIZE)
