"""QKFormer (Zhou et al., NeurIPS 2024, github.com/zhouchenlin2096/QKFormer).

A hierarchy of stages that exchange sums of spikes, as SEW-ResNets do by ADD: each attention and
each MLP adds its last layer's spikes to its input. All stages except the last have token attention,
in which a token's query decides whether its key passes; the last stage has self-attention without a
softmax. Each stage begins with an embedding that halves the resolution and doubles the channels;
the first embedding is the stem.

It differs from the published network in one point. In the authors' code the neurons of
self-attention's last layer run over T * B steps, so a sample starts with the membranes of the
previous sample, and its logits depend on its batch. Here each sample starts at rest.
``mixes_samples=True`` computes as the authors' code does, for comparisons with their weights.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from tetdist.models import base
from tetdist.models.attention import (
    HALVING_NEURON,
    SCALE,
    Block,
    ConvPoolNeuron,
    attention_neuron,
    check_heads,
    init_as_published,
    stages,
)
from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv1x1, conv3x3
from tetdist.models.sew_resnet import connect
from tetdist.nn.dropout import DropPath
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.packed import packed_of, with_packed
from tetdist.nn.products import HeadSum, LinearAttention, masked

logger = logging.getLogger(__name__)


class Embedding(nn.Module):
    """3x3 convolutions, each with neurons, and a shortcut around the last ones that adds spikes.

    Args:
        layers: Channels of each convolution, and whether to pool its current.
        branch: Number of layers before the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[tuple[int, bool]],
        branch: int,
        neuron: NeuronConfig,
    ) -> None:
        super().__init__()
        self.branch = branch
        channels = [in_channels, *(width for width, _ in layers)]
        self.layers = nn.ModuleList()
        for before, (width, pools) in zip(channels, layers, strict=False):
            layer = ConvPoolNeuron if pools else ConvNormNeuron
            self.layers.append(layer(conv3x3(before, width), neuron))
        stride = 2 ** sum(pools for _, pools in layers[branch:])
        self.shortcut = ConvNormNeuron(conv1x1(channels[branch], channels[-1], stride), neuron)

    def forward(self, x: Tensor, timesteps: int | None = None) -> Tensor:
        """Map (1 or T, B, C, H, W) to sums of two spikes, (T, B, C', H', W')."""
        branch = x
        for i, layer in enumerate(self.layers):
            x = layer(x, timesteps)
            if i + 1 == self.branch:
                branch = x
        return connect(self.shortcut, branch, x, "add")


