"""Checks of a user's neuron, and that the samples of a batch do not influence each other.

The accuracies of several published transformers are inflated because a layer of neurons runs over
the batch: a sample begins with the membranes of the sample before it, and in a folder sorted by
class both mostly have the same label. One sample alone never shows this.
"""

import copy
import logging
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork, check_logits
from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.norm_neuron import FusedLayer

logger = logging.getLogger(__name__)

_ROUNDS, _ENOUGH = 16, 1 / 16  # in which inputs grow, until this fraction of outputs is not 0


def check_neuron(neuron: neurons.NeuronConfig, timesteps: int) -> None:
    """Refuse a neuron without a gradient, or that does not continue from the state it returns."""
    axis, half, fault = neuron.sample_axis, timesteps // 2, ""
    remedy = "correct it, or set segments=False"
    try:
        with torch.random.fork_rng(devices=[]):
            learned = neurons.broadcasting(neuron, neurons.learned(neuron, 4).double(), 2)
        x = torch.arange(840.0 * timesteps, dtype=torch.float64).view(-1, 7, 4, 5, 6).sin()
        x = (4 * neuron.threshold * x).requires_grad_()
        returned: Any = neuron.run(x, None, **learned)
        spikes, state = (returned, None) if isinstance(returned, Tensor) else returned
        (grad,) = torch.autograd.grad(spikes.sum() + 0 * x.sum(), x)
        shape = getattr(state, "shape", type(state).__name__)
        if spikes is returned:
            fault, remedy = "returns one tensor", "return (spikes, membrane)"
        elif spikes.shape != x.shape:
            fault = f"returns spikes of another shape than its currents, {tuple(spikes.shape)}"
            remedy = f"it must be {tuple(x.shape)}, (T, B, ...)"
        elif not grad.any():
            fault = "passes no gradient"
            remedy = "make its spikes by neurons.spike(u - threshold, config)"
        elif neuron.segments and shape[axis : axis + 1] != (7,):
            fault = f"returns a state, {shape}, without the 7 samples on axis sample_axis={axis}"
        elif neuron.segments and half:
            first, end = neuron.run(x[:half], None, **learned)
            both = torch.cat([first, neuron.run(x[half:], end, **learned)[0]])
            if not torch.allclose(both, spikes, 0, 1e-9):
                fault = "gives other spikes if it continues from the membrane that it returned"
    except (RuntimeError, ValueError, AssertionError) as error:  # it may be for GPUs alone
        logger.warning("%s neurons cannot be checked: %s", neurons.kind_of(neuron), error)
    if fault:
        raise UserError(f"{neurons.kind_of(neuron)} {fault}; {remedy}")


@torch.no_grad()
def refuse_mixing(name: str, model: SpikingNetwork, shape: Sequence[int]) -> None:
    """Refuse a network on the CPU in which a sample's logits depend on the rest of its batch.

    Random samples of ``shape`` run alone and together, in both orders, through a copy of the
    network in float64, so that no spike flips by rounding. If it cannot run in float64, each runs
    among copies of itself instead of alone: batches of one size round alike.

    Raises:
        UserError: The network mixes samples, draws random numbers in evaluation mode, or does not
            return logits (T, B, K).
    """
    before, own = torch.get_rng_state(), next(model.parameters()).dtype
    samples = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    most, double = model.timesteps, torch.float64
    # Two timesteps and 64 pixels suffice, if the network takes others than its own.
    ways = (2, 64, double), (most, 64, double), (most, None, double), (most, None, own)
    net = model
    for timesteps, side, dtype in ways:
        try:
            net = copy.deepcopy(model)
            if timesteps < most:
                net.set_timesteps(timesteps)
            x = samples[..., :side, :side].to(dtype)
            x = x if len(shape) == 3 else x[:, : net.timesteps]
            silent = _make_fire(net.to(dtype), x[:2])
            is_mixed = _mixes(net, x)
            break
        except Exception as error:  # any error of foreign code
            failure = error
    else:
        layers = {id(module): path for path, module in net.named_modules()}
        owners = (id(f.f_locals.get("self")) for f, _ in traceback.walk_tb(failure.__traceback__))
        if within := [layers[owner] for owner in owners if owner in layers]:
            failure.add_note(f"in {within[-1] or 'forward'} of {name}")
        # With a GPU, the network may be for that alone.
        if isinstance(failure, UserError) or (within and not torch.cuda.is_available()):
            raise failure
        logger.warning("%s cannot be checked for samples that it mixes: %s", name, failure)
        return
    if not torch.equal(before, torch.get_rng_state()):
        raise UserError(
            f"{name} draws random numbers in evaluation mode, so its results would not be "
            "reproducible; draw them in training mode only (module.training)"
        )
    if is_mixed:
        raise UserError(
            f"{name} mixes the samples of a batch, so accuracy would depend on their order; keep "
            "them apart (neurons take (T, B, ...), not (T * B, ...)), or set "
            "model.mixes_samples=true to accept it"
        )
    if silent:
        message = "%s of %s is silent for random samples; whether it mixes them was not checked"
        logger.warning(message, silent, name)


def _mixes(model: SpikingNetwork, x: Tensor) -> bool:
    """Return whether a sample's logits differ between batches."""
    alike = x.dtype != torch.float64
    each = [_logits(model, one.expand_as(x) if alike else one)[:, :1] for one in x.split(1)]
    alone = torch.cat(each, 1)
    within = 1e-9 * float(alone.abs().max())
    together = _logits(model, x), _logits(model, (x if alike else x[:2]).flip(0)).flip(1)
    return not all(
        torch.allclose(found, alone[:, : found.shape[1]], 0, within, equal_nan=True)
        for found in together
    )


def _make_fire(model: SpikingNetwork, pair: Tensor) -> str:
    """Make spikes leave every layer, also of a network that is not trained yet.

    Parameters that are all zero, such as gains of branches, become random, running statistics
    become those of the samples, norms' gains triple, and the inputs of modules that return zeros
    grow, innermost first.

    Returns:
        The kind of the first module that stays silent, or "".
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(generator=generator)
    norms = [module for module in model.eval().modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.mul_(3)
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.execution = "reference"
    fired: dict[nn.Module, float] = {}
    for _ in range(_ROUNDS):
        for norm in norms:
            norm.training = True
        _logits(model, pair)
        fired = _fired(model.eval(), pair)
        for module in (silent := [one for one, share in fired.items() if share < _ENOUGH]):
            module.register_forward_pre_hook(lambda _, x: (4 * x[0], *x[1:]))
        if not silent:
            break
    return next((type(module).__name__ for module, share in fired.items() if not share), "")


def _fired(model: nn.Module, x: Tensor) -> dict[nn.Module, float]:
    """Return the fraction of each module's outputs that is not 0, if its input is not."""
    found: dict[nn.Module, float] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and isinstance(next(iter(inputs), None), Tensor):
            share = int(output.count_nonzero()) / max(output.numel(), 1)
            if inputs[0].any():
                found[module] = max(share, found.get(module, 0.0))

    with nn.modules.module.register_module_forward_hook(note):
        model(x)
    return found


def _logits(model: SpikingNetwork, x: Tensor) -> Tensor:
    logits = model(x, per_timestep=True)
    check_logits(logits, model.timesteps, len(x), model.num_classes)
    return logits
