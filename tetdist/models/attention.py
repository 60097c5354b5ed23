"""Parts of spiking transformers: blocks, attention's neurons, layers that pool before they fire,
and the base class of networks whose blocks exchange currents.

A transformer's tokens are the positions of an image (T, B, C, H, W), whose channels come last in
memory: a linear layer on tokens is a 1x1 convolution, and its norm and neurons are those of any
other. Products of spikes are in nn/products.py; each family of networks has its own file.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv1x1
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


def attention_neuron(neuron: NeuronConfig, threshold: float) -> NeuronConfig:
    """Return the neuron that receives attention's sums of spikes.

    No batch norm precedes it, so its threshold is a number of spikes (times attention's scale),
    independent of other neurons' thresholds. It also fires exactly at its threshold, which whole
    numbers can reach. Kind, decay, reset and surrogate are those of the other layers.

    Args:
        neuron: Neuron of the other layers.
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


class StreamAttention(nn.Module):
    """Spiking self-attention without a softmax (Zhou et al., Spikformer, ICLR 2023), whose current
    is added to a real-valued stream.

    Args:
        channels: C of the stream.
        heads: Each attends by itself.
        neuron: All neurons except those behind the products.
        threshold: Threshold of those, in attention's sums times ``scale``.
        scale: Factor on the products' sums.
        value_channels: Channels of the values; None: C.
        bias: True if the last convolution has a bias.
        drop_path: Probability of dropping the added current in training.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        neuron: NeuronConfig,
        threshold: float,
        *,
        scale: float,
        value_channels: int | None = None,
        bias: bool,
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
        current = x.mean((3, 4), dtype=torch.promote_types(x.dtype, torch.float32))
        spikes: Tensor = self.head_neuron(current)
        return spikes.to(next(self.parameters()).dtype)


def init_as_published(layers: Iterable[nn.Module]) -> None:
    """Initialise the convolutions and linear layers among ``layers`` as the transformers' authors
    do: weights by a truncated normal distribution, biases with 0."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
