"""E-SpikeFormer, Max-Former and MS-QKFormer, typed anew from their descriptions as functions of
tensors, as published_transformers.py has the earlier two.

E-SpikeFormer: Yao et al., TPAMI 2025, github.com/BICLab/Spike-Driven-Transformer-V3. The others:
Fang et al., NeurIPS 2025, github.com/bic-L/MaxFormer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from published_transformers import Published, QKFormerSize, Shapes, lif, pool, split
from torch import Tensor

# ----------------------------------------------------------------------------------- E-SpikeFormer


class _Rounds(torch.autograd.Function):
    """Half to even, within 0 and 4; the gradient is that of the clipping, ends included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 4).round()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * (x >= 0) * (x <= 4)


def counts(current: Tensor) -> Tensor:
    """Numbers of spikes, 0 to 4. At T=1, which is what is published, there is no membrane."""
    left, found = torch.zeros_like(current[0]), []
    for current_t in current:
        membrane = left / 4 + current_t
        found.append(_Rounds.apply(membrane))
        left = membrane - found[-1]
    return torch.stack(found)


def quarters(current: Tensor) -> Tensor:
    return counts(current) / 4


@dataclass(frozen=True)
class ESpikeFormerSize:
    """A network of the authors' program, in a size of one's own."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int] = (6, 2)
    heads: int = 8
    mlp_ratio: int = 4
    classes: int = 5

    @property
    def conv_blocks(self) -> list[tuple[str, int]]:
        """Names and channels of the convolutional blocks."""
        first, second = self.widths[:2]
        widths = (first // 2, first, second, second)
        names = (f"ConvBlock{number}.0" for number in ("1_1", "1_2", "2_1", "2_2"))
        return list(zip(names, widths, strict=True))

    @property
    def transformer_blocks(self) -> list[tuple[str, int]]:
        """Names and channels of the transformer blocks."""
        return [
            (f"block{3 + stage}.{i}", self.widths[2 + stage])
            for stage in (0, 1)
            for i in range(self.depths[stage])
        ]


def espikeformer_shapes(size: ESpikeFormerSize) -> Shapes:
    shapes: Shapes = {}
    first, second, third, fourth = size.widths
    for number, channels, width, side in (
        ("1_1", 3, first // 2, 7),
        ("1_2", first // 2, first, 3),
        ("2", first, second, 3),
        ("3", second, third, 3),
        ("4", third, fourth, 3),
    ):
        name = f"downsample{number}.encode"
        _add(shapes, f"{name}_conv", f"{name}_bn", (width, channels, side, side), bias=True)
    for block, width in size.conv_blocks:
        _add_separable(shapes, f"{block}.Conv", width, 7)
        hidden = size.mlp_ratio * width
        _add(shapes, f"{block}.conv1", f"{block}.bn1", (hidden, width, 3, 3))
        _add(shapes, f"{block}.conv2", f"{block}.bn2", (width, hidden, 3, 3))
    for block, width in size.transformer_blocks:
        _add_separable(shapes, f"{block}.conv", width, 3)
        for one, out, into in (
            ("q", width, width),
            ("k", width, width),
            ("v", 4 * width, width),
            ("proj", width, 4 * width),
        ):
            name = f"{block}.attn.{one}_conv"
            _add(shapes, f"{name}.0", f"{name}.1", (out, into, 1, 1))
        hidden = size.mlp_ratio * width
        for one, out, into in (("fc1", hidden, width), ("fc2", width, hidden)):
            name = f"{block}.mlp.{one}"
            _add(shapes, f"{name}_conv", f"{name}_bn", (out, into, 1), bias=True)
    return shapes | {"head.weight": (size.classes, fourth), "head.bias": (size.classes,)}


def espikeformer(net: Published, x: Tensor, size: ESpikeFormerSize) -> Tensor:
    """Frames (T, B, C, H, W) to logits (T, B, K)."""

    def downsampled(number: str, x: Tensor, stride: int = 2) -> Tensor:
        return net.conv_bn(f"downsample{number}.encode", x, stride)

    def convolved(name: str, x: Tensor) -> Tensor:
        x = x + _separable(net, f"{name}.Conv", x)
        hidden = net.layer(f"{name}.conv1", f"{name}.bn1", quarters(x))
        return x + net.layer(f"{name}.conv2", f"{name}.bn2", quarters(hidden))

    blocks = [name for name, _ in size.conv_blocks]
    x = convolved(blocks[0], downsampled("1_1", x))
    x = convolved(blocks[1], downsampled("1_2", quarters(x)))
    x = convolved(blocks[3], convolved(blocks[2], downsampled("2", quarters(x))))
    x = downsampled("3", quarters(x))
    for i, (block, _) in enumerate(size.transformer_blocks):
        if i == size.depths[0]:
            x = downsampled("4", quarters(x), stride=1)
        x = x + _separable(net, f"{block}.conv", x)
        x = x + _espikeformer_attention(net, f"{block}.attn", x, size.heads)
        hidden = net.conv_bn(f"{block}.mlp.fc1", quarters(x))
        x = x + net.conv_bn(f"{block}.mlp.fc2", quarters(hidden))
    return net.head(counts(x.mean((3, 4))))


def _separable(net: Published, name: str, x: Tensor) -> Tensor:
    for one in ("pwconv1", "dwconv", "pwconv2"):
        x = net.layer(f"{name}.{one}.0", f"{name}.{one}.1", quarters(x))
    return x


def _espikeformer_attention(net: Published, name: str, x: Tensor, heads: int) -> Tensor:
    spikes = quarters(x)
    q, k, v = (
        split(quarters(net.layer(f"{name}.{one}_conv.0", f"{name}.{one}_conv.1", spikes)), heads)
        for one in "qkv"
    )
    attended = (q @ k.mT) @ v * (2 * (x.shape[2] / heads) ** -0.5)
    image = attended.transpose(3, 4).reshape(*x.shape[:2], -1, *x.shape[3:])
    return net.layer(f"{name}.proj_conv.0", f"{name}.proj_conv.1", quarters(image))


# -------------------------------------------------------------------------------------- Max-Former


@dataclass(frozen=True)
class MaxFormerSize:
    """A network of the authors' program, in a size of one's own."""

    widths: tuple[int, int, int]
    depths: tuple[int, int, int] = (1, 2, 7)
    heads: int = 6
    mlp_ratio: int = 4
    classes: int = 5

    @property
    def mixers(self) -> list[tuple[str, str, int, int]]:
        """Name of the block, of its depthwise convolution, its channels and its side."""
        return [
            (f"stage{stage + 1}.{i}", name, self.widths[stage], side)
            for stage, name, side in ((0, "conv5", 7), (1, "conv", 5))
            for i in range(self.depths[stage])
        ]


def maxformer_shapes(size: MaxFormerSize) -> Shapes:
    shapes: Shapes = {}
    first, second, third = size.widths
    half = first // 2
    stem = ((half, 3, 3), (first, half, 3), (first, first, 3), (first, half, 1))
    for i, (out, into, side) in enumerate(stem, 1):
        _add_embed(shapes, f"patch_embed1.embed{i}", (out, into, side, side))
    for stage, into, out in ((2, first, second), (3, second, third)):
        _add_embed(shapes, f"patch_embed{stage}.max_embed1", (out, into, 3, 3))
        _add_embed(shapes, f"patch_embed{stage}.embed1", (out, out, 3, 3))
        _add_embed(shapes, f"patch_embed{stage}.max_embed2", (out, into, 1, 1))
    for block, name, width, side in size.mixers:
        conv = f"{block}.mixer.{name}"
        _add(shapes, conv, f"{conv}_bn", (width, 1, side, side), bias=True)
        _add_mlp(shapes, f"{block}.mlp", width, size.mlp_ratio)
    for i in range(size.depths[2]):
        for one in ("q", "k", "v", "proj"):
            name = f"stage3.{i}.attn.{one}"
            _add(shapes, f"{name}_conv", f"{name}_bn", (third, third, 1), bias=one == "proj")
        _add_mlp(shapes, f"stage3.{i}.mlp", third, size.mlp_ratio)
    return shapes | {"head.weight": (size.classes, third), "head.bias": (size.classes,)}


def maxformer(net: Published, x: Tensor, size: MaxFormerSize) -> Tensor:
    """Frames (T, B, C, H, W) to logits (T, B, K)."""

    def embedded(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return net.conv_bn(f"{name}.embed", x, stride)

    first = lif(embedded("patch_embed1.embed1", x, 2))
    second = lif(embedded("patch_embed1.embed2", first, 2))
    x = embedded("patch_embed1.embed3", second) + embedded("patch_embed1.embed4", first, 2)
    for stage in (1, 2, 3):
        if stage > 1:
            name, spikes = f"patch_embed{stage}", lif(x)
            inner = lif(pool(embedded(f"{name}.max_embed1", spikes)))
            shortcut = pool(embedded(f"{name}.max_embed2", spikes))
            x = embedded(f"{name}.embed1", inner) + shortcut
        for block, name, _, _ in size.mixers:
            if block.startswith(f"stage{stage}."):
                conv = f"{block}.mixer.{name}"
                x = net.layer(conv, f"{conv}_bn", lif(x)) + x
                x = _mlp(net, f"{block}.mlp", x)
    for i in range(size.depths[2]):
        x = _mlp(net, f"stage3.{i}.mlp", _attention(net, f"stage3.{i}.attn", x, size.heads))
    return net.head(lif(x.mean((3, 4))))


def _attention(net: Published, name: str, x: Tensor, heads: int) -> Tensor:
    spikes = lif(x)
    q, k, v = (split(lif(net.conv_bn(f"{name}.{one}", spikes)), heads) for one in "qkv")
    image = ((q @ k.mT) @ v * 0.125).transpose(3, 4).reshape(x.shape)
    return net.conv_bn(f"{name}.proj", lif(image, threshold=0.5)) + x


def _mlp(net: Published, name: str, x: Tensor) -> Tensor:
    hidden = net.conv_bn(f"{name}.fc1", lif(x))
    return net.conv_bn(f"{name}.fc2", lif(hidden)) + x


# ------------------------------------------------------------------------------------- MS-QKFormer

# What their programs call the stem's convolutions, of which the last is the shortcut's, with the
# number behind "conv" and "bn"; and those of the other embeddings.
_LATER = ("embed1.embed", "max_embed1.embed", "embed2.embed")
_NAMES: dict[str, tuple[list[tuple[str, str]], tuple[str, str, str]]] = {
    "imagenet": (
        [("proj", ""), ("proj", "1"), ("proj", "2"), ("rpe", "")],
        ("proj3", "proj4", "proj_res"),
    ),
    "cifar": ([("proj", ""), ("embed1.embed", ""), ("embed2.embed", "")], _LATER),
    "dvs": (
        [("proj", ""), *((f"max_embed{i}.embed", "") for i in (1, 2, 3)), ("embed1.embed", "")],
        _LATER,
    ),
}


def ms_qkformer_shapes(size: QKFormerSize) -> Shapes:
    shapes: Shapes = {}
    stem, later = _NAMES[size.program]
    widths = [size.in_chans, *(width for _, width, _ in size.stem)]
    sides = [3] * len(size.stem) + [1]
    into = [*widths[:-1], widths[size.branch]]
    for (name, number), out, channels, side in zip(
        stem, [*widths[1:], widths[-1]], into, sides, strict=True
    ):
        name = f"patch_embed1.{name}"
        _add(shapes, f"{name}_conv{number}", f"{name}_bn{number}", (out, channels, side, side))
    for stage, (width, depth) in enumerate(zip(size.widths, size.depths, strict=True), 1):
        if stage > 1:
            before = size.widths[stage - 2]
            for name, channels, side in zip(later, (before, width, before), (3, 3, 1), strict=True):
                name = f"patch_embed{stage}.{name}"
                _add(shapes, f"{name}_conv", f"{name}_bn", (width, channels, side, side))
        for i in range(depth):
            for one in ("q", "k", *("v" * (stage == len(size.widths))), "proj"):
                name = f"stage{stage}.{i}.attn.{one}"
                _add(shapes, f"{name}_conv", f"{name}_bn", (width, width, 1), bias=one == "proj")
            _add_mlp(shapes, f"stage{stage}.{i}.mlp", width, size.mlp_ratio)
    last = size.widths[-1]
    return shapes | {"head.weight": (size.classes, last), "head.bias": (size.classes,)}


def ms_qkformer(net: Published, x: Tensor, size: QKFormerSize) -> Tensor:
    """Frames (T, B, C, H, W) to logits (T, B, K)."""
    stem, later = _NAMES[size.program]
    signals = [x]
    for (name, number), (_, _, pools) in zip(stem, size.stem, strict=False):
        x = net.conv_bn(f"patch_embed1.{name}", signals[-1], number=number)
        x = pool(x) if pools else x
        signals.append(lif(x))
    stride = 2 ** sum(pools for _, _, pools in size.stem[size.branch :])
    x = x + net.conv_bn(f"patch_embed1.{stem[-1][0]}", signals[size.branch], stride)
    for stage, depth in enumerate(size.depths, 1):
        if stage > 1:
            spikes = lif(x)
            first, second, shortcut = (f"patch_embed{stage}.{name}" for name in later)
            inner = net.conv_bn(first, spikes)
            if size.program == "imagenet":
                x = net.conv_bn(second, lif(pool(inner)))
            else:
                x = pool(net.conv_bn(second, lif(inner)))
            x = x + net.conv_bn(shortcut, spikes, 2)
        for i in range(depth):
            name = f"stage{stage}.{i}"
            if stage < len(size.depths):
                x = _token_attention(net, f"{name}.attn", x, size.heads)
            else:
                x = _attention(net, f"{name}.attn", x, size.heads)
            if size.mlp_ratio == 1:  # Both layers have a shortcut then.
                x = net.conv_bn(f"{name}.mlp.fc1", lif(x)) + x
                x = net.conv_bn(f"{name}.mlp.fc2", lif(x)) + x
            else:
                x = _mlp(net, f"{name}.mlp", x)
    return net.head(lif(x.mean((3, 4))))


def _token_attention(net: Published, name: str, x: Tensor, heads: int) -> Tensor:
    spikes = lif(x)
    q, k = (lif(net.conv_bn(f"{name}.{one}", spikes)).unflatten(2, (heads, -1)) for one in "qk")
    passed = (lif(q.sum(3, keepdim=True), threshold=0.5) * k).flatten(2, 3)
    return net.conv_bn(f"{name}.proj", passed) + x


# ------------------------------------------------------------------------------------------ weights


def _add(shapes: Shapes, conv: str, bn: str, shape: tuple[int, ...], *, bias: bool = False) -> None:
    """Add a convolution, and its batch norm with its counter."""
    shapes[f"{conv}.weight"] = shape
    if bias:
        shapes[f"{conv}.bias"] = shape[:1]
    for one in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{bn}.{one}"] = shape[:1]
    shapes[f"{bn}.num_batches_tracked"] = ()


def _add_separable(shapes: Shapes, name: str, width: int, side: int) -> None:
    hidden = 2 * width
    for one, shape in (
        ("pwconv1", (hidden, width, 1, 1)),
        ("dwconv", (hidden, 1, side, side)),
        ("pwconv2", (width, hidden, 1, 1)),
    ):
        _add(shapes, f"{name}.{one}.0", f"{name}.{one}.1", shape)


def _add_embed(shapes: Shapes, name: str, shape: tuple[int, ...]) -> None:
    _add(shapes, f"{name}.embed_conv", f"{name}.embed_bn", shape)


def _add_mlp(shapes: Shapes, name: str, width: int, ratio: int) -> None:
    hidden = ratio * width
    for one, out, into in (("fc1", hidden, width), ("fc2", width, hidden)):
        _add(shapes, f"{name}.{one}_conv", f"{name}.{one}_bn", (out, into, 1, 1), bias=True)
