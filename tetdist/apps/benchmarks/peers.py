"""Transformers of torch's layers and spikingjelly's neurons, as in their authors' code.

spikingjelly has no transformers. These are the networks of models/qkformer.py and
models/spike_driven_transformer.py, for images of ImageNet's size, with the same weights in the same
order, built as published code builds them: convolution and batch norm on (T * B, C, H, W), neurons
in multi-step mode on (T, B, C, H, W), and attention's tensors in the order of heads and tokens.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class MakeNeuron(Protocol):
    """Constructor of a layer of spikingjelly's neurons."""

    def __call__(self, threshold: float = 1.0) -> nn.Module: ...


# Of the neurons in attention where the others have 1 and halve their input.
OF_ATTENTION = 0.5


class Network(nn.Module):
    """Parts in sequence on frames (T, B, 3, H, W), the mean over pixels, and a classifier."""

    def __init__(self, parts: Sequence[nn.Module], neuron: nn.Module, channels: int) -> None:
        super().__init__()
        self.parts, self.neuron = nn.Sequential(*parts), neuron
        self.head = nn.Linear(channels, 1000)

    def forward(self, frames: Tensor) -> Tensor:
        y: Tensor = self.head(self.neuron(self.parts(frames).mean((3, 4))))
        return y


class Residual(nn.Module):
    """Layers in sequence, added to their input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) + x
        return y


class Layer(nn.Module):
    """Convolution, batch norm, then optionally pooling and neurons."""

    def __init__(
        self, conv: nn.Conv2d, neuron: nn.Module | None = None, *, pools: bool = False
    ) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(conv.out_channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pools else nn.Identity()
        self.neuron = neuron or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        current = self.pool(self.norm(self.conv(x.flatten(0, 1))))
        y: Tensor = self.neuron(current.unflatten(0, x.shape[:2]).contiguous())
        return y


def conv3x3(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=False)


def conv1x1(before: int, after: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1, stride=stride, bias=bias)


def of_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape (T, B, C, H, W) to (T, B, heads, N, d)."""
    return x.flatten(3).unflatten(2, (heads, -1)).transpose(3, 4).contiguous()


def image_of(x: Tensor, shape: torch.Size) -> Tensor:
    """Invert `of_heads`."""
    return x.transpose(3, 4).reshape(shape).contiguous()


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, make: MakeNeuron) -> None:
        super().__init__()
        self.heads = heads
        self.q = Layer(conv1x1(channels, channels), make())
        self.k = Layer(conv1x1(channels, channels), make())
        self.v = Layer(conv1x1(channels, channels), make())
        self.neuron = make(OF_ATTENTION)
        self.proj = Layer(conv1x1(channels, channels, bias=True), make())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (of_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        attended = image_of(q @ (k.mT @ v) * 0.125, x.shape)
        y: Tensor = self.proj(self.neuron(attended)) + x
        return y


# ---------------------------------------------------------------------------------------- QKFormer


class Embedding(nn.Module):
    def __init__(
        self, before: int, layers: Sequence[tuple[int, bool]], branch: int, make: MakeNeuron
    ) -> None:
        super().__init__()
        widths = [before, *(width for width, _ in layers)]
        self.branch = branch
        self.layers = nn.ModuleList(
            Layer(conv3x3(before, width), make(), pools=pools)
            for before, (width, pools) in zip(widths, layers, strict=False)
        )
        stride = 2 ** sum(pools for _, pools in layers[branch:])
        self.shortcut = Layer(conv1x1(widths[branch], widths[-1], stride), make())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.branch]:
            x = layer(x)
        y = x
        for layer in self.layers[self.branch :]:
            y = layer(y)
        return y + self.shortcut(x)


class TokenAttention(nn.Module):
    def __init__(self, channels: int, heads: int, make: MakeNeuron) -> None:
        super().__init__()
        self.heads = heads
        self.q = Layer(conv1x1(channels, channels), make())
        self.k = Layer(conv1x1(channels, channels), make())
        self.neuron = make(OF_ATTENTION)
        self.proj = Layer(conv1x1(channels, channels, bias=True), make())

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.q, self.k))
        mask = self.neuron(q.sum(3, keepdim=True))
        return x + self.proj((mask * k).flatten(2, 3))


def qkformer(widths: Sequence[int], depths: Sequence[int], heads: int, make: MakeNeuron) -> Network:
    """Make the network of models/qkformer.py."""
    first = widths[0]
    parts: list[nn.Module] = [
        Embedding(3, [(first // 2, True), (first, True), (first, False)], 1, make)
    ]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage > 0:
            parts.append(Embedding(widths[stage - 1], [(width, True), (width, False)], 0, make))
        for _ in range(depth):
            is_last = stage == len(widths) - 1
            attention = SelfAttention if is_last else TokenAttention
            parts.append(attention(width, heads, make))
            layers = (width, 4 * width), (4 * width, width)
            parts.append(Residual(*(Layer(conv1x1(*one, bias=True), make()) for one in layers)))
    return Network(parts, nn.Identity(), widths[-1])


# ------------------------------------------------------------------------- Spike-driven Transformer


class DrivenEmbedding(nn.Module):
    def __init__(self, channels: int, make: MakeNeuron) -> None:
        super().__init__()
        widths = [3, channels // 8, channels // 4, channels // 2]
        self.layers = nn.ModuleList(
            Layer(conv3x3(before, after), make()) for before, after in itertools.pairwise(widths)
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.last = Layer(conv3x3(widths[-1], channels), pools=True)
        self.neuron = make()
        self.position = Layer(conv3x3(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            spikes = layer(x)
            x = self.pool(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        current = self.last(x)
        y: Tensor = self.position(self.neuron(current)) + current
        return y


class DrivenAttention(nn.Module):
    def __init__(self, channels: int, heads: int, make: MakeNeuron) -> None:
        super().__init__()
        self.heads = heads
        self.neuron = make()
        self.q = Layer(conv1x1(channels, channels), make())
        self.k = Layer(conv1x1(channels, channels), make())
        self.v = Layer(conv1x1(channels, channels), make())
        self.mask = make(OF_ATTENTION)
        self.proj = Layer(conv1x1(channels, channels, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x)
        q, k, v = (of_heads(layer(spikes), self.heads) for layer in (self.q, self.k, self.v))
        mask = self.mask((k * v).sum(3, keepdim=True))
        y: Tensor = self.proj(image_of(q * mask, x.shape)) + x
        return y


def driven_mlp(channels: int, make: MakeNeuron) -> nn.Module:
    """MLP that begins with neurons and adds its last convolution's current to the stream."""
    wide = 4 * channels
    layers = (
        Layer(conv1x1(channels, wide, bias=True), make()),
        Layer(conv1x1(wide, channels, bias=True)),
    )
    return Residual(make(), *layers)


def spike_driven_transformer(channels: int, depth: int, make: MakeNeuron) -> Network:
    """Make the network of models/spike_driven_transformer.py."""
    parts: list[nn.Module] = [DrivenEmbedding(channels, make)]
    for _ in range(depth):
        parts += [DrivenAttention(channels, 8, make), driven_mlp(channels, make)]
    return Network(parts, make(), channels)
