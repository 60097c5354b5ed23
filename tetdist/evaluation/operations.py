"""Synaptic operations, counted while a network runs, and an estimate of the energy they take.

Counting works by layer of synapses (a convolution or a linear layer):

* **Spikes are accumulates.** A spike adds a weight to each neuron that it reaches: one accumulate
  per synapse. A convolution's synapses are counted by position, so a pixel at the border, or one
  that a stride skips, has fewer.
* **A sum of n spikes is n of them**: what SEW blocks exchange by ADD arrives as n events. So are n
  events of a camera in one time bin, and what an I-LIF neuron sends, which fires n times within the
  timestep. NI-LIF neurons send n / D, which is n events that weigh a D-th.
* **A mean of 2x2 spikes** is the same as its spikes with a quarter of the weight: each of them is
  an accumulate a synapse. Of 3x3 spikes (the stem of PSN-SEW-ResNets) they count as real numbers.
* **Real numbers are multiply-accumulates**, one per synapse, whether zero or not: an image, the
  mean over all positions before a classifier, or the currents that a membrane shortcut carries to a
  projection (PreAct- and MS-ResNets). A static image's first layers are computed once for all
  timesteps.
* **Attention** has no weights but sums of products of spikes (nn/products.py). In a sum over a
  head's channels, or of products over positions, each spike or product that is 1 is an accumulate.
  In k^T v, each pair of a key's and a value's spike at the same position is one; then a spike of q
  adds the d sums that it selects, which are d accumulates. A mask lets spikes pass or not and is
  not counted. Where neurons fire several times in a timestep, all pairs of their spikes count. The
  number of synapses is that of the multiplications of real numbers: per head and timestep, N d for
  each sum over positions or channels, and 2 N d^2 for k^T v and its product with q.

Batch norm counts as folded into the weights. Biases, membranes (decay, threshold, reset), identity
shortcuts, pooling and, above all, memory access are not counted; on most hardware memory takes more
energy than arithmetic. So the result compares networks, not devices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.distributed.world import World
from tetdist.nn.fast import native_pool
from tetdist.nn.norm_neuron import LatestLevels
from tetdist.nn.products import Product

# Energy of a 32-bit floating-point operation in a 45 nm process, in picojoules (Horowitz, ISSCC
# 2014): an addition, and a multiplication with an addition.
ACCUMULATE_PJ, MULTIPLY_ACCUMULATE_PJ = 0.9, 4.6

ASSUMPTIONS = (
    f"45 nm, 32-bit floating point: {ACCUMULATE_PJ} pJ an accumulate, {MULTIPLY_ACCUMULATE_PJ} pJ "
    "a multiply-accumulate",
    "a spike is an accumulate at each synapse that it reaches; a sum of n spikes (SEW's ADD) is n, "
    "a mean over 2x2 pixels is its spikes",
    "real-valued inputs (an image, a mean before the classifier) are a multiply-accumulate at each "
    "synapse; a static image's first layer is computed once for all timesteps",
    "attention: an accumulate a spike or product of spikes that is added up, and a spike of q adds "
    "the d sums that it selects; masks are not counted",
    "batch norm is folded into the weights; biases, membranes, identity shortcuts, pooling and "
    "memory access are not counted",
)


@dataclass(frozen=True)
class LayerOperations:
    """The operations of one layer for an average sample, over all timesteps.

    Attributes:
        accumulates, multiply_accumulates: Numbers of operations; one of the two is 0.
        synapses: Pairs of an input and an output that a weight connects: the multiply-accumulates
            of the same layer in a ReLU network. Attention has no weights; its products count.
    """

    accumulates: float
    multiply_accumulates: float
    synapses: float


@dataclass(frozen=True)
class Operations:
    """The operations of a network for an average sample; layers in the order they run."""

    layers: dict[str, LayerOperations]

    @property
    def accumulates(self) -> float:
        return sum(layer.accumulates for layer in self.layers.values())

    @property
    def multiply_accumulates(self) -> float:
        return sum(layer.multiply_accumulates for layer in self.layers.values())

    @property
    def energy_pj(self) -> float:
        """The energy in picojoules; see `ASSUMPTIONS`."""
        return ACCUMULATE_PJ * self.accumulates + MULTIPLY_ACCUMULATE_PJ * self.multiply_accumulates

    @property
    def relu_multiply_accumulates(self) -> float:
        """The operations of the ReLU network with the same synapses, which runs once."""
        return sum(layer.synapses for layer in self.layers.values())

    @property
    def relu_energy_pj(self) -> float:
        return MULTIPLY_ACCUMULATE_PJ * self.relu_multiply_accumulates

    def as_dict(self) -> dict[str, Any]:
        """Return the operations, ready for JSON."""
        return {
            "accumulates": self.accumulates,
            "multiply_accumulates": self.multiply_accumulates,
            "energy_pj": self.energy_pj,
            "relu_multiply_accumulates": self.relu_multiply_accumulates,
            "relu_energy_pj": self.relu_energy_pj,
            "assumptions": list(ASSUMPTIONS),
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
        }


@contextmanager
def counting_operations(
    model: nn.Module, *, in_spikes: bool = False
) -> Iterator["OperationCounts"]:
    """Count the operations of the forward passes within the context; see `OperationCounts`."""
    counts = OperationCounts(model, in_spikes=in_spikes)
    try:
        yield counts
    finally:
        counts.remove()


# Indices of a layer's sums. Whole numbers are multiples of one spike's value.
PRESENTATIONS, PRESENTED_SYNAPSES, CARRIED, NOT_WHOLE, NOT_QUARTERS = range(5)


class OperationCounts:
    """Sums over the inputs of each layer of synapses on one process; `total` adds all up.

    All inputs of a layer determine their kind: a single one that is not whole, or not a quarter,
    decides. A spike's value is 1, or the smallest fraction where neurons send fractions of 1,
    except for the layer that sees the network's input.

    Args:
        model: The network.
        in_spikes: True if its layers see single spikes (`unrolled`); products always see numbers.
    """

    def __init__(self, model: nn.Module, *, in_spikes: bool = False) -> None:
        self._latest, self._in_spikes = LatestLevels(model), in_spikes
        self._sums: dict[str, Tensor] = {}
        self._fan_outs: dict[tuple[str, torch.Size], Tensor] = {}
        self._handles = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                self._sums[name] = torch.zeros(5, dtype=torch.float64)
                self._handles.append(module.register_forward_hook(self._hook(name)))
            if isinstance(module, Product):
                self._sums[name] = torch.zeros(5, dtype=torch.float64)
                self._handles.append(module.register_forward_hook(self._product_hook(name)))
        # Networks register their layers in the order in which they run.
        self._of_input = next(iter(self._sums), None)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()
            if x.ndim == (4 if isinstance(module, nn.Conv2d) else 2):
                # A container of spikingjelly has folded time into the batch.
                x = x[None]
            levels = self._levels_of(name)
            sums = self._sums[name] = self._sums[name].to(x.device)
            presentations = x.shape[0] * x.shape[1]  # T * B
            if isinstance(module, nn.Conv2d):
                fan_out = self._fan_out(name, module, x, output)
                carried, inputs_a_position = _over_positions(x) * fan_out, x.shape[2]
            else:
                fan_out = torch.tensor(float(output.shape[-1]), device=x.device)
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
            sums = self._sums[name] = self._sums[name].to(inputs[0].device)
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

    def _levels_of(self, name: str) -> int:
        """Return the levels of a layer's inputs (multiples of 1 / levels), if they are spikes."""
        if self._in_spikes or name == self._of_input:
            return 1
        return self._latest.levels or 1

    def _fan_out(self, name: str, conv: nn.Conv2d, x: Tensor, y: Tensor) -> Tensor:
        """Return how many outputs a spike of one channel reaches from each position, (H, W)."""
        key = (name, x.shape[-2:])
        if key not in self._fan_outs:
            reached = F.conv_transpose2d(
                x.new_ones(1, 1, *y.shape[-2:], dtype=torch.float64),
                x.new_ones(1, 1, *conv.kernel_size, dtype=torch.float64),
                stride=conv.stride,
                dilation=conv.dilation,
            )[0, 0]
            # Cut the padding off. A stride's last window may end before the input, so enlarge the
            # result first.
            assert not isinstance(conv.padding, str)
            (top, left), (height, width) = conv.padding, x.shape[-2:]
            reached = F.pad(reached, (0, width, 0, height))[top:, left:][:height, :width]
            self._fan_outs[key] = reached * (conv.out_channels // conv.groups)
        return self._fan_outs[key]

    def total(self, world: World, samples: int) -> Operations:
        """Return the operations of an average sample, of ``samples`` on all processes together.

        The result is the same on every process.
        """
        names = list(self._sums)
        flat = world.sum([value for name in names for value in self._sums[name].tolist()])
        rows = [flat[5 * i : 5 * i + 5] for i in range(len(names))]
        return Operations(
            {name: _layer(row, samples) for name, row in zip(names, rows, strict=True)}
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._latest.remove()


def _layer(sums: list[float], samples: int) -> LayerOperations:
    synapses = sums[PRESENTED_SYNAPSES] / sums[PRESENTATIONS]
    if sums[NOT_WHOLE] and sums[NOT_QUARTERS]:
        return LayerOperations(0.0, sums[PRESENTED_SYNAPSES] / samples, synapses)
    spikes_in_one = 4 if sums[NOT_WHOLE] else 1
    return LayerOperations(spikes_in_one * sums[CARRIED] / samples, 0.0, synapses)


def _over_positions(x: Tensor) -> Tensor:
    """Return sums of (T, B, C, H, W) over all dimensions except positions, (H, W)."""
    # The channels come last in memory, and summing in that order is fast.
    rows = x.permute(0, 1, 3, 4, 2).flatten(0, 1)
    of_channels = rows.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return of_channels.double().sum(-1)


def _has_other_than_multiples(x: Tensor, levels: int) -> bool:
    """Return whether some value is negative or not a multiple of 1 / levels."""
    scaled = x if levels == 1 else x * levels
    return not torch.equal(scaled, scaled.round().abs())
