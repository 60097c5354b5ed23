"""Synaptic operations and updates of membranes, counted while a network runs.

Counting works by layer of synapses (a convolution or a linear layer):

* **Spikes are accumulates**: one per synapse that a spike reaches. A convolution's synapses are
  counted by position, so a pixel at the border, or one that a stride skips, has fewer.
* **A sum of n spikes is n of them**: SEW's ADD, n events of a camera in one time bin, and what an
  I-LIF neuron sends, which fires n times within the timestep. NI-LIF neurons send n / D, which is n
  events that weigh a D-th. A mean of 2x2 spikes is its spikes with a quarter of the weight; of 3x3
  spikes (the stem of PSN-SEW-ResNets) they count as real numbers.
* **Real numbers are multiply-accumulates**, one per synapse, whether zero or not: an image, the
  mean over all positions before a classifier, or the currents that a membrane shortcut carries to a
  projection (PreAct- and MS-ResNets). A static image's first layers are computed once for all
  timesteps.
* **Attention** has no weights but sums of products of spikes (nn/products.py), over a head's
  channels or over positions; each spike or product that is 1 is an accumulate, also in k^T v. A
  spike of q adds the d sums that it selects. Masks are not counted. All pairs of the spikes of
  neurons that fire several times count. Synapses are the multiplications of real numbers: per head
  and timestep, N d for each sum, and 2 N d^2 for k^T v and its product with q.

A neuron updates its membrane once a timestep, which is counted with the layer of synapses that ran
last before it. Batch norm counts as folded into the weights. Biases, identity shortcuts and pooling
are not counted.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.distributed.world import World
from tetdist.nn.fast import native_pool
from tetdist.nn.norm_neuron import LatestLevels, firing_layers, neurons_of
from tetdist.nn.products import Product


@dataclass(frozen=True)
class LayerOperations:
    """The operations of one layer for an average sample, over all timesteps.

    Attributes:
        accumulates, multiply_accumulates: Numbers of operations; one of the two is 0.
        synapses: Pairs of an input and an output that a weight connects: the multiply-accumulates
            of the same layer in a ReLU network. Attention has no weights; its products count.
        weights: Number of weights, each of which may connect many synapses.
        membrane_updates: Updates of membranes by the neurons after this layer.
    """

    accumulates: float
    multiply_accumulates: float
    synapses: float
    weights: int
    membrane_updates: float


@dataclass(frozen=True)
class Operations:
    """The operations of a network for an average sample; layers in the order they run.

    ``most_spikes`` is the largest number of spikes that a neuron sends in a timestep.
    """

    layers: dict[str, LayerOperations]
    most_spikes: int

    @property
    def accumulates(self) -> float:
        return sum(layer.accumulates for layer in self.layers.values())

    @property
    def multiply_accumulates(self) -> float:
        return sum(layer.multiply_accumulates for layer in self.layers.values())

    @property
    def relu_multiply_accumulates(self) -> float:
        """The operations of the ReLU network with the same synapses, which runs once."""
        return sum(layer.synapses for layer in self.layers.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the operations, ready for JSON."""
        return {
            "accumulates": self.accumulates,
            "multiply_accumulates": self.multiply_accumulates,
            "relu_multiply_accumulates": self.relu_multiply_accumulates,
            "most_spikes": self.most_spikes,
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
        }


# Indices of a layer's sums. Integers are multiples of one spike's value.
PRESENTATIONS, PRESENTED_SYNAPSES, CARRIED, NOT_WHOLE, NOT_QUARTERS, UPDATES = range(6)


