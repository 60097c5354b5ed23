"""Trained network as a graph of NIR, the neuromorphic intermediate representation (package nir).

NIR's neurons are differential equations. Integrated by the Euler method with step ``dt``, as other
libraries do, they equal ours exactly (without input scaling, which ``R`` undoes):

    nir.IF   dv/dt = R I             v <- v + dt R I                        R = 1 / dt
    nir.LIF  tau dv/dt = -v + R I    v <- (1 - dt/tau) v + (dt/tau) R I     tau = dt / (1 - decay)
                                                                            R = tau / dt

A neuron that scales its input by 1/tau, as PLIF does, is nir.LIF with R = 1.

Both fire if v is above the threshold, and are then reset to 0 (hard reset). NIR has no node for the
soft reset. Neurons that also fire exactly at the threshold get the next smaller float32.

An edge carries a node's output, and a node's input is the sum of its edges; so shortcuts, of
currents (MS-ResNet) or of spikes, need no node. Batch norm is folded into the preceding
convolution. Some nodes that NIR lacks are composed exactly, since spikes are 0 or 1: the maximum
over a window is a sum above 1/2, AND is residual + identity above 3/2, IAND is identity - residual
above 1/2. This is impossible for a maximum of real numbers, so PreAct-ResNets are refused.

The graph runs one timestep at a time. Its input is the image at every timestep, or the timestep's
event bin; its output is the timestep's logits, whose mean is the prediction.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import nir
import numpy as np
import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models import (
    ESpikeFormer,
    MaxFormer,
    MSResNet,
    PreActResNet,
    PSNSEWResNet,
    QKFormer,
    SpikeDrivenTransformer,
    SpikingNetwork,
    SpikingResNet,
    preact_resnet,
    sew_resnet,
    spiking_resnet,
)
from tetdist.models.base import ConvNormNeuron
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NeuronLayer
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import AvgPool, MaxPool


class Signal(NamedTuple):
    """Output of some nodes, and input of the next node.

    Attributes:
        sources: The nodes whose outputs are summed.
        shape: The shape without time and batch.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]

    def plus(self, other: "Signal") -> "Signal":
        assert self.shape == other.shape, (self, other)
        return Signal(self.sources + other.sources, self.shape)


def to_nir(model: SpikingNetwork, input_shape: Sequence[int], dt: float = 1e-4) -> nir.NIRGraph:
    """Convert a network in evaluation mode to a graph with float32 parameters.

    Args:
        model: A network of tetdist.
        input_shape: Shape of one sample at one timestep, (C, H, W).
        dt: Length of a timestep in seconds; the graph must be run with the same length.

    Raises:
        UserError: NIR cannot express the network.
    """
    return _Builder(model, dt).build(tuple(input_shape))


