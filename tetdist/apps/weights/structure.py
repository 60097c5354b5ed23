"""Order of a network's layers, for exports that write each of them: NIR, and integers."""

import copy
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models import (
    MSResNet,
    SpikingNetwork,
    SpikingResNet,
    preact_resnet,
    sew_resnet,
    spiking_resnet,
)
from tetdist.models.base import ConvNormNeuron
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.packed import AvgPool, MaxPool

S = TypeVar("S")


class Traversal(ABC, Generic[S]):
    """Visits the layers of a timestep from the input to the logits, and names them.

    A subclass writes a layer in each of the abstract methods, and returns its output: an ``S``.

    Args:
        model: A network of tetdist, in evaluation mode.
    """

    instead = "onnx or torch"  # Formats for networks that this one cannot express.

    def __init__(self, model: SpikingNetwork) -> None:
        self.model = model

    @abstractmethod
    def convolution(self, name: str, conv: nn.Module, norm: BatchNorm | None, x: S) -> S: ...

    @abstractmethod
    def neurons(self, name: str, module: nn.Module, x: S) -> S: ...

    @abstractmethod
    def linear(self, name: str, linear: nn.Module, x: S) -> S: ...

    @abstractmethod
    def max_pool(self, name: str, pool: MaxPool, x: S) -> S: ...

    @abstractmethod
    def mean_pool(self, name: str, side: int | None, x: S) -> S:
        """Average windows of ``side`` x ``side``; None: all positions."""

    @abstractmethod
    def plus(self, name: str, one: S, other: S) -> S: ...

    @abstractmethod
    def joined(self, name: str, function: str, residual: S, identity: S) -> S:
        """Join spikes by a connect function other than ADD."""

    @abstractmethod
    def flattened(self, x: S) -> S: ...

    def stream(self, name: str, x: S) -> S:
        """Write the current between the blocks of networks with membrane shortcuts."""
        del name
        return x

    def refused(self, what: str) -> UserError:
        name = getattr(self.model, "default_cfg", {}).get("architecture", type(self.model).__name__)
        return UserError(f"{name} {what}; export it to {self.instead}")

    def run(self, x: S) -> S:
        """Visit all layers, from the input to the logits."""
        model = self.model
        x = self.layer("stem", model.stem, x)
        # Families without a pooling in the stem lack the attribute, or have an identity.
        x = self.layer("pool", getattr(model, "pool", nn.Identity()), x)
        x = self.layer("blocks", model.blocks, x)
        if isinstance(model, MSResNet):
            x = self.neurons("neuron", model.neuron, x)
        if isinstance(model, (sew_resnet.SEWResNet, SpikingResNet, MSResNet)):
            x = self.mean_pool("head_pool", None, x)
        x = self.flattened(x)
        if isinstance(model, SpikingResNet) and isinstance(model.hidden, nn.Sequential):
            linear, neuron = model.hidden
            x = self.linear("hidden_linear", linear, x)
            x = self.neurons("hidden_neuron", neuron, x)
        return x if isinstance(model.fc, nn.Identity) else self.linear("fc", model.fc, x)

    def layer(self, name: str, module: nn.Module, x: S) -> S:
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
                x = self.convolution(f"{name}_conv", last, module.add.norm, x)
                return self.stream(f"{name}_stream", x)
            case preact_resnet.Block():
                return self.preact_block(name, module, x)
            case sew_resnet.BasicBlock() | sew_resnet.Bottleneck():
                return self.sew_block(name, module, x)
            case spiking_resnet.BasicBlock() | spiking_resnet.Bottleneck():
                return self.spiking_block(name, module, x)
            case MaxPool():
                return self.max_pool(name, module, x)
            case AvgPool():
                return self.mean_pool(name, 2, x)
        raise self.refused(f"has a layer of the kind {type(module).__name__}")

    def preact_block(self, name: str, block: preact_resnet.Block, x: S) -> S:
        residual = self.neurons(f"{name}_neuron", block.neuron, x)
        residual = self.layer(f"{name}_conv1", block.conv1, residual)
        residual = self.convolution(f"{name}_conv2", block.conv2, block.add.norm, residual)
        shortcut = self.layer(f"{name}_pool", block.pool, x)
        if block.downsample_norm is not None:
            shortcut = self.convolution(
                f"{name}_downsample", block.downsample, block.downsample_norm, shortcut
            )
        return self.stream(f"{name}_stream", self.plus(f"{name}_add", residual, shortcut))

    def sew_block(self, name: str, block: Any, x: S) -> S:
        identity = self.layer(f"{name}_downsample", block.downsample, x)
        residual = x
        for layer in ("conv1", "conv2", "conv3")[: 2 if block.expansion == 1 else 3]:
            residual = self.layer(f"{name}_{layer}", getattr(block, layer), residual)
        if block.function == "add":
            return self.plus(f"{name}_add", residual, identity)
        return self.joined(f"{name}_{block.function}", block.function, residual, identity)

    def spiking_block(self, name: str, block: Any, x: S) -> S:
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
        current = self.plus(f"{name}_merge_add", residual, shortcut)
        return self.neurons(f"{name}_merge_neuron", merge.neuron, current)


def pooled(shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    """Return the height and width after a convolution or pooling."""
    return tuple((side + 2 * padding - kernel) // stride + 1 for side in shape)


def folded(conv: nn.Conv2d, norm: BatchNorm | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution and its norm, in double precision."""
    offset = torch.zeros(conv.out_channels, dtype=torch.float64)
    gain, bias = torch.ones_like(offset), 0.0 if conv.bias is None else conv.bias.double()
    if norm is not None:
        norm = copy.deepcopy(norm).double()
        gain, offset = norm.gain_and_offset(norm.running_mean, norm.running_var)
    return conv.weight.double() * gain.view(-1, 1, 1, 1), offset + gain * bias