def stem_layers(embedding: str, channels: int) -> tuple[list[tuple[int, bool]], int]:
    """Return ``layers`` and ``branch`` of a stem; see `Embedding` and `QKFormer`.

    Raises:
        ValueError: ``embedding`` is unknown.
    """
    half = channels // 2
    match embedding:
        case "imagenet":
            return [(half, True), (channels, True), (channels, False)], 1
        case "cifar":
            return [(half, False), (channels, False)], 1
        case "dvs":
            layers = [(channels // 8, False), (channels // 4, True), (half, True), (channels, True)]
            return layers, 2
        case _:
            raise ValueError(f"embedding must be imagenet, cifar or dvs, not {embedding!r}")


def stage_layers(embedding: str, channels: int) -> list[tuple[int, bool]]:
    """Return ``layers`` of the embedding that a stage begins with."""
    pools_first = embedding == "imagenet"
    return [(channels, pools_first), (channels, not pools_first)]


class TokenAttention(nn.Module):
    """Token attention: a head passes its key if its query has enough spikes (paper, eq. 4 to 6).

    Args:
        heads: Number of heads; each has its own mask.
        neuron: All neurons except the mask's.
        threshold: Threshold of the mask's neurons, in spikes of the query.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        neuron: NeuronConfig,
        threshold: float,
        *,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.q = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.k = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.sum = HeadSum(heads)
        self.neuron = Neuron(attention_neuron(neuron, threshold), heads)
        self.proj = ConvNormNeuron(conv1x1(channels, channels, bias=True), neuron)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.neuron(self.sum(self.q(x)))
        return connect(self.proj, masked(self.k(x), mask), x, "add", self.drop_path)


class SelfAttention(nn.Module):
    """Spiking self-attention (Zhou et al., Spikformer, ICLR 2023), without a softmax.

    Args:
        neuron: All neurons except those behind the products.
        threshold: Threshold of those, in eighths of the products' sums; see `SCALE`.
        mixes_samples: See `QKFormer`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        neuron: NeuronConfig,
        threshold: float,
        *,
        mixes_samples: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.q = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.k = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.v = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.attention = LinearAttention(heads, SCALE)
        self.neuron = Neuron(attention_neuron(neuron, threshold), channels)
        last = MixingConvNormNeuron if mixes_samples else ConvNormNeuron
        self.proj = last(conv1x1(channels, channels, bias=True), neuron)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention.fired(self.q(x), self.k(x), self.v(x), self.neuron)
        return connect(self.proj, attended, x, "add", self.drop_path)


class MixingConvNormNeuron(ConvNormNeuron):
    """Convolution, batch norm and neurons that run over T * B steps: all samples of a timestep one
    after another, each starting with the membrane of the step before."""

    def forward(
        self, x: Tensor, timesteps: int | None = None, identity: Tensor | None = None
    ) -> Tensor:
        del timesteps  # x has all timesteps
        current = self.conv(x)
        shape = current.shape[:2]

        def steps(x: Tensor) -> Tensor:
            return x.flatten(0, 1).unsqueeze(1)

        def samples(x: Tensor) -> Tensor:
            return x.squeeze(1).unflatten(0, shape)

        joined = None if identity is None else _in_both_forms(steps, identity)
        spikes = self.neuron(steps(current), shape.numel(), identity=joined)
        return _in_both_forms(samples, spikes)


def _in_both_forms(view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a view of a tensor, with the same view of its bytes attached."""
    packed = packed_of(x)
    return (
        view(x)
        if packed is None
        else with_packed(view(x), packed._replace(values=view(packed.values)))
    )


class Mlp(nn.Module):
    """Two layers on each token, the first one wider; their spikes are added to the input."""

    def __init__(
        self, channels: int, hidden: int, neuron: NeuronConfig, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = ConvNormNeuron(conv1x1(channels, hidden, bias=True), neuron)
        self.fc2 = ConvNormNeuron(conv1x1(hidden, channels, bias=True), neuron)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return connect(self.fc2, self.fc1(x), x, "add", self.drop_path)


class QKFormer(SpikingNetwork):
    """QKFormer.

    Args:
        neuron: All neurons; those of attention have another threshold, see `attention_neuron`.
        widths: Channels of each stage.
        depths: Blocks of each stage; the last stage has self-attention, the others token attention.
        mlp_ratio: Ratio of an MLP's inner to its outer channels.
        embedding: ``imagenet`` pools before its last convolutions, and twice in the stem; ``cifar``
            pools after them, and not in the stem; ``dvs`` is like ``cifar``, but pools three times
            in the stem.
        attention_threshold: Threshold of the neurons in attention.
        mixes_samples: Compute as the authors' code does: logits depend on earlier samples of the
            batch.
    """

    default_neuron = HALVING_NEURON

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        heads: int,
        mlp_ratio: int = 4,
        embedding: Literal["imagenet", "cifar", "dvs"] = "imagenet",
        attention_threshold: float = 1.0,
        mixes_samples: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        check_heads(widths, heads)
        if mixes_samples:
            logger.warning(
                "mixes_samples: a sample's logits depend on the samples before it in its batch, "
                "as in QKFormer's published code. Use it only to compare with published weights: "
                "on data sorted by class, labels leak into the accuracy."
            )
        self.embedding = embedding
        layers, branch = stem_layers(embedding, widths[0])
        self.stem = Embedding(in_chans, layers, branch, neuron)

        def embed(before: int, width: int) -> Embedding:
            return Embedding(before, stage_layers(embedding, width), 0, neuron)

        def block(stage: int, rate: float) -> Block:
            width = widths[stage]
            of = (width, heads, neuron, attention_threshold)
            attention: nn.Module
            if stage < len(widths) - 1:
                attention = TokenAttention(*of, drop_path=rate)
            else:
                attention = SelfAttention(*of, mixes_samples=mixes_samples, drop_path=rate)
            return Block(attention, Mlp(width, mlp_ratio * width, neuron, rate))

        self.blocks = stages(widths, depths, drop_path_rate, embed, block)
        # Largest input of each block: an embedding and each half of a block add two layers' spikes.
        highest = [2 * i for depth in depths for i in range(1, depth + 2)]
        self.highest_inputs = tuple(highest[:-1])  # The last one is the classifier's.
        reduction = 2 ** sum(pools for _, pools in layers)
        self.set_stages((widths[0], reduction), *base.stages_of(widths, depths, reduction, 1))
        self.set_head(drop_rate)
        init_as_published([self.fc])


class QKFormerDVS(QKFormer):
    """The same network for event frames, (B, T, 2, H, W)."""

    input_kind = "events"


_FIRST: dict[str, Any] = {"first_conv": "stem.layers.0.conv"}
_IMAGENET = _FIRST | {"interpolation": "bicubic"}
_EVENTS = base.model_cfg(**_FIRST, **base.EVENTS, num_classes=10, input_size=(16, 2, 128, 128))

# As in the paper, names have the number of blocks and the last stage's channels. 16.47, 29.08 and
# 64.96 million parameters at 1000 classes; 6.71 for 32x32 images, at 10.
IMAGE_SIZES: dict[str, dict[str, Any]] = {
    f"10_{width}": {
        "cfg": base.model_cfg(**_IMAGENET),
        "widths": (width // 4, width // 2, width),
        "depths": (1, 2, 7),
        "heads": width // 64,
    }
    for width in (384, 512, 768)
} | {
    "4_384_cifar": {
        "cfg": base.model_cfg(32, **_IMAGENET, **base.CIFAR),
        "widths": (96, 192, 384),
        "depths": (1, 1, 2),
        "heads": 8,
        "embedding": "cifar",
        "num_classes": 10,
    }
}
# For event frames of 128x128: of CIFAR10-DVS, 1.50 million parameters, and of DVS128 Gesture, 2.00.
DVS_SIZE: dict[str, Any] = {
    "cfg": _EVENTS,
    "widths": (128, 256),
    "depths": (1, 1),
    "heads": 16,
    "mlp_ratio": 1,
    "embedding": "dvs",
    "in_chans": 2,
    "num_classes": 10,
    "timesteps": 16,
}
for _name, _size in IMAGE_SIZES.items():
    base.register(QKFormer, f"qkformer_{_name}", **_size)
base.register(QKFormerDVS, "qkformer_2_256_dvs", **DVS_SIZE)
_GESTURE = {"cfg": _EVENTS | {"num_classes": 11}, "mlp_ratio": 4, "num_classes": 11}
base.register(QKFormerDVS, "qkformer_2_256_gesture", **DVS_SIZE | _GESTURE)
