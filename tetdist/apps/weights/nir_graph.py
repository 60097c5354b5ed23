"""Trained network as a graph of NIR, the neuromorphic intermediate representation (package nir).

docs/weights.md has the equations by which NIR's neurons are ours. An edge carries a node's output,
and a node's input is the sum of its edges; so shortcuts, of currents (MS-ResNet) or of spikes, need
no node. Batch norm is folded into the preceding convolution. Some nodes that NIR lacks are composed
exactly, since spikes are 0 or 1: the maximum over a window is a sum above 1/2, AND is residual +
identity above 3/2, IAND is identity - residual above 1/2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import nir
import numpy as np
import torch
from torch import Tensor, nn

from tetdist.apps.weights.structure import Traversal, folded, pooled
from tetdist.models import PreActResNet, PSNSEWResNet, QKFormer, SpikingNetwork
from tetdist.models.attention import StreamTransformer
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NeuronLayer
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import MaxPool

_NO_NODE = ", for which NIR has no node"


class Signal(NamedTuple):
    """Output of some nodes, and input of the next node.

    Attributes:
        sources: The nodes whose outputs are summed.
        shape: The shape without time and batch.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]


def to_nir(model: SpikingNetwork, input_shape: Sequence[int], dt: float = 1e-4) -> nir.NIRGraph:
    """Convert a network in evaluation mode to a graph with float32 parameters.

    Args:
        input_shape: Shape of one sample at one timestep, (C, H, W).
        dt: Length of a timestep in seconds; the graph must be run with the same length.
    """
    return _Builder(model, dt).build(tuple(input_shape))


class _Builder(Traversal[Signal]):
    def __init__(self, model: SpikingNetwork, dt: float) -> None:
        super().__init__(model)
        self.dt = dt
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []

    @torch.no_grad()
    def build(self, input_shape: tuple[int, ...]) -> nir.NIRGraph:
        model = self.model
        if isinstance(model, (QKFormer, StreamTransformer)):
            pools = any(isinstance(module, NormPool) for module in model.modules())
            maximum = " and the embedding the maximum over currents" if pools else ""
            raise self.refused(f"needs products of two signals for attention{maximum}{_NO_NODE}")
        if isinstance(model, PreActResNet):
            raise self.refused(f"takes maxima of real numbers in its stem{_NO_NODE}")
        if isinstance(model, PSNSEWResNet):
            raise self.refused(f"adds a learnt number to the image at each timestep{_NO_NODE}")
        self.nodes["input"] = nir.Input({"input": np.array(input_shape)})
        x = self.run(Signal(("input",), input_shape))
        self.add("output", nir.Output({"output": np.array(x.shape)}), x, x.shape)
        metadata = {"dt": self.dt, "timesteps": model.timesteps, "producer": "tetdist"}
        return nir.NIRGraph(self.nodes, self.edges, metadata=metadata)

    def add(self, name: str, node: nir.NIRNode, x: Signal, shape: Sequence[int]) -> Signal:
        self.nodes[name] = node
        self.edges += [(source, name) for source in x.sources]
        return Signal((name,), tuple(shape))

    def convolution(self, name: str, conv: nn.Module, norm: BatchNorm | None, x: Signal) -> Signal:
        assert isinstance(conv, nn.Conv2d)
        weight, bias = folded(conv, norm)  # So parameters are rounded only once.
        stride, padding, kernel = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
        node = nir.Conv2d(
            input_shape=x.shape[1:],
            weight=_array(weight),
            stride=stride,
            padding=padding,
            dilation=1,
            groups=1,
            bias=_array(bias),
        )
        shape = (conv.out_channels, *pooled(x.shape[1:], kernel, stride, padding))
        return self.add(name, node, x, shape)

    def neurons(self, name: str, module: nn.Module, x: Signal) -> Signal:
        assert isinstance(module, NeuronLayer)
        config = module.neuron
        if not isinstance(config, LIF) or type(config) not in (LIF, PLIF):
            raise self.refused(f"has neurons of the kind {type(config).__name__}{_NO_NODE}")
        if config.reset == "soft":
            raise self.refused(
                f"resets its neurons by subtraction (model.neuron.reset is soft){_NO_NODE}"
            )
        if config.spike != "step":
            raise self.refused(
                f"has neurons without spikes (model.neuron.spike is {config.spike}){_NO_NODE}"
            )

        def everywhere(value: float) -> np.ndarray:
            return np.full(x.shape, value, np.float32)

        threshold, zero = everywhere(config.threshold), everywhere(0.0)
        if config.fires_at_threshold:
            threshold = np.nextafter(threshold, zero)
        node: nir.NIRNode
        if config.decay == 1:  # A learnt decay is never 1.
            node = nir.IF(r=everywhere(1 / self.dt), v_threshold=threshold, v_reset=zero)
            return self.add(name, node, x, x.shape)
        steps = resistance = 1 / (1 - config.decay)
        if isinstance(config, PLIF):
            steps = 1 / float(module.learned["w"].double().sigmoid())
            resistance = 1.0 if config.decay_input else steps
        node = nir.LIF(
            tau=everywhere(steps * self.dt),
            r=everywhere(resistance),
            v_leak=zero,
            v_threshold=threshold,
            v_reset=zero,
        )
        return self.add(name, node, x, x.shape)

    def max_pool(self, name: str, pool: MaxPool, x: Signal) -> Signal:
        size = pool.kernel_size, pool.stride, pool.padding
        x = self.pool(f"{name}_sum", nir.SumPool2d, x, *size)
        return self.threshold(f"{name}_any", 0.5, x)

    def mean_pool(self, name: str, side: int | None, x: Signal) -> Signal:
        side = side or x.shape[-1]
        return self.pool(name, nir.AvgPool2d, x, side, side)

    def plus(self, name: str, one: Signal, other: Signal) -> Signal:
        del name
        assert one.shape == other.shape, (one, other)
        return Signal(one.sources + other.sources, one.shape)

    def joined(self, name: str, function: str, residual: Signal, identity: Signal) -> Signal:
        if function == "and":
            return self.threshold(name, 1.5, self.plus(name, residual, identity))
        minus = nir.Scale(np.full(residual.shape, -1, np.float32))
        residual = self.add(name.replace("iand", "minus"), minus, residual, residual.shape)
        return self.threshold(name, 0.5, self.plus(name, residual, identity))

    def flattened(self, x: Signal) -> Signal:
        # Negative dimensions suit readers with and without dimensions of time and batch.
        flatten = nir.Flatten({"input": np.array(x.shape)}, start_dim=-len(x.shape), end_dim=-1)
        return self.add("head_flatten", flatten, x, (int(np.prod(x.shape)),))

    def pool(
        self, name: str, kind: type, x: Signal, kernel: Any, stride: Any, padding: Any = 0
    ) -> Signal:
        node = kind(*(np.array([size, size]) for size in (kernel, stride, padding)))
        return self.add(name, node, x, (x.shape[0], *pooled(x.shape[1:], kernel, stride, padding)))

    def threshold(self, name: str, value: float, x: Signal) -> Signal:
        return self.add(name, nir.Threshold(np.full(x.shape, value, np.float32)), x, x.shape)

    def linear(self, name: str, linear: nn.Module, x: Signal) -> Signal:
        assert isinstance(linear, nn.Linear)
        node = nir.Affine(weight=_array(linear.weight), bias=_array(linear.bias))
        return self.add(name, node, x, (linear.out_features,))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().float().numpy()
