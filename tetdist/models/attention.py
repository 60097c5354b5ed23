"""Parts of spiking transformers: blocks, attention's neurons, layers that pool before they fire,
and the base of networks whose blocks exchange currents.

A transformer's tokens are the positions of an image (T, B, C, H, W), whose channels come last in
memory: a linear layer on tokens is a 1x1 convolution, and its norm and neurons are those of any
other. The products of spikes are in nn/products.py. The families are in files of their own.
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
from tetdist.nn.packed import Conv2d, converted
from tetdist.nn.products import LinearAttention

# spikingjelly's with tau = 2 and threshold 1, whose input is halved: the membrane in other units.
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
    """The neuron that attention's sums of spikes go to, made of that of the other layers.

    No batch norm comes before it, so its threshold is a number of spikes (times attention's scale),
    whatever the threshold of neurons behind a norm; and it fires at its threshold, too, since "as
    many spikes as that" is what a whole number can be. All else is as in the other layers: kind,
    decay, reset, surrogate.

    Args:
        neuron: That of the other layers.
        threshold: In units of attention's sums. 1 in the published networks, whose neurons halve
            their input (tau = 2) and have the threshold 0.5.

    Raises:
        ValueError: A byte does not hold the product of two spikes, which a mask makes.
    """
    if neuron.levels == 1 and neuron.highest > 15:
        raise ValueError(
            f"attention multiplies spikes: at most 15 may be sent a timestep, not {neuron.highest}"
        )
    if isinstance(neuron, PLIF) and neuron.decay_input:
        threshold *= 1 - neuron.decay  # in units of the input as the neuron scales it, at first
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
        """(1 or T, B, C, H, W) to spikes (T, B, C', H', W').

        ``timesteps`` is needed only where ``x`` is (1, ...), one input for all of them.
        """
        current = self.conv(x)
        timesteps = timesteps or current.shape[0]
        pooled = self.norm(current, timesteps // current.shape[0])
        return self.neuron(pooled, timesteps)


class StreamAttention(nn.Module):
    """Spiking self-attention without a softmax (Zhou et al., Spikformer, ICLR 2023), of a
    real-valued stream, to which its current is added.

    Args:
        channels: C of the stream.
        heads: Each attends by itself.
        neuron: All neurons but those behind the products.
        threshold: Of these, in attention's sums times ``scale``.
        scale: Of the products' sums.
        value_channels: Of the values; None: C.
        bias: Whether the last convolution has one.
        drop_path: How often what is added is dropped in training.
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
        """A current (T, B, C, H, W) to one of the same shape."""
        spikes = self.neuron(x)
        q = self.q(spikes)
        sums = self.attention(q, self.k(spikes), self.v(spikes))
        # The sums are float32, and what they decide are spikes.
        return self.add(self.proj(converted(self.attended(sums), q.dtype)), x)


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
        """Spikes (T, B, C) of the mean current over positions."""
        current = x.mean((3, 4), dtype=torch.promote_types(x.dtype, torch.float32))
        spikes: Tensor = self.head_neuron(current)
        return spikes.to(next(self.parameters()).dtype)


def init_as_published(layers: Iterable[nn.Module]) -> None:
    """Begin convolutions and linear layers among the given as the authors of transformers do: with
    a truncated normal distribution, and biases of 0."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