class _Builder:
    def __init__(self, model: SpikingNetwork, dt: float) -> None:
        self.model, self.dt = model, dt
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []

    @torch.no_grad()
    def build(self, input_shape: tuple[int, ...]) -> nir.NIRGraph:
        model = self.model
        if isinstance(model, (ESpikeFormer, MaxFormer, QKFormer, SpikeDrivenTransformer)):
            pools = any(isinstance(module, NormPool) for module in model.modules())
            maximum = ", nor for the embedding's maximum over currents"
            raise UserError(
                f"NIR cannot express {type(model).__name__}: it has no node for the product of two "
                f"signals, which attention needs{maximum if pools else ''}; export it to onnx or "
                "torch"
            )
        if isinstance(model, PreActResNet):
            self.refuse("takes maxima of real numbers in its stem")
        if isinstance(model, PSNSEWResNet):
            self.refuse("adds a learnt number to the image at each timestep")
        self.nodes["input"] = nir.Input({"input": np.array(input_shape)})
        x = self.layer("stem", model.stem, Signal(("input",), input_shape))
        # Families without a pooling in the stem lack the attribute, or have an identity.
        x = self.layer("pool", getattr(model, "pool", nn.Identity()), x)
        x = self.layer("blocks", model.blocks, x)
        x = self.head(x)
        self.add("output", nir.Output({"output": np.array(x.shape)}), x, x.shape)
        metadata = {"dt": self.dt, "timesteps": model.timesteps, "producer": "tetdist"}
        return nir.NIRGraph(self.nodes, self.edges, metadata=metadata)

    def refuse(self, what: str) -> NoReturn:
        raise UserError(
            f"{self.model.default_cfg['architecture']} {what}, for which NIR has no node; export "
            "it to onnx or torch"
        )

    def add(self, name: str, node: nir.NIRNode, x: Signal, shape: Sequence[int]) -> Signal:
        self.nodes[name] = node
        self.edges += [(source, name) for source in x.sources]
        return Signal((name,), tuple(shape))

    def layer(self, name: str, module: nn.Module, x: Signal) -> Signal:
        match module:
            case nn.Identity():
                return x
            case nn.Sequential():
                for child_name, child in module.named_children():
                    x = self.layer(f"{name}_{child_name}", child, x)
                return x
            case ConvNormNeuron():
                norm_neuron = module.neuron
                x = self.convolution(f"{name}_conv", module.conv, norm_neuron.norm, x)
                return self.neurons(f"{name}_neuron", norm_neuron, x)
            case preact_resnet.Stem():
                stem = module.conv
                *convs, last = stem if isinstance(stem, nn.Sequential) else [stem]
                for i, conv in enumerate(convs):
                    x = self.convolution(f"{name}_conv{i}", conv, None, x)
                return self.convolution(f"{name}_conv", last, module.add.norm, x)
            case preact_resnet.Block():
                return self.preact_block(name, module, x)
            case sew_resnet.BasicBlock() | sew_resnet.Bottleneck():
                return self.sew_block(name, module, x)
            case spiking_resnet.BasicBlock() | spiking_resnet.Bottleneck():
                return self.spiking_block(name, module, x)
            case MaxPool():
                size = module.kernel_size, module.stride, module.padding
                x = self.pool(f"{name}_sum", nir.SumPool2d, x, *size)
                return self.threshold(f"{name}_any", 0.5, x)
            case AvgPool():
                return self.pool(name, nir.AvgPool2d, x, 2, 2)
        raise AssertionError(f"no node of NIR for {type(module).__name__}")

    def head(self, x: Signal) -> Signal:
        model = self.model
        if isinstance(model, MSResNet):
            x = self.neurons("neuron", model.neuron, x)
        if isinstance(model, (sew_resnet.SEWResNet, SpikingResNet, MSResNet)):
            x = self.pool("head_pool", nir.AvgPool2d, x, x.shape[-1], x.shape[-1])
        size = int(np.prod(x.shape))
        # Negative dimensions suit readers with and without dimensions of time and batch.
        flatten = nir.Flatten({"input": np.array(x.shape)}, start_dim=-len(x.shape), end_dim=-1)
        x = self.add("head_flatten", flatten, x, (size,))
        if isinstance(model, SpikingResNet) and isinstance(model.hidden, nn.Sequential):
            linear, neuron = model.hidden
            x = self.affine("hidden_linear", linear, x)
            x = self.neurons("hidden_neuron", neuron, x)
        return x if isinstance(model.fc, nn.Identity) else self.affine("fc", model.fc, x)

    def preact_block(self, name: str, block: preact_resnet.Block, x: Signal) -> Signal:
        residual = self.neurons(f"{name}_neuron", block.neuron, x)
        residual = self.layer(f"{name}_conv1", block.conv1, residual)
        residual = self.convolution(f"{name}_conv2", block.conv2, block.add.norm, residual)
        shortcut = self.layer(f"{name}_pool", block.pool, x)
        if block.downsample_norm is not None:
            shortcut = self.convolution(
                f"{name}_downsample", block.downsample, block.downsample_norm, shortcut
            )
        return residual.plus(shortcut)

    def sew_block(self, name: str, block: Any, x: Signal) -> Signal:
        identity = self.layer(f"{name}_downsample", block.downsample, x)
        residual = x
        for layer in ("conv1", "conv2", "conv3")[: 2 if block.expansion == 1 else 3]:
            residual = self.layer(f"{name}_{layer}", getattr(block, layer), residual)
        match block.function:
            case "add":
                return residual.plus(identity)
            case "and":
                return self.threshold(f"{name}_and", 1.5, residual.plus(identity))
            case "iand":
                minus = nir.Scale(np.full(residual.shape, -1, np.float32))
                residual = self.add(f"{name}_minus", minus, residual, residual.shape)
                return self.threshold(f"{name}_iand", 0.5, residual.plus(identity))
        raise AssertionError(f"no node of NIR for the connect function {block.function}")

    def spiking_block(self, name: str, block: Any, x: Signal) -> Signal:
        residual = x
        for layer in ("conv1", "conv2")[: 1 if block.expansion == 1 else 2]:
            residual = self.layer(f"{name}_{layer}", getattr(block, layer), residual)
        merge = block.merge
        residual = self.convolution(f"{name}_merge_conv", merge.conv, merge.neuron.norm, residual)
        shortcut = x
        if merge.downsample_norm is not None:
            shortcut = self.convolution(
                f"{name}_downsample_conv", merge.downsample, merge.downsample_norm, x
            )
        return self.neurons(f"{name}_merge_neuron", merge.neuron, residual.plus(shortcut))

    def convolution(self, name: str, conv: nn.Module, norm: BatchNorm | None, x: Signal) -> Signal:
        assert isinstance(conv, nn.Conv2d)
        # Fold in double precision, so that the graph's parameters are rounded only once.
        offset = torch.zeros(conv.out_channels, dtype=torch.float64)
        gain, bias = torch.ones_like(offset), 0.0 if conv.bias is None else conv.bias.double()
        if norm is not None:
            norm = copy.deepcopy(norm).double()
            gain, offset = norm.affine(norm.running_mean, norm.running_var)
        stride, padding, kernel = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
        node = nir.Conv2d(
            input_shape=x.shape[1:],
            weight=_array(conv.weight.double() * gain.view(-1, 1, 1, 1)),
            stride=stride,
            padding=padding,
            dilation=1,
            groups=1,
            bias=_array(offset + gain * bias),
        )
        shape = (conv.out_channels, *_pooled(x.shape[1:], kernel, stride, padding))
        return self.add(name, node, x, shape)

    def neurons(self, name: str, module: nn.Module, x: Signal) -> Signal:
        assert isinstance(module, NeuronLayer)
        config = module.neuron
        if not isinstance(config, LIF) or type(config) not in (LIF, PLIF):
            raise UserError(
                f"NIR has no neurons of the kind {type(config).__name__}, which this network has; "
                "export it to onnx or torch"
            )
        if config.reset == "soft":
            self.refuse("resets its neurons by subtraction (model.neuron.reset is soft)")
        if config.spike != "step":
            self.refuse(f"has neurons without spikes (model.neuron.spike is {config.spike})")

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

    def pool(
        self, name: str, kind: type, x: Signal, kernel: Any, stride: Any, padding: Any = 0
    ) -> Signal:
        node = kind(*(np.array([size, size]) for size in (kernel, stride, padding)))
        return self.add(name, node, x, (x.shape[0], *_pooled(x.shape[1:], kernel, stride, padding)))

    def threshold(self, name: str, value: float, x: Signal) -> Signal:
        return self.add(name, nir.Threshold(np.full(x.shape, value, np.float32)), x, x.shape)

    def affine(self, name: str, linear: nn.Module, x: Signal) -> Signal:
        assert isinstance(linear, nn.Linear)
        node = nir.Affine(weight=_array(linear.weight), bias=_array(linear.bias))
        return self.add(name, node, x, (linear.out_features,))


def _pooled(shape: Sequence[int], kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    return tuple((side + 2 * padding - kernel) // stride + 1 for side in shape)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().float().numpy()
