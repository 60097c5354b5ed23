"""Spike-driven Transformer, V1 (Yao et al., NeurIPS 2023).

The authors' code is github.com/BICLab/Spike-Driven-Transformer. The stream between blocks is
real-valued: attention and MLP begin with neurons and add currents to it. So the classifier and
every convolution except the first see spikes. Attention is a mask: a channel of the queries passes
at all positions or at none, depending on how often keys and values spike together in it.

The authors' code also has unused weights ``talking_heads``, heads^2 per block. They are omitted
here, so networks have 64 parameters per block fewer.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tetdist.models import base
from tetdist.models.attention import (
    HALVING_NEURON,
    Block,
    StreamMlp,
    StreamTransformer,
    attention_neuron,
    init_as_published,
)
from tetdist.models.base import ConvNormNeuron, conv1x1, conv3x3
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.dropout import rising_rates
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import MaxPool, pack, packed_of, with_packed
from tetdist.nn.products import PositionSum, image, masked, tokens


class Embedding(nn.Module):
    """Four 3x3 convolutions, and a fifth that adds to their current what it finds around each
    position.

    Args:
        channels: Channels of the output; the first convolutions have 1/8, 1/4 and 1/2 of them.
        pools: One flag for each of the four: pool its spikes, or the current of the fourth.
    """

    def __init__(
        self, in_channels: int, channels: int, pools: Sequence[bool], neuron: NeuronConfig
    ) -> None:
        super().__init__()
        self.layers, self.pools = nn.ModuleList(), nn.ModuleList()
        for divisor, pooled in zip((8, 4, 2), pools[:3], strict=True):
            conv = conv3x3(in_channels, channels // divisor)
            self.layers.append(ConvNormNeuron(conv, neuron))
            self.pools.append(MaxPool(3, stride=2, padding=1) if pooled else nn.Identity())
            in_channels = channels // divisor
        self.conv = conv3x3(in_channels, channels)
        self.norm = NormPool(channels) if pools[3] else BatchNorm(channels)
        self.neuron = Neuron(neuron, channels)
        self.position = conv3x3(channels, channels)
        self.add = NormAdd(channels)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:
        """Map (1 or T, B, C, H, W) to a current (T, B, C', H', W')."""
        for layer, pool in zip(self.layers, self.pools, strict=True):
            x = pool(layer(x, timesteps))
        current: Tensor = self.norm(self.conv(x))
        return self.add(self.position(self.neuron(current)), current)


class Attention(nn.Module):
    """Spike-driven self-attention (paper, eq. 10 and 11), added to the stream.

    Args:
        neuron: All neurons except the mask's.
        threshold: Threshold of the mask's neurons, in coincident spikes of key and value.
        dilated: True to dilate the spikes of key, value, their product and the output by a 3x3
            maximum: for key and value over positions; for the other two, as in the authors' code,
            over positions in row order and channels of a head.
        heads: Number of heads; matters only for dilation, since each channel has its own mask.
    """

    def __init__(
        self,
        channels: int,
        neuron: NeuronConfig,
        threshold: float,
        *,
        dilated: bool = False,
        heads: int = 8,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.neuron = Neuron(neuron, channels)
        self.q = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.k = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.v = ConvNormNeuron(conv1x1(channels, channels), neuron)
        self.spread = MaxPool(3, stride=1, padding=1) if dilated else nn.Identity()
        self.spread_tokens = SpreadTokens(heads) if dilated else nn.Identity()
        self.sum = PositionSum(SpreadTokens(heads) if dilated else None)
        self.mask = Neuron(attention_neuron(neuron, threshold), channels)
        self.proj = conv1x1(channels, channels, bias=True)
        self.add = NormAdd(channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x)
        k, v = self.spread(self.k(spikes)), self.spread(self.v(spikes))
        mask = self.mask(self.sum(k, v))
        passed = self.spread_tokens(masked(self.q(spikes), mask))
        return self.add(self.proj(passed), x)


class SpreadTokens(nn.Module):
    """Maximum over three tokens and three channels of a head, of (T, B, C, H, W): each head's (N,
    d) is treated as an image."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        images = tokens(x, self.heads, x.dtype).flatten(0, 1)
        spread = functional.max_pool2d(images, 3, stride=1, padding=1)
        y = image(spread.unflatten(0, x.shape[:2]), x.shape)
        return y if packed_of(x) is None else with_packed(y, pack(y.detach()))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class SpikeDrivenTransformer(StreamTransformer):
    """Spike-driven Transformer.

    Args:
        neuron: All neurons; those of attention have another threshold, see `attention_neuron`.
        channels: Channels of the stream.
        pools: One flag for each of the stem's four convolutions: pool after it, halving the sides.
        mlp_ratio: Ratio of an MLP's inner channels to the stream's.
        attention_threshold: Threshold of the neurons in attention.
        dilated, heads: See `Attention`.
    """

    default_neuron = HALVING_NEURON

    def __init__(
        self,
        *,
        neuron: NeuronConfig,
        channels: int,
        depth: int,
        pools: tuple[bool, ...] = (True, True, True, True),
        mlp_ratio: int = 4,
        attention_threshold: float = 1.0,
        dilated: bool = False,
        heads: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        if len(pools) != 4 or not all(isinstance(one, bool) for one in pools):
            raise ValueError(
                f"pools must be four of true or false, one per stem convolution, not {pools!r}"
            )
        if channels % 8 or channels % heads:
            raise ValueError(f"channels={channels} must be a multiple of 8 and of heads={heads}")
        self.stem = Embedding(in_chans, channels, pools, neuron)
        self.blocks = nn.Sequential(
            *(
                Block(
                    Attention(
                        channels,
                        neuron,
                        attention_threshold,
                        dilated=dilated,
                        heads=heads,
                        drop_path=rate,
                    ),
                    StreamMlp(channels, mlp_ratio * channels, neuron, rate),
                )
                for rate in rising_rates(drop_path_rate, depth)
            )
        )
        self.head_neuron = Neuron(neuron, channels)
        reduction = 2 ** sum(pools)
        self.set_stages((channels, reduction), *[(channels, reduction, 1)] * depth)
        self.set_head(drop_rate)
        init_as_published(module for module in self.modules() if isinstance(module, nn.Conv2d))


class SpikeDrivenTransformerDVS(SpikeDrivenTransformer):
    """The same network for event frames, (B, T, 2, H, W)."""

    input_kind = "events"


_FIRST: dict[str, Any] = {"first_conv": "stem.layers.0.conv"}
_IMAGENET = base.model_cfg(**_FIRST, crop_pct=0.95, interpolation="bicubic")
_CIFAR = base.model_cfg(32, **_FIRST, **base.CIFAR, interpolation="bicubic")
_EVENTS = _FIRST | base.EVENTS

# As in the paper, names have blocks and channels. 16.8 to 66.3 million parameters at 1000 classes.
base.register(SpikeDrivenTransformer, "sdt_8_384", _IMAGENET, channels=384, depth=8)
base.register(SpikeDrivenTransformer, "sdt_6_512", _IMAGENET, channels=512, depth=6)
base.register(SpikeDrivenTransformer, "sdt_8_512", _IMAGENET, channels=512, depth=8)
base.register(SpikeDrivenTransformer, "sdt_10_512", _IMAGENET, channels=512, depth=10)
base.register(SpikeDrivenTransformer, "sdt_8_768", _IMAGENET, channels=768, depth=8)
# For 32x32 images: 2.57 and 10.2 million parameters at 10 classes.
_SMALL: dict[str, Any] = {"depth": 2, "pools": (False, False, True, True), "num_classes": 10}
base.register(SpikeDrivenTransformer, "sdt_2_256_cifar", _CIFAR, **_SMALL, channels=256)
base.register(SpikeDrivenTransformer, "sdt_2_512_cifar", _CIFAR, **_SMALL, channels=512)
# For event frames: CIFAR10-DVS at 64x64, DVS128 Gesture at 128x128.
base.register(
    SpikeDrivenTransformerDVS,
    "sdt_2_256_dvs",
    base.model_cfg(num_classes=10, input_size=(10, 2, 64, 64), **_EVENTS),
    **_SMALL,
    channels=256,
    dilated=True,
    in_chans=2,
    timesteps=10,
)
base.register(
    SpikeDrivenTransformerDVS,
    "sdt_2_256_gesture",
    base.model_cfg(num_classes=11, input_size=(16, 2, 128, 128), **_EVENTS),
    channels=256,
    depth=2,
    pools=(False, True, True, True),
    in_chans=2,
    num_classes=11,
    timesteps=16,
)
