"""Parts of spiking transformers: blocks, stages, attention's neurons, layers that pool before they
fire, layers that add currents to a real-valued stream, and the base class of such networks.

A transformer's tokens are the positions of an image (T, B, C, H, W), whose channels come last in
memory: a linear layer on tokens is a 1x1 convolution, and its norm and neurons are those of any
other. Products of spikes are in nn/products.py; each family of networks has its own file.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv1x1, conv3x3
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.dropout import rising_rates
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import Conv2d
from tetdist.nn.products import LinearAttention

# spikingjelly's neuron with tau = 2 and threshold 1, which halves its input, in other units.
HALVING_NEURON = LIF(
    decay=0.5,
    threshold=2.0,
    reset="hard",
    detach_reset=True,
    surrogate="sigmoid",
    surrogate_width=2.0,
    fires_at_threshold=True,
)


# Factor on self-attention's sums of products, independent of the number of channels.
SCALE = 0.125


def attention_neuron(neuron: NeuronConfig, threshold: float) -> NeuronConfig:
    """Return the neuron that receives attention's sums of spikes.

    No batch norm precedes it, so its threshold is a number of spikes (times attention's scale),
    independent of other neurons' thresholds. It also fires exactly at its threshold, which
    integers can reach. Kind, decay, reset and surrogate are those of the other layers.

    Args:
        threshold: Threshold in units of attention's sums; 1 in the published networks, whose
            neurons halve their input (tau = 2) and have the threshold 0.5.

    Raises:
        ValueError: The product of two spikes, which a mask computes, does not fit into a byte.
    """
    if neuron.levels == 1 and neuron.highest > 15:
        raise ValueError(
            f"attention multiplies spikes: at most 15 may be sent a timestep, not {neuron.highest}"
        )
    if isinstance(neuron, PLIF) and neuron.decay_input:
        threshold *= 1 - neuron.decay  # in units of the initially scaled input
    at_threshold = {}
    if isinstance(neuron, LIF) and neuron.spike == "step":
        at_threshold = {"fires_at_threshold": True}
    return dataclasses.replace(neuron, threshold=threshold, **at_threshold)


class ConvPoolNeuron(nn.Module):
    """Convolution, batch norm, max-pooling of the current, neuron: spikes of half the height and
    width."""

    def __init__(self, conv: Conv2d, neuron: NeuronConfig) -> None:
        super().__init__()
        self.conv = conv
        self.norm = NormPool(conv.out_channels)
        self.neuron = Neuron(neuron, conv.out_channels)

    def forward(self, x: Tensor, timesteps: int | None = None) -> Tensor:
        """Map (1 or T, B, C, H, W) to spikes (T, B, C', H', W').

        ``timesteps`` is needed only if ``x`` is (1, ...), one input for all timesteps.
        """
        current = self.conv(x)
        timesteps = timesteps or current.shape[0]
        pooled = self.norm(current, timesteps // current.shape[0])
        return self.neuron(pooled, timesteps)


class StreamEmbedding(nn.Module):
    """3x3 convolutions with neurons between them, and a shortcut around the last ones that adds its
    current to theirs.

    Args:
        layers: Channels of each convolution, and whether it halves height and width.
        branch: Number of layers before the shortcut; with 0, neurons come first: the input is a
            stream.
        strided: Halve by a convolution's stride, not by max-pooling of its current.
        pooled_shortcut: Halve the shortcut by max-pooling of its current, not by a stride.
    """

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[tuple[int, bool]],
        branch: int,
        neuron: NeuronConfig,
        *,
        strided: bool = False,
        pooled_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.neuron = Neuron(neuron, in_channels) if branch == 0 else nn.Identity()
        channels = [in_channels, *(width for width, _ in layers)]
        self.layers = nn.ModuleList()
        for before, (width, halves) in zip(channels, layers[:-1], strict=False):
            if halves and not strided:
                self.layers.append(ConvPoolNeuron(conv3x3(before, width), neuron))
            else:
                conv = conv3x3(before, width, 2 if halves else 1)
                self.layers.append(ConvNormNeuron(conv, neuron))
        width, self.pools_last = layers[-1]
        self.conv = conv3x3(channels[-2], width)
        stride = 1 if pooled_shortcut else 2 ** sum(halves for _, halves in layers[branch:])
        self.shortcut = conv1x1(channels[branch], width, stride)
        # Of the two currents, the sum normalises one; this is for the other, pooled or not.
        pools_one = self.pools_last or pooled_shortcut
        self.other_norm = NormPool(width) if pools_one else BatchNorm(width)
        self.add = NormAdd(width)

    def forward(self, x: Tensor, timesteps: int | None = None) -> Tensor:
        """Map (1 or T, B, C, H, W) to a current (T, B, C', H', W')."""
        x = branch = self.neuron(x)
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, timesteps)
            if i == self.branch:
                branch = x
        current, other = self.conv(x), self.shortcut(branch)
        if self.pools_last:
            current, other = other, current
        if isinstance(self.other_norm, NormPool):
            return self.add(current, self.other_norm(other))
        return self.add(current, other, self.other_norm)


class StreamConv(nn.Module):
    """Neurons and a convolution, whose current is added to a real-valued stream."""

    def __init__(self, conv: Conv2d, neuron: NeuronConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, conv.in_channels)
        self.conv = conv
        self.add = NormAdd(conv.out_channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv(self.neuron(x)), x)


class StreamAttention(nn.Module):
    """Spiking self-attention without a softmax (Zhou et al., Spikformer, ICLR 2023), whose current
    is added to a real-valued stream.

    Args:
        neuron: All neurons except those behind the products.
        threshold: Threshold of those, in attention's sums times ``scale``.
        value_channels: Channels of the values; None: C.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        neuron: NeuronConfig,
        threshold: float,
        *,
        scale: float = SCALE,
        value_channels: int | None = None,
        bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        value_channels = value_channels or channels
        self.neuron = Neuron(neuron, channels)
        self.q = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.k = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.v = ConvNormNeuron(conv1x1(channels, value_channels), neuron)
        self.attention = LinearAttention(heads, scale)
        self.attended = Neuron(attention_neuron(neuron, threshold), value_channels)
        self.proj = conv1x1(value_channels, channels, bias=bias)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map a current (T, B, C, H, W) to one of the same shape."""
        spikes = self.neuron(x)
        q = self.q(spikes)
        attended = self.attention.fired(q, self.k(spikes), self.v(spikes), self.attended)
        return self.add(self.proj(attended), x)


class StreamMlp(nn.Module):
    """Two layers on each token, the first one wider, added to a real-valued stream."""

    def __init__(
        self, channels: int, hidden: int, neuron: NeuronConfig, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, channels)
        self.fc1 = ConvNormNeuron(conv1x1(channels, hidden, bias=True), neuron)
        self.fc2 = conv1x1(hidden, channels, bias=True)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.fc2(self.fc1(self.neuron(x))), x)


class Block(nn.Sequential):
    """Attention, then an MLP."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(OrderedDict(attention=attention, mlp=mlp))


class StreamTransformer(SpikingNetwork):
    """A transformer whose blocks exchange currents; ``head_neuron`` fires before the classifier."""

    spike_levels = None
    head_neuron: Neuron

    def pooled(self, x: Tensor) -> Tensor:
        """Return spikes (T, B, C) of the mean current over positions."""
        current = self.over_positions(x, torch.promote_types(x.dtype, torch.float32))
        spikes: Tensor = self.head_neuron(current)
        return spikes.to(next(self.parameters()).dtype)


def check_heads(widths: Sequence[int], heads: int) -> None:
    """Raise a ValueError if a stage's channels cannot be divided among the heads."""
    if odd := [width for width in widths if width % heads]:
        raise ValueError(f"{odd[0]} channels cannot be divided among {heads} heads")


def stages(
    widths: Sequence[int],
    depths: Sequence[int],
    drop_path_rate: float,
    embedding: Callable[[int, int], nn.Module],
    block: Callable[[int, float], nn.Module],
) -> nn.Sequential:
    """Return the blocks of stages, of which all except the first begin with an embedding.

    Args:
        embedding: Returns an embedding for the channels before and after it.
        block: Returns a block for its stage (from 0) and its rate of dropped paths.

    Raises:
        ValueError: ``widths`` and ``depths`` are not of equally many stages.
    """
    if len(widths) != len(depths):
        raise ValueError(f"widths {widths} and depths {depths} must have one entry per stage")
    rates = iter(rising_rates(drop_path_rate, sum(depths)))
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage > 0:
            blocks.append(embedding(widths[stage - 1], width))
        blocks += [block(stage, next(rates)) for _ in range(depth)]
    return nn.Sequential(*blocks)


def convolutions_outside(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> Iterator[nn.Conv2d]:
    """Yield a model's convolutions that are not in modules of these kinds."""
    inside = {layer for one in model.modules() if isinstance(one, kinds) for layer in one.modules()}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer not in inside:
            yield layer


def init_as_published(layers: Iterable[nn.Module]) -> None:
    """Initialise the convolutions and linear layers among ``layers`` as the transformers' authors
    do: weights by a truncated normal distribution, biases with 0."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
