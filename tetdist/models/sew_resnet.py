"""SEW-ResNet (Fang et al., NeurIPS 2021): residual blocks joined spike by spike.

A block is conv-BN-neuron twice (three times in the bottleneck), and its spikes are joined with
those of its input by a connect function: ADD (sums of spikes, small integers), AND, or IAND
((1 - residual) * identity). A shortcut that changes the shape is conv-BN-neuron, too. The stem
convolves and normalises a static image once; all timesteps share it.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models import base
from tetdist.models.base import ConvNormNeuron, SpikingNetwork, conv1x1, conv3x3
from tetdist.nn import neurons
from tetdist.nn.dropout import DropPath
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.packed import Conv2d, MaxPool, pack, packed_of, with_packed

Connect = Literal["add", "and", "iand"]
# Functions that join a block's spikes with its input's.
CONNECT: dict[Connect, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda residual, identity: residual + identity,
    "and": lambda residual, identity: residual * identity,
    "iand": lambda residual, identity: (1 - residual) * identity,
}


def connect(
    last: ConvNormNeuron,
    x: Tensor,
    identity: Tensor,
    function: Connect,
    drop_path: DropPath | None = None,
) -> Tensor:
    """Join the spikes of a block's last layer with its input's (paper of SEW-ResNet, table 1).

    Args:
        last: The layer.
        x: Its input, (T, B, C, H, W).
        identity: Spikes of the shortcut, of the shape of the layer's output.
        drop_path: Drops the block's spikes in training, so that only the identity is left, for any
            function.
    """
    joined = _joined(last, x, identity, function)
    return joined if drop_path is None else drop_path.chosen(joined, identity)


def _joined(last: ConvNormNeuron, x: Tensor, identity: Tensor, function: Connect) -> Tensor:
    # In training the layer's kernel also computes the sum. In evaluation the layer returns only its
    # spikes, because they are counted there.
    if function == "add" and last.training:
        return last(x, identity=identity)
    residual = last(x)
    joined = CONNECT[function](residual, identity)
    in_bytes = last.training and last.neuron.neuron.binary and packed_of(identity) is not None
    return with_packed(joined, pack(joined.detach())) if in_bytes else joined


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        function: Connect,
        neuron: NeuronConfig,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.function = function
        self.drop_path = DropPath(drop_path)
        self.conv1 = ConvNormNeuron(conv3x3(in_channels, width, stride), neuron)
        self.conv2 = ConvNormNeuron(conv3x3(width, width), neuron)
        self.downsample = _downsample(in_channels, width, stride, neuron)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        return connect(self.conv2, self.conv1(x), identity, self.function, self.drop_path)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        function: Connect,
        neuron: NeuronConfig,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.function = function
        self.drop_path = DropPath(drop_path)
        self.conv1 = ConvNormNeuron(conv1x1(in_channels, width), neuron)
        self.conv2 = ConvNormNeuron(conv3x3(width, width, stride), neuron)
        self.conv3 = ConvNormNeuron(conv1x1(width, 4 * width), neuron)
        self.downsample = _downsample(in_channels, 4 * width, stride, neuron)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(self.conv1(x))
        return connect(self.conv3, hidden, self.downsample(x), self.function, self.drop_path)


def _downsample(
    in_channels: int, out_channels: int, stride: int, neuron: NeuronConfig
) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return ConvNormNeuron(conv1x1(in_channels, out_channels, stride), neuron)


class SEWResNet(SpikingNetwork):
    """SEW-ResNet.

    Args:
        layers: Number of blocks in each of the stages.
        connect_function: Function that joins a block's spikes with its input's.
        width: Channels of the first stage; they double from stage to stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        *,
        neuron: NeuronConfig,
        connect_function: Connect = "add",
        width: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, timesteps, drop_path_rate)
        if connect_function not in CONNECT:
            raise ValueError(f"connect_function must be add, and or iand, not {connect_function!r}")
        of_others = neuron.levels is not None and not neuron.binary
        if connect_function != "add" and of_others:
            raise UserError(
                f"model.arguments.connect_function: {connect_function} needs spikes of 0 and 1, "
                f"and {neurons.kind_of(neuron)} neurons send others; set connect_function: add"
            )
        self.stem = ConvNormNeuron(
            Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False), neuron
        )
        self.pool: nn.Module = MaxPool(3, stride=2, padding=1)
        self.set_resnet(
            partial(block, function=connect_function, neuron=neuron),
            layers,
            (width, 4),
            width,
            expansion=block.expansion,
        )
        highest, highest_inputs = 1, list[int | None]()
        for one in self.blocks:
            highest_inputs.append(highest)
            if connect_function == "add":
                highest = 1 + (highest if isinstance(one.downsample, nn.Identity) else 1)
        self.highest_inputs = tuple(highest_inputs)
        self.set_head(drop_rate)
        base.init_weights(self)


base.register(SEWResNet, "sew_resnet18", block=BasicBlock, layers=(2, 2, 2, 2))
# 21.79 million parameters at 1000 classes.
base.register(SEWResNet, "sew_resnet34", block=BasicBlock, layers=(3, 4, 6, 3))
base.register(SEWResNet, "sew_resnet50", block=Bottleneck, layers=(3, 4, 6, 3))
base.register(SEWResNet, "sew_resnet101", block=Bottleneck, layers=(3, 4, 23, 3))
base.register(SEWResNet, "sew_resnet152", block=Bottleneck, layers=(3, 8, 36, 3))
