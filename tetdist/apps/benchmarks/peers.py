"""Transformers of torch's layers and spikingjelly's neurons, as in their authors' code.

spikingjelly has no transformers. These are the networks of models/qkformer.py,
models/spike_driven_transformer.py, models/max_former.py and models/espikeformer.py, for images of
ImageNet's size, with the same weights in the same order, built as published code builds them:
convolution and batch norm on (T * B, C, H, W), neurons in multi-step mode on (T, B, C, H, W), and
attention's tensors in the order of heads and tokens.
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
        self,
        conv: nn.Conv2d,
        neuron: nn.Module | None = None,
        *,
        pools: bool = False,
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


def depthwise(channels: int, kernel: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=channels, bias=bias)


class SelfAttention(nn.Module):
    """Self-attention, added to its input; values may be wider than the input.

    Args:
        first: Neurons before all, where the input is a current.
        last: Neurons behind the projection, where the input is spikes.
        scale: Factor of the attended values.
        threshold: Threshold of the neurons that these go through.
        value_ratio: Width of the values, as a multiple of the input's.
        bias: True if the projection has a bias.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        make: MakeNeuron,
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
        scale: float = 0.125,
        threshold: float = OF_ATTENTION,
        value_ratio: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        wide = value_ratio * channels
        self.first = first or nn.Identity()
        self.q = Layer(conv1x1(channels, channels), make())
        self.k = Layer(conv1x1(channels, channels), make())
        self.v = Layer(conv1x1(channels, wide), make())
        self.neuron = make(threshold)
        self.proj = Layer(conv1x1(wide, channels, bias=bias), last)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.first(x)
        q, k, v = (of_heads(layer(spikes), self.heads) for layer in (self.q, self.k, self.v))
        wide = torch.Size([*x.shape[:2], v.shape[2] * v.shape[4], *x.shape[3:]])
        attended = image_of(q @ (k.mT @ v) * self.scale, wide)
        y: Tensor = self.proj(self.neuron(attended)) + x
        return y


def driven_mlp(channels: int, make: MakeNeuron) -> nn.Module:
    """MLP that begins with neurons and adds its last convolution's current to the stream."""
    wide = 4 * channels
    layers = (
        Layer(conv1x1(channels, wide, bias=True), make()),
        Layer(conv1x1(wide, channels, bias=True)),
    )
    return Residual(make(), *layers)


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
            parts.append(
                SelfAttention(width, heads, make, last=make())
                if is_last
                else TokenAttention(width, heads, make)
            )
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


def spike_driven_transformer(channels: int, depth: int, make: MakeNeuron) -> Network:
    """Make the network of models/spike_driven_transformer.py."""
    parts: list[nn.Module] = [DrivenEmbedding(channels, make)]
    for _ in range(depth):
        parts += [DrivenAttention(channels, 8, make), driven_mlp(channels, make)]
    return Network(parts, make(), channels)


# -------------------------------------------------------------------------------------- Max-Former


class Joined(nn.Module):
    """Sum of the currents of two convolutions; the second one's shortcut may be pooled."""

    def __init__(self, conv: nn.Conv2d, shortcut: nn.Conv2d, *, pools: bool = False) -> None:
        super().__init__()
        self.conv, self.shortcut = conv, shortcut
        self.shortcut_norm = nn.BatchNorm2d(conv.out_channels)
        self.norm = nn.BatchNorm2d(conv.out_channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pools else nn.Identity()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        current = self.norm(self.conv(x.flatten(0, 1)))
        shortcut = self.pool(self.shortcut_norm(self.shortcut(other.flatten(0, 1))))
        y: Tensor = (current + shortcut).unflatten(0, x.shape[:2])
        return y


class MaxStem(nn.Module):
    def __init__(self, channels: int, make: MakeNeuron) -> None:
        super().__init__()
        half = channels // 2
        self.first = Layer(nn.Conv2d(3, half, 3, 2, 1, bias=False), make())
        self.second = Layer(nn.Conv2d(half, channels, 3, 2, 1, bias=False), make())
        self.joined = Joined(conv3x3(channels, channels), conv1x1(half, channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        y: Tensor = self.joined(self.second(first), first)
        return y


class MaxEmbedding(nn.Module):
    def __init__(self, before: int, channels: int, make: MakeNeuron) -> None:
        super().__init__()
        self.neuron = make()
        self.layer = Layer(conv3x3(before, channels), make(), pools=True)
        self.joined = Joined(conv3x3(channels, channels), conv1x1(before, channels), pools=True)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x)
        y: Tensor = self.joined(self.layer(spikes), spikes)
        return y


def max_former(
    widths: Sequence[int], depths: Sequence[int], heads: int, make: MakeNeuron
) -> Network:
    """Make the network of models/max_former.py."""
    parts: list[nn.Module] = [MaxStem(widths[0], make)]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage > 0:
            parts.append(MaxEmbedding(widths[stage - 1], width, make))
        for _ in range(depth):
            if stage < 2:
                conv = depthwise(width, (7, 5)[stage], bias=True)
                parts.append(Residual(make(), Layer(conv)))
            else:
                parts.append(SelfAttention(width, heads, make, first=make()))
            parts.append(driven_mlp(width, make))
    return Network(parts, make(), widths[-1])


# ----------------------------------------------------------------------------------- E-SpikeFormer


def espikeformer(
    widths: Sequence[int],
    depths: Sequence[int],
    heads: int,
    make: MakeNeuron,
    counting: MakeNeuron,
) -> Network:
    """Make the network of models/espikeformer.py; ``make`` makes neurons that send shares of 1, and
    ``counting`` those before the classifier, which send whole numbers.
    """

    def separable(channels: int, kernel: int) -> nn.Module:
        wide = 2 * channels
        return Residual(
            make(),
            Layer(conv1x1(channels, wide), make()),
            Layer(depthwise(wide, kernel, bias=False), make()),
            Layer(conv1x1(wide, channels)),
        )

    def convolutional(channels: int) -> list[nn.Module]:
        wide = 4 * channels
        mlp = [make(), Layer(conv3x3(channels, wide), make()), Layer(conv3x3(wide, channels))]
        return [separable(channels, 7), Residual(*mlp)]

    def downsampling(before: int, channels: int, stride: int) -> list[nn.Module]:
        return [make(), Layer(nn.Conv2d(before, channels, 3, stride, 1))]

    def transformer(channels: int) -> list[nn.Module]:
        attention = SelfAttention(
            channels,
            heads,
            make,
            first=make(),
            scale=2 * (channels // heads) ** -0.5,
            threshold=1.0,
            value_ratio=4,
            bias=False,
        )
        return [separable(channels, 3), attention, driven_mlp(channels, make)]

    first, second, third, fourth = widths
    parts = [Layer(nn.Conv2d(3, first // 2, 7, 2, 3)), *convolutional(first // 2)]
    parts += [*downsampling(first // 2, first, 2), *convolutional(first)]
    parts += downsampling(first, second, 2)
    parts += [*convolutional(second), *convolutional(second)]
    parts += downsampling(second, third, 2)
    parts += [part for _ in range(depths[0]) for part in transformer(third)]
    parts += downsampling(third, fourth, 1)
    parts += [part for _ in range(depths[1]) for part in transformer(fourth)]
    return Network(parts, counting(), fourth)
