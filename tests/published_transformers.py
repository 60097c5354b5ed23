"""QKFormer and the Spike-driven Transformer, typed anew from their descriptions as functions of
tensors: published names and shapes of weights, spikingjelly's neuron, no layer of tetdist's.

QKFormer: Zhou et al., NeurIPS 2024, github.com/zhouchenlin2096/QKFormer. Spike-driven Transformer:
Yao et al., NeurIPS 2023, github.com/BICLab/Spike-Driven-Transformer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class _Fires(torch.autograd.Function):
    """At the threshold, too; the gradient is that of a sigmoid of steepness 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = torch.sigmoid(4 * x)
        return grad_outputs[0] * 4 * slope * (1 - slope)


def lif(current: Tensor, threshold: float = 1.0) -> Tensor:
    """Neurons of tau = 2 over the first axis, whose input is halved with their membrane."""
    v, spikes = torch.zeros_like(current[0]), []
    for current_t in current:
        v = v + (current_t - v) / 2
        s = _Fires.apply(v - threshold)
        v = v * (1 - s.detach())
        spikes.append(s)
    return torch.stack(spikes)


@dataclass
class Published:
    """Weights by their published names, and what computes with them.

    Attributes:
        state: Weights and running statistics.
        training: Whether batch norms use the batch's statistics.
        moved: Running statistics after the forward pass.
    """

    state: Mapping[str, Tensor]
    training: bool
    moved: dict[str, Tensor] = field(default_factory=dict)

    def conv_bn(self, name: str, x: Tensor, stride: int = 1, number: str = "") -> Tensor:
        """Convolution of (T, B, C, H, W), and batch norm."""
        return self.layer(f"{name}_conv{number}", f"{name}_bn{number}", x, stride)

    def layer(self, conv: str, bn: str, x: Tensor, stride: int = 1) -> Tensor:
        """The same by the names of both."""
        weight = self.state[f"{conv}.weight"]
        if weight.ndim == 3:
            weight = weight[..., None]
        bias, groups = self.state.get(f"{conv}.bias"), x.shape[2] // weight.shape[1]
        padding = weight.shape[-1] // 2
        y = F.conv2d(x.flatten(0, 1), weight, bias, stride, padding, groups=groups)
        statistics = [self.state[f"{bn}.running_{one}"].clone() for one in ("mean", "var")]
        self.moved |= {f"{bn}.running_mean": statistics[0], f"{bn}.running_var": statistics[1]}
        affine = [self.state[f"{bn}.{one}"] for one in ("weight", "bias")]
        y = F.batch_norm(y, *statistics, *affine, training=self.training)
        return y.unflatten(0, x.shape[:2])

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.state["head.weight"], self.state["head.bias"])


def pool(x: Tensor, stride: int = 2) -> Tensor:
    return F.max_pool2d(x.flatten(0, 1), 3, stride, 1).unflatten(0, x.shape[:2])


def split(x: Tensor, heads: int) -> Tensor:
    """(T, B, C, H, W) as (T, B, heads, N, d)."""
    return x.flatten(3).unflatten(2, (heads, -1)).transpose(3, 4)


# ---------------------------------------------------------------------------------------- QKFormer


