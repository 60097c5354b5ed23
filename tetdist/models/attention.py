"""What spiking transformers share: attention's neurons, attention of a real-valued stream, layers
that pool before they fire.

A transformer's tokens are the positions of an image (T, B, C, H, W), whose channels come last in
memory: a linear layer on tokens is a 1x1 convolution, and its norm and neurons are those of any
other. The products of spikes are in nn/products.py. The families are in files of their own.
"""

import dataclasses

from torch import Tensor, nn

from tetdist.models.base import ConvNormNeuron, conv1x1
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import Conv2d
from tetdist.nn.products import LinearAttention


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
    """
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
        self.add = NormAdd(channels)

    def forward(self, x: Tensor) -> Tensor:
        """A current (T, B, C, H, W) to one of the same shape."""
        spikes = self.neuron(x)
        sums = self.attention(self.q(spikes), self.k(spikes), self.v(spikes))
        return self.add(self.proj(self.attended(sums)), x)
