"""ResNets as their repositories have them: names, shapes and plain definitions.

They are PreAct-ResNets, MS-ResNets, and SEW-ResNets of parallel spiking neurons.

The definitions are written anew, as functions of a state dict under the published names, with
torch's own operations and an image that is really repeated over time.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def norm_shapes(name: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{one}": (channels,) for one in vectors} | {f"{name}.num_batches_tracked": ()}


def preact_shapes(layers: tuple[int, ...], width: int = 64, classes: int = 1000) -> Shapes:
    """The state dict of a PreAct-ResNet of the repositories of distillation."""

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
        return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}

    shapes = conv("conv1", 3, width, 7) | norm_shapes("bn1", width)
    channels = width
    for stage, count in enumerate(layers):
        for i in range(count):
            block, wide = f"layer{stage + 1}.{i}", width << stage
            shapes |= conv(f"{block}.conv1", channels, wide, 3) | norm_shapes(f"{block}.bn1", wide)
            shapes |= conv(f"{block}.conv2", wide, wide, 3) | norm_shapes(f"{block}.bn2", wide)
            if stage > 0 and i == 0:
                shapes |= conv(f"{block}.downsample.0", channels, wide, 1)
                shapes |= norm_shapes(f"{block}.downsample.1", wide)
            channels = wide
    return shapes | {"fc.weight": (classes, channels), "fc.bias": (classes,)}


def ms_shapes(
    layers: tuple[int, ...], width: int = 64, classes: int = 1000, deep: bool = False
) -> Shapes:
    """The state dict of an MS-ResNet of its repository, without ``module.``."""
    shapes: Shapes = {"conv1.0.weight": (width, 3, 7, 7)} | norm_shapes("conv1.1.bn", width)
    if deep:
        shapes = norm_shapes("conv1.3.bn", width)
        for i, inputs in enumerate((3, width, width)):
            shapes |= {f"conv1.{i}.weight": (width, inputs, 3, 3), f"conv1.{i}.bias": (width,)}
    channels = width
    for stage, count in enumerate(layers):
        for i in range(count):
            block, wide = f"conv{stage + 2}_x.{i}", width << stage
            branch = f"{block}.residual_function"
            shapes |= {f"{branch}.1.weight": (wide, channels, 3, 3)}
            shapes |= {f"{branch}.4.weight": (wide, wide, 3, 3)}
            shapes |= norm_shapes(f"{branch}.2.bn", wide) | norm_shapes(f"{branch}.5.bn", wide)
            if i == 0:
                first = int(deep)
                shapes |= {f"{block}.shortcut.{first}.weight": (wide, channels, 1, 1)}
                shapes |= norm_shapes(f"{block}.shortcut.{first + 1}.bn", wide)
            channels = wide
    return shapes | {"fc.weight": (classes, channels), "fc.bias": (classes,)}


def distilled_shapes(
    layers: tuple[int, ...], stem: int, width: int, hidden: int, classes: int, channels: int = 3
) -> Shapes:
    """The state dict of a ResNet for CIFAR or events of the repositories of distillation."""
    shapes: Shapes = {"conv0.0.weight": (stem, channels, 3, 3)} | norm_shapes("conv0.1", stem)
    narrow = stem
    for stage, count in enumerate(layers):
        for i in range(count):
            block, wide = f"layer{stage + 1}.{i}", width << stage
            shapes |= {f"{block}.conv1.weight": (wide, narrow, 3, 3)}
            shapes |= {f"{block}.conv2.weight": (wide, wide, 3, 3)}
            shapes |= norm_shapes(f"{block}.bn1", wide) | norm_shapes(f"{block}.bn2", wide)
            if narrow != wide:
                shapes |= {f"{block}.shortcut.0.weight": (wide, narrow, 1, 1)}
                shapes |= norm_shapes(f"{block}.shortcut.1", wide)
            narrow = wide
    if not hidden:
        return shapes | {"classifier.0.weight": (classes, narrow), "classifier.0.bias": (classes,)}
    shapes |= {"classifier.0.weight": (hidden, narrow), "classifier.0.bias": (hidden,)}
    return shapes | {"classifier.2.weight": (classes, hidden), "classifier.2.bias": (classes,)}


def psn_sew_shapes(
    layers: tuple[int, ...], width: int = 64, classes: int = 1000, timesteps: int = 4
) -> Shapes:
    """The state dict of a SEW-ResNet of the repository of parallel spiking neurons."""

    def unit(block: str, number: str, inputs: int, outputs: int, kernel: int) -> Shapes:
        return {
            f"{block}conv{number}.weight": (outputs, inputs, kernel, kernel),
            **norm_shapes(f"{block}bn{number}", outputs),
            **neuron(f"{block}sn{number}"),
        }

    def neuron(name: str) -> Shapes:
        return {f"{name}.fc.weight": (timesteps, timesteps), f"{name}.fc.bias": (timesteps,)}

    shapes = {"pe": (timesteps, 1, 1, 1, 1)} | unit("", "1", 3, width, 7)
    channels = width
    for stage, count in enumerate(layers):
        for i in range(count):
            block, wide = f"layer{stage + 1}.{i}.", width << stage
            shapes |= unit(block, "1", channels, wide, 3) | unit(block, "2", wide, wide, 3)
            if stage > 0 and i == 0:
                shapes |= {f"{block}downsample.0.weight": (wide, channels, 1, 1)}
                shapes |= norm_shapes(f"{block}downsample.1", wide)
                shapes |= neuron(f"{block}downsample_sn")
            channels = wide
    return shapes | {"fc.weight": (classes, channels), "fc.bias": (classes,)}


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights at which spikes come through to the end, and norms of no initialiser's choice."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if not shape:
            state[name] = torch.tensor(7)
            continue
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1:
            values *= math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var"):
            values = 0.5 + values.square()
        elif name.endswith("weight"):
            values = 1 + 0.2 * values
        else:
            values = 0.2 + 0.2 * values
        state[name] = values
    return state


# ------------------------------------------------------------------------------- definitions


class Neurons(NamedTuple):
    """``surrogate`` is a function whose derivative is that of the spike."""

    decay: float
    threshold: float
    soft: bool
    detached: bool
    surrogate: Callable[[Tensor], Tensor]

    def fire(self, current: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(current[0]), []
        for now in current.unbind():
            u = self.decay * u + now
            smooth = self.surrogate(u - self.threshold)
            s = (u > self.threshold).double() + smooth - smooth.detach()
            spikes.append(s)
            reset = s.detach() if self.detached else s
            u = u - self.threshold * reset if self.soft else u * (1 - reset)
        return torch.stack(spikes)


DECOUPLING = Neurons(0.2, 1.0, soft=True, detached=False, surrogate=lambda x: torch.sigmoid(4 * x))
SEAL = DECOUPLING._replace(soft=False)
MS = Neurons(0.25, 0.5, soft=False, detached=True, surrogate=lambda x: x.clamp(-0.5, 0.5))


class Definition:
    """A network as a function of a state dict under the published names.

    Args:
        state: Parameters are leaves of autograd where they are to be; running statistics are moved
            in training.
        neurons: All of its neurons; None: they have weights of their own, in the state.
        timesteps: T.
        training: Whether norms take the batch's statistics.
    """

    def __init__(
        self, state: dict[str, Tensor], neurons: Neurons | None, timesteps: int, training: bool
    ) -> None:
        self.state, self.neurons = state, neurons
        self.timesteps, self.training = timesteps, training

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        y = F.conv2d(x.flatten(0, 1), weight, bias, stride, weight.shape[-1] // 2)
        return y.unflatten(0, x.shape[:2])

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{one}"] for one in ("running_mean", "running_var", "weight", "bias")
        )
        y = F.batch_norm(x.flatten(0, 1), mean, var, weight, bias, self.training, 0.1, 1e-5)
        return y.unflatten(0, x.shape[:2])

    def blocks(self, stage: str) -> Iterator[str]:
        """Names of a stage's blocks."""
        numbers = {int(key.split(".")[1]) for key in self.state if key.startswith(f"{stage}.")}
        return (f"{stage}.{i}" for i in sorted(numbers))

    def preact(self, images: Tensor) -> Tensor:
        """Logits (T, B, K) of a PreAct-ResNet."""
        x = self.norm("bn1", self.conv("conv1", images.expand(self.timesteps, *images.shape), 2))
        x = F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for block in self.blocks(stage):
                projects = f"{block}.downsample.0.weight" in self.state
                stride = 2 if projects else 1
                y = self.conv(f"{block}.conv1", self.neurons.fire(x), stride)
                y = self.neurons.fire(self.norm(f"{block}.bn1", y))
                y = self.norm(f"{block}.bn2", self.conv(f"{block}.conv2", y))
                if projects:
                    x = self.conv(f"{block}.downsample.0", x, stride)
                    x = self.norm(f"{block}.downsample.1", x)
                x = y + x
        return x.mean((3, 4)) @ self.state["fc.weight"].T + self.state["fc.bias"]

    def ms(self, images: Tensor) -> Tensor:
        """Logits (T, B, K) of an MS-ResNet, plain or deep, without dropout. Its authors average the
        features over time, before the classifier, which is linear."""
        x = images.expand(self.timesteps, *images.shape)
        deep = "conv1.3.bn.weight" in self.state
        x = self.conv("conv1.0", x, 2)
        if deep:
            x = self.conv("conv1.2", self.conv("conv1.1", x))
        x = self.norm("conv1.3.bn" if deep else "conv1.1.bn", x)
        for stage in ("conv2_x", "conv3_x", "conv4_x", "conv5_x"):
            for number, block in enumerate(self.blocks(stage)):
                branch = f"{block}.residual_function"
                y = self.conv(f"{branch}.1", self.neurons.fire(x), 2 if number == 0 else 1)
                y = self.neurons.fire(self.norm(f"{branch}.2.bn", y))
                y = self.norm(f"{branch}.5.bn", self.conv(f"{branch}.4", y))
                if number == 0 and deep:
                    x = F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
                    x = self.norm(f"{block}.shortcut.2.bn", self.conv(f"{block}.shortcut.1", x))
                elif number == 0:
                    x = self.norm(f"{block}.shortcut.1.bn", self.conv(f"{block}.shortcut.0", x, 2))
                x = y + x
        features = self.neurons.fire(x).mean((3, 4))
        return features @ self.state["fc.weight"].T + self.state["fc.bias"]

    def parallel(self, name: str, x: Tensor) -> Tensor:
        """Spikes of parallel neurons, whose surrogate is the derivative of an arc tangent."""
        weight, bias = self.state[f"{name}.fc.weight"], self.state[f"{name}.fc.bias"]
        h = torch.einsum("ts,s...->t...", weight, x) + bias.view(-1, 1, 1, 1, 1)
        smooth = torch.atan(math.pi * h) / math.pi
        return (h >= 0).double() + smooth - smooth.detach()

    def psn_sew(self, images: Tensor) -> Tensor:
        """Logits (T, B, K) of a SEW-ResNet of parallel neurons."""
        x = images.expand(self.timesteps, *images.shape) + self.state["pe"]
        x = self.parallel("sn1", self.norm("bn1", self.conv("conv1", x, 2)))
        x = F.avg_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for block in self.blocks(stage):
                projects = f"{block}.downsample.0.weight" in self.state
                stride = 2 if projects else 1
                y = self.norm(f"{block}.bn1", self.conv(f"{block}.conv1", x, stride))
                y = self.conv(f"{block}.conv2", self.parallel(f"{block}.sn1", y))
                y = self.parallel(f"{block}.sn2", self.norm(f"{block}.bn2", y))
                if projects:
                    x = self.norm(f"{block}.downsample.1", self.conv(f"{block}.downsample.0", x, 2))
                    x = self.parallel(f"{block}.downsample_sn", x)
                x = x + y
        return x.mean((3, 4)) @ self.state["fc.weight"].T + self.state["fc.bias"]
