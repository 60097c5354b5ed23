"""Synaptic operations as a part of the loss: where a spike costs time, fewer are faster."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tetdist.evaluation.operations import FanOuts, over_positions
from tetdist.nn.norm_neuron import LatestLevels
from tetdist.nn.packed import is_marked, packed_of
from tetdist.nn.recompute import add, gathering


class SynapticOperations:
    """Synaptic operations of a micro-batch's spikes, as a share of its dense operations.

    They are accumulates as evaluation/operations.py counts them, with these differences: only
    layers that read spikes of neurons count, since training cannot change the network's input;
    products of attention do not count; and a micro-batch decides a layer's kind, so that nothing
    waits for the device. Both numbers are sums over samples and timesteps, so the share is their
    mean. A spike's gradient is its fan-out by the dense operations, and the surrogate's from there.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._fan_outs = model, FanOuts()
        # Networks register their layers in the order in which they run: the first reads the input.
        self._layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][1:]
        self._levels: dict[nn.Module, int] = {}  # of the spikes that a layer reads

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count forward passes within this context, for `share`, and in their backward passes."""
        self._latest = LatestLevels(self._model)
        with gathering() as self._sums, contextlib.ExitStack() as hooks:
            hooks.callback(self._latest.remove)
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_hook(self._count))
            yield

    def share(self) -> Tensor:
        """Return the share of the pass, (), float64: up to the most spikes of a layer's input."""
        spikes, dense = torch.stack(self._sums).sum(0)
        self._sums.clear()  # the graph should not outlive its backward pass
        return spikes / dense.clamp(min=1)

    def _count(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,), fan_out = inputs, self._fan_outs.of(layer, inputs[0], output)
        if isinstance(layer, nn.Conv2d):
            # A container of spikingjelly has folded time into the batch.
            carried = over_positions(x if x.ndim == 5 else x[None])
        else:
            carried = x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).double()
        # In a recomputation, the neuron that ran last is another.
        levels = self._levels.setdefault(layer, self._latest.levels or 1)
        per_spike = _spikes_of_one(x, levels)
        dense = x.numel() / fan_out.numel() * fan_out.sum()
        add(torch.stack([per_spike * (carried * fan_out).sum(), (per_spike > 0) * dense]))


def _spikes_of_one(x: Tensor, levels: int) -> Tensor | int:
    """Return the number of spikes that a value of 1 is, (); 0 if some value is a real number."""
    packed = packed_of(x)
    if is_marked(x) or (packed is not None and packed.levels == levels):
        return levels
    x = x.detach()
    fours = (4 * levels) * x
    is_count = (fours == fours.round().abs()).all()
    is_whole = (levels * x == (levels * x).round()).all()
    return levels * torch.where(is_whole, 1, 4) * is_count
