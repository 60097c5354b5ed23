"""Synaptic operations as a part of the loss: where a spike costs time, fewer are faster."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tetdist.evaluation.operations import FanOuts, over_positions
from tetdist.nn.norm_neuron import LatestLevels


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
        self._sums: list[Tensor] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the forward pass within this context; `share` returns the result."""
        self._latest = LatestLevels(self._model)
        with contextlib.ExitStack() as hooks:
            hooks.callback(self._latest.remove)
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_hook(self._count))
            yield

    def share(self) -> Tensor:
        """Return the share, (), float64: up to 1, or to the most spikes of a neuron a timestep."""
        (spikes, dense), self._sums = torch.stack(self._sums).sum(0), []
        return spikes / dense.clamp(min=1)

    def _count(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,), fan_out = inputs, self._fan_outs.of(layer, inputs[0], output)
        if isinstance(layer, nn.Conv2d):
            # A container of spikingjelly has folded time into the batch.
            carried = over_positions(x if x.ndim == 5 else x[None])
        else:
            carried = x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).double()
        per_spike = _spikes_of_one(x.detach(), self._latest.levels or 1)
        dense = x.numel() / fan_out.numel() * fan_out.sum()
        self._sums.append(
            torch.stack([per_spike * (carried * fan_out).sum(), (per_spike > 0) * dense])
        )


def _spikes_of_one(x: Tensor, levels: int) -> Tensor:
    """Return the number of spikes that a value of 1 is, (); 0 if some value is a real number."""
    fours = (4 * levels) * x
    is_count = (fours == fours.round().abs()).all()
    is_whole = (levels * x == (levels * x).round()).all()
    return levels * torch.where(is_whole, 1, 4) * is_count
