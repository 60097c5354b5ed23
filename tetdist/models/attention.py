"""What spiking transformers share: attention's neurons, and layers that pool before they fire.

A transformer's tokens are the positions of an image (T, B, C, H, W), whose channels come last in
memory: a linear layer on tokens is a 1x1 convolution, and its norm and neurons are those of any
other. The products of spikes are in nn/products.py. The families are in files of their own.
"""

import dataclasses

from torch import Tensor, nn

from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import Conv2d


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
