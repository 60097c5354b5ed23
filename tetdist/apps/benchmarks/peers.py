"""Transformers of torch's layers and spikingjelly's neurons, for comparison: as their authors do.

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
    """Makes a layer of spikingjelly's neurons."""

    def __call__(self, threshold: float = 1.0) -> nn.Module: ...


# Of the neurons in attention where the others have 1 and halve their input.
OF_ATTENTION = 0.5


class Layer(nn.Module):
    """Convolution, batch norm, and what comes behind: pooling, neurons, both or nothing."""

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
        self.neuron = neuron if neuron is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        current = self.pool(self.norm(self.conv(x.flatten(0, 1))))
        y: Tensor = self.neuron(current.unflatten(0, x.shape[:2]).contiguous())
        return y


def conv3x3(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=False)


def conv1x1(before: int, after: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1, stride=stride, bias=bias)


def of_heads(x: Tensor, heads: int) -> Tensor:
    """(T, B, C, H, W) as (T, B, heads, N, d)."""
    return x.flatten(3).unflatten(2, (heads, -1)).transpose(3, 4).contiguous()


def image_of(x: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `of_heads`."""
    return x.transpose(3, 4).reshape(shape).contiguous()


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
        return x + self.proj(self.neuron(attended))


class Mlp(nn.Module):
    def __init__(self, channels: int, make: MakeNeuron) -> None:
        super().__init__()
        self.fc1 = Layer(conv1x1(channels, 4 * channels, bias=True), make())
        self.fc2 = Layer(conv1x1(4 * channels, channels, bias=True), make())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x))


class QKFormer(nn.Module):
    """The network of models/qkformer.py, of frames (T, B, 3, H, W)."""

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], heads: int, make: MakeNeuron
    ) -> None:
        super().__init__()
        first = widths[0]
        parts: list[nn.Module] = [
            Embedding(3, [(first // 2, True), (first, True), (first, False)], 1, make)
        ]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage > 0:
                parts.append(Embedding(widths[stage - 1], [(width, True), (width, False)], 0, make))
            kind = TokenAttention if stage < len(widths) - 1 else SelfAttention
            for _ in range(depth):
                parts += [kind(width, heads, make), Mlp(width, make)]
        self.parts = nn.Sequential(*parts)
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, frames: Tensor) -> Tensor:
        y: Tensor = self.head(self.parts(frames).mean((3, 4)))
        return y


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


class DrivenMlp(nn.Module):
    def __init__(self, channels: int, make: MakeNeuron) -> None:
        super().__init__()
        self.neuron = make()
        self.fc1 = Layer(conv1x1(channels, 4 * channels, bias=True), make())
        self.fc2 = Layer(conv1x1(4 * channels, channels, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(self.neuron(x))) + x
        return y


class SpikeDrivenTransformer(nn.Module):
    """The network of models/spike_driven_transformer.py, of frames (T, B, 3, H, W)."""

    def __init__(self, channels: int, depth: int, make: MakeNeuron) -> None:
        super().__init__()
        parts: list[nn.Module] = [DrivenEmbedding(channels, make)]
        for _ in range(depth):
            parts += [DrivenAttention(channels, 8, make), DrivenMlp(channels, make)]
        self.parts = nn.Sequential(*parts)
        self.neuron = make()
        self.head = nn.Linear(channels, 1000)

    def forward(self, frames: Tensor) -> Tensor:
        y: Tensor = self.head(self.neuron(self.parts(frames).mean((3, 4))))
        return y


# -------------------------------------------------------------------------------------- Max-Former


class Joined(nn.Module):
    """The currents of two convolutions, the second one of the shortcut, which may be pooled."""

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


class Residual(nn.Module):
    """Layers whose first one is of neurons, added to the stream."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) + x
        return y


def depthwise(channels: int, kernel: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=channels, bias=bias)


class StreamAttention(nn.Module):
    """Self-attention that adds its current to the stream; values may be wider than the stream."""

    def __init__(
        self,
        channels: int,
        heads: int,
        make: MakeNeuron,
        *,
        scale: float,
        threshold: float = OF_ATTENTION,
        value_ratio: int = 1,
        bias: bool,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        wide = value_ratio * channels
        self.neuron = make()
        self.q = Layer(conv1x1(channels, channels), make())
        self.k = Layer(conv1x1(channels, channels), make())
        self.v = Layer(conv1x1(channels, wide), make())
        self.attended = make(threshold)
        self.proj = Layer(conv1x1(wide, channels, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x)
        q, k, v = (of_heads(layer(spikes), self.heads) for layer in (self.q, self.k, self.v))
        wide = torch.Size([*x.shape[:2], v.shape[2] * v.shape[4], *x.shape[3:]])
        attended = image_of(q @ (k.mT @ v) * self.scale, wide)
        y: Tensor = self.proj(self.attended(attended)) + x
        return y


class MaxFormer(nn.Module):
    """The network of models/max_former.py, of frames (T, B, 3, H, W)."""

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], heads: int, make: MakeNeuron
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [MaxStem(widths[0], make)]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage > 0:
                parts.append(MaxEmbedding(widths[stage - 1], width, make))
            for _ in range(depth):
                if stage < 2:
                    conv = depthwise(width, (7, 5)[stage], bias=True)
                    parts.append(Residual(make(), Layer(conv)))
                else:
                    parts.append(StreamAttention(width, heads, make, scale=0.125, bias=True))
                parts.append(DrivenMlp(width, make))
        self.parts = nn.Sequential(*parts)
        self.neuron = make()
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, frames: Tensor) -> Tensor:
        y: Tensor = self.head(self.neuron(self.parts(frames).mean((3, 4))))
        return y


# ----------------------------------------------------------------------------------- E-SpikeFormer


class ESpikeFormer(nn.Module):
    """The network of models/espikeformer.py, of frames (T, B, 3, H, W).

    Args:
        widths, depths, heads: As there.
        make: Makes neurons that send shares of 1.
        counting: Makes those before the classifier, which send whole numbers.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: int,
        make: MakeNeuron,
        counting: MakeNeuron,
    ) -> None:
        super().__init__()

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
            attention = StreamAttention(
                channels,
                heads,
                make,
                scale=2 * (channels // heads) ** -0.5,
                threshold=1.0,
                value_ratio=4,
                bias=False,
            )
            return [separable(channels, 3), attention, DrivenMlp(channels, make)]

        first, second, third, fourth = widths
        parts = [Layer(nn.Conv2d(3, first // 2, 7, 2, 3)), *convolutional(first // 2)]
        parts += [*downsampling(first // 2, first, 2), *convolutional(first)]
        parts += downsampling(first, second, 2)
        parts += [*convolutional(second), *convolutional(second)]
        parts += downsampling(second, third, 2)
        parts += [part for _ in range(depths[0]) for part in transformer(third)]
        parts += downsampling(third, fourth, 1)
        parts += [part for _ in range(depths[1]) for part in transformer(fourth)]
        self.parts = nn.Sequential(*parts)
        self.neuron = counting()
        self.head = nn.Linear(fourth, 1000)

    def forward(self, frames: Tensor) -> Tensor:
        y: Tensor = self.head(self.neuron(self.parts(frames).mean((3, 4))))
        return y