@dataclass(frozen=True)
class QKFormerSize:
    """One of the authors' five programs, in a size of one's own."""

    program: str  # imagenet, cifar, or dvs
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: int
    mlp_ratio: int = 4
    in_chans: int = 3
    classes: int = 5

    @property
    def stem(self) -> list[tuple[str, int, bool]]:
        """Name, channels and pooling of the first embedding's convolutions."""
        width = self.widths[0]
        return {
            "imagenet": [
                ("proj", width // 2, True),
                ("proj1", width, True),
                ("proj2", width, False),
            ],
            "cifar": [("proj", width // 2, False), ("proj1", width, False)],
            "dvs": [
                ("proj", width // 8, False),
                ("proj1", width // 4, True),
                ("proj2", width // 2, True),
                ("proj3", width, True),
            ],
        }[self.program]

    @property
    def branch(self) -> int:
        """After how many convolutions of the first embedding its shortcut begins."""
        return 2 if self.program == "dvs" else 1

    @property
    def later(self) -> tuple[str, str]:
        """Names of the two convolutions of the other embeddings."""
        return ("proj" if self.program == "dvs" else "proj3", "proj4")

    @property
    def names(self) -> tuple[str, str]:
        """Name of the last stage's attention, and what an MLP's layers begin with."""
        return ("attn", "fc") if self.program == "imagenet" else ("ssa", "mlp")


def qkformer_shapes(size: QKFormerSize) -> Shapes:
    shapes: Shapes = {}
    channels = size.in_chans
    widths = []
    for name, width, _ in size.stem:
        _add(shapes, f"patch_embed1.{name}", (width, channels, 3, 3))
        channels = width
        widths.append(width)
    branch = widths[size.branch - 1]
    _add(shapes, "patch_embed1.proj_res", (size.widths[0], branch, 1, 1))
    for stage, (width, depth) in enumerate(zip(size.widths, size.depths, strict=True), 1):
        if stage > 1:
            before = size.widths[stage - 2]
            first, second = size.later
            _add(shapes, f"patch_embed{stage}.{first}", (width, before, 3, 3))
            _add(shapes, f"patch_embed{stage}.{second}", (width, width, 3, 3))
            _add(shapes, f"patch_embed{stage}.proj_res", (width, before, 1, 1))
        is_last = stage == len(size.widths)
        attention, mlp = size.names
        for i in range(depth):
            block = f"stage{stage}.{i}"
            for name in "qkv" if is_last else "qk":
                module = f"{block}.{attention if is_last else 'tssa'}"
                _add(shapes, f"{module}.{name}", (width, width, 1))
            _add(shapes, f"{module}.proj", (width, width, 1), bias=True)
            hidden = size.mlp_ratio * width
            _add(shapes, f"{block}.mlp.{mlp}1", (hidden, width, 1, 1), bias=True)
            _add(shapes, f"{block}.mlp.{mlp}2", (width, hidden, 1, 1), bias=True)
    return shapes | _head(size.widths[-1], size.classes)


def qkformer(net: Published, x: Tensor, size: QKFormerSize, *, mixes_samples: bool) -> Tensor:
    """Frames (T, B, C, H, W) to logits (T, B, K)."""
    branch, strides = x, 1
    for i, (name, _, pools) in enumerate(size.stem):
        current = net.conv_bn(f"patch_embed1.{name}", x)
        x = lif(pool(current) if pools else current)
        strides *= 2 if pools else 1
        if i + 1 == size.branch:
            branch, strides = x, 1
    x = x + lif(net.conv_bn("patch_embed1.proj_res", branch, strides))
    for stage, depth in enumerate(size.depths, 1):
        if stage > 1:
            first, second = (f"patch_embed{stage}.{name}" for name in size.later)
            residual = net.conv_bn(first, x)
            if size.program == "imagenet":
                residual = lif(net.conv_bn(second, lif(pool(residual))))
            else:
                residual = lif(pool(net.conv_bn(second, lif(residual))))
            x = residual + lif(net.conv_bn(f"patch_embed{stage}.proj_res", x, 2))
        for i in range(depth):
            block, (attention, mlp) = f"stage{stage}.{i}", size.names
            if stage < len(size.depths):
                x = x + _token_attention(net, f"{block}.tssa", x, size.heads)
            else:
                x = x + _self_attention(net, f"{block}.{attention}", x, size.heads, mixes_samples)
            hidden = lif(net.conv_bn(f"{block}.mlp.{mlp}1", x))
            x = x + lif(net.conv_bn(f"{block}.mlp.{mlp}2", hidden))
    return net.head(x.mean((3, 4)))


def _token_attention(net: Published, name: str, x: Tensor, heads: int) -> Tensor:
    q, k = (lif(net.conv_bn(f"{name}.{one}", x)).unflatten(2, (heads, -1)) for one in "qk")
    mask = lif(q.sum(3, keepdim=True), threshold=0.5)
    return lif(net.conv_bn(f"{name}.proj", (mask * k).flatten(2, 3)))


def _self_attention(
    net: Published, name: str, x: Tensor, heads: int, mixes_samples: bool
) -> Tensor:
    q, k, v = (split(lif(net.conv_bn(f"{name}.{one}", x)), heads) for one in "qkv")
    attended = (q @ k.mT) @ v * 0.125
    image = attended.transpose(3, 4).reshape(x.shape)
    current = net.conv_bn(f"{name}.proj", lif(image, threshold=0.5))
    if mixes_samples:  # One after the other, as if the samples of a batch were timesteps.
        return lif(current.flatten(0, 1)).unflatten(0, x.shape[:2])
    return lif(current)


# --------------------------------------------------------------------- Spike-driven Transformer, V1


@dataclass(frozen=True)
class SDTSize:
    """A network of the authors' program.

    Attributes:
        pools: "1" where a convolution of the embedding is followed by a pooling.
        dilates: Whether spikes in attention are spread, as for CIFAR10-DVS.
    """

    channels: int
    depth: int
    pools: str = "1111"
    dilates: bool = False
    mlp_ratio: int = 4
    heads: int = 8
    in_chans: int = 3
    classes: int = 5


def sdt_shapes(size: SDTSize) -> Shapes:
    shapes: Shapes = {}
    before = size.in_chans
    for number, share in (("", 8), ("1", 4), ("2", 2), ("3", 1)):
        width = size.channels // share
        _add(shapes, "patch_embed.proj", (width, before, 3, 3), number=number)
        before = width
    width = size.channels
    _add(shapes, "patch_embed.rpe", (width, width, 3, 3))
    for i in range(size.depth):
        for name in "qkv":
            _add(shapes, f"block.{i}.attn.{name}", (width, width, 1, 1))
        _add(shapes, f"block.{i}.attn.proj", (width, width, 1, 1), bias=True)
        shapes[f"block.{i}.attn.talking_heads.weight"] = (size.heads, size.heads, 1)
        hidden = size.mlp_ratio * width
        _add(shapes, f"block.{i}.mlp.fc1", (hidden, width, 1, 1), bias=True)
        _add(shapes, f"block.{i}.mlp.fc2", (width, hidden, 1, 1), bias=True)
    return shapes | _head(width, size.classes)


def sdt(net: Published, x: Tensor, size: SDTSize) -> Tensor:
    """Frames (T, B, C, H, W) to logits (T, B, K)."""
    for number, pools in zip(("", "1", "2"), size.pools[:3], strict=True):
        x = lif(net.conv_bn("patch_embed.proj", x, number=number))
        x = pool(x) if pools == "1" else x
    x = net.conv_bn("patch_embed.proj", x, number="3")
    x = pool(x) if size.pools[3] == "1" else x
    x = net.conv_bn("patch_embed.rpe", lif(x)) + x
    for i in range(size.depth):
        spikes = lif(x)
        q, k, v = (lif(net.conv_bn(f"block.{i}.attn.{one}", spikes)) for one in "qkv")
        if size.dilates:
            k, v = pool(k, 1), pool(v, 1)
        q, k, v = (split(one, size.heads) for one in (q, k, v))
        products = pool(k * v, 1) if size.dilates else k * v
        passed = q * lif(products.sum(3, keepdim=True), threshold=0.5)
        passed = pool(passed, 1) if size.dilates else passed
        image = passed.transpose(3, 4).reshape(x.shape)
        x = net.conv_bn(f"block.{i}.attn.proj", image) + x
        hidden = lif(net.conv_bn(f"block.{i}.mlp.fc1", lif(x)))
        x = net.conv_bn(f"block.{i}.mlp.fc2", hidden) + x
    return net.head(lif(x.mean((3, 4))))


# ------------------------------------------------------------------------------------------ weights


def _add(
    shapes: Shapes, name: str, shape: tuple[int, ...], *, bias: bool = False, number: str = ""
) -> None:
    """Add a convolution, and its batch norm with its counter."""
    shapes[f"{name}_conv{number}.weight"] = shape
    if bias:
        shapes[f"{name}_conv{number}.bias"] = shape[:1]
    for one in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}_bn{number}.{one}"] = shape[:1]
    shapes[f"{name}_bn{number}.num_batches_tracked"] = ()


def _head(width: int, classes: int) -> Shapes:
    return {"head.weight": (classes, width), "head.bias": (classes,)}


def num_parameters(shapes: Shapes) -> int:
    counted = (one for one in shapes if "running" not in one and "tracked" not in one)
    return sum(torch.Size(shapes[one]).numel() for one in counted)


def random_state(
    shapes: Shapes, seed: int = 0, bias: Sequence[float] = (-0.2, 1.6), gain: float = 1.0
) -> Any:
    """Weights of these shapes in float64, and norms of no initialiser's choice: some gains are
    negative. The biases of norms are uniform, large enough that small networks fire. Convolutions
    have ``gain`` times the weights that keep the deviation of a white input."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        is_norm = f"{name.rpartition('.')[0]}.running_mean" in shapes
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_mean"):
            state[name] = uniform(shape, -0.3, 0.3)
        elif name.endswith("running_var"):
            state[name] = uniform(shape, 0.3, 1.0)
        elif is_norm and name.endswith("weight"):
            state[name] = uniform(shape, 0.6, 1.8) * torch.where(uniform(shape, 0, 1) < 0.2, -1, 1)
        elif is_norm:
            state[name] = uniform(shape, *bias)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            kept = uniform(shape, -1, 1) * (3 / fan_in) ** 0.5
            state[name] = gain * kept if len(shape) > 2 else kept
    return state