class FanOuts:
    """Numbers of outputs that a spike of one channel reaches, by layer and size of its input."""

    def __init__(self) -> None:
        self._known: dict[tuple[nn.Module, torch.Size], Tensor] = {}

    def of(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return them for a layer that maps ``x`` to ``y``: (H, W), or () of a linear layer."""
        if not isinstance(layer, nn.Conv2d):
            return x.new_full((), y.shape[-1], dtype=torch.float64)
        key = (layer, x.shape[-2:])
        if key not in self._known:
            reached = F.conv_transpose2d(
                x.new_ones(1, 1, *y.shape[-2:], dtype=torch.float64),
                x.new_ones(1, 1, *layer.kernel_size, dtype=torch.float64),
                stride=layer.stride,
                dilation=layer.dilation,
            )[0, 0]
            # Cut the padding off. A stride's last window may end before the input, so enlarge the
            # result first.
            assert not isinstance(layer.padding, str)
            (top, left), (height, width) = layer.padding, x.shape[-2:]
            reached = F.pad(reached, (0, width, 0, height))[top:, left:][:height, :width]
            self._known[key] = reached * (layer.out_channels // layer.groups)
        return self._known[key]


class OperationCounts(AbstractContextManager["OperationCounts"]):
    """Counts of the forward passes within this context, on one process; `total` adds all up.

    All inputs of a layer determine their kind: a single one that is not whole, or not a quarter,
    decides. A spike's value is 1, or the smallest fraction where neurons send fractions of 1,
    except for the layer that sees the network's input.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._latest = LatestLevels(model)
        self._weights: dict[str, int] = {}
        self._fan_outs = FanOuts()
        self._hooks = hooks = ExitStack()
        self._most_spikes = max(
            ((one.levels or 1) * one.highest for one in neurons_of(model)), default=1
        )
        for module in firing_layers(model).values():
            hooks.enter_context(module.register_forward_hook(self._count_updates))
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                self._weights[name] = module.weight.numel()
                hooks.enter_context(module.register_forward_hook(self._hook(name)))
            if isinstance(module, Product):
                self._weights[name] = 0
                hooks.enter_context(module.register_forward_hook(self._product_hook(name)))
        self._sums = {name: torch.zeros(6, dtype=torch.float64) for name in self._weights}
        # Networks register their layers in the order in which they run.
        self._of_input = self._ran_last = next(iter(self._sums), None)

    def _count_updates(self, _module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
        if self._ran_last is not None:
            self._sums[self._ran_last][UPDATES] += spikes.numel()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()
            if x.ndim == (4 if isinstance(module, nn.Conv2d) else 2):
                # A container of spikingjelly has folded time into the batch.
                x = x[None]
            # Spikes are multiples of 1 / levels.
            levels = 1 if name == self._of_input else self._latest.levels or 1
            sums = self._sums_on(x.device, name)
            presentations = x.shape[0] * x.shape[1]  # T * B
            fan_out = self._fan_outs.of(module, x, output)
            if isinstance(module, nn.Conv2d):
                carried, inputs_a_position = over_positions(x) * fan_out, x.shape[2]
            else:
                carried, inputs_a_position = native_pool.total(x) * fan_out, x.shape[-1]
            sums[PRESENTATIONS] += presentations
            sums[PRESENTED_SYNAPSES] += presentations * inputs_a_position * fan_out.sum()
            sums[CARRIED] += levels * carried.sum()
            if _has_other_than_multiples(x, levels):
                sums[NOT_WHOLE] += 1
                sums[NOT_QUARTERS] += _has_other_than_multiples(x, 4 * levels)

        return count

    def _product_hook(self, name: str) -> Callable[[Product, tuple[Tensor, ...], Tensor], None]:
        def count(product: Product, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            inputs = tuple(x.detach() for x in inputs)
            sums = self._sums_on(inputs[0].device, name)
            sums[PRESENTATIONS] += inputs[0].shape[0] * inputs[0].shape[1]  # T * B
            sums[PRESENTED_SYNAPSES] += product.synapses(*inputs)
            levels = self._latest.levels or 1
            if any(_has_other_than_multiples(x, levels) for x in inputs):
                # Products of quarters are not quarters.
                sums[NOT_WHOLE] += 1
                sums[NOT_QUARTERS] += 1
                return
            sums[CARRIED] += product.accumulates(*(levels * x for x in inputs))

        return count

    def _sums_on(self, device: torch.device, name: str) -> Tensor:
        """Return the sums of the layer that is running, on the device that it runs on."""
        self._ran_last, self._sums[name] = name, self._sums[name].to(device)
        return self._sums[name]

    def total(self, world: World, samples: int) -> Operations:
        """Return the operations of an average sample, of ``samples`` on all processes together.

        The result is the same on every process.
        """
        flat = world.sum([value for sums in self._sums.values() for value in sums.tolist()])
        layers = {
            name: _layer(flat[6 * i : 6 * i + 6], weights, samples)
            for i, (name, weights) in enumerate(self._weights.items())
        }
        return Operations(layers, self._most_spikes)

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()
        self._latest.remove()


def _layer(sums: list[float], weights: int, samples: int) -> LayerOperations:
    synapses, accumulates = sums[PRESENTED_SYNAPSES] / sums[PRESENTATIONS], 0.0
    is_real = bool(sums[NOT_WHOLE] and sums[NOT_QUARTERS])
    if not is_real:
        accumulates = (4 if sums[NOT_WHOLE] else 1) * sums[CARRIED] / samples
    multiplied = sums[PRESENTED_SYNAPSES] / samples if is_real else 0.0
    return LayerOperations(accumulates, multiplied, synapses, weights, sums[UPDATES] / samples)


def over_positions(x: Tensor) -> Tensor:
    """Return sums of (T, B, C, H, W) over all dimensions except positions, (H, W)."""
    # The channels come last in memory, and summing in that order is fast.
    rows = x.permute(0, 1, 3, 4, 2).flatten(0, 1)
    of_channels = rows.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return of_channels.double().sum(-1)


def _has_other_than_multiples(x: Tensor, levels: int) -> bool:
    """Return whether some value is negative or not a multiple of 1 / levels."""
    scaled = x if levels == 1 else x * levels
    return not torch.equal(scaled, scaled.round().abs())
