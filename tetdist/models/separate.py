"""Checks of a user's neuron, and that the samples of a batch do not influence each other.

The accuracies of several published transformers are inflated because a layer of neurons runs over
the batch: a sample begins with the membranes of the sample before it, and in a folder sorted by
class both mostly have the same label. One sample alone never shows this.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork, check_logits
from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.norm_neuron import FusedLayer, broadcasting, learned_of

logger = logging.getLogger(__name__)

_ROUNDS, _ENOUGH = 16, 1 / 16  # in which inputs grow, until this fraction of outputs is not 0


def check_neuron(neuron: neurons.NeuronConfig, timesteps: int) -> None:
    """Refuse a neuron without a gradient, or that does not continue from the state it returns."""
    axis, half, fault = neuron.sample_axis, timesteps // 2, ""
    remedy = "correct it, or set segments=False"
    try:
        with torch.random.fork_rng(devices=[]):
            learned = broadcasting(neuron, learned_of(neuron, 4).double(), 2)
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
    before = torch.get_rng_state()
    samples = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    double, own = torch.float64, next(model.parameters()).dtype
    # Two timesteps and 64 pixels suffice, if the network takes others than its own.
    for trial in (
        _Trial(timesteps=2, side=64, dtype=double),
        _Trial(timesteps=model.timesteps, side=64, dtype=double),
        _Trial(timesteps=model.timesteps, side=None, dtype=double),
        _Trial(timesteps=model.timesteps, side=None, dtype=own),
    ):
        result = trial.run(model, samples)
        if result.error is None:
            break
    if result.error is not None:
        if result.layer is not None:
            result.error.add_note(f"in {result.layer or 'forward'} of {name}")
        # With a GPU, the network may be for that alone.
        is_of_the_network = result.layer is not None and not torch.cuda.is_available()
        if is_of_the_network or isinstance(result.error, UserError):
            raise result.error
        logger.warning("%s cannot be checked for samples that it mixes: %s", name, result.error)
        return
    if not torch.equal(before, torch.get_rng_state()):
        raise UserError(
            f"{name} draws random numbers in evaluation mode, so its results would not be "
            "reproducible; draw them in training mode only (module.training)"
        )
    if result.mixes:
        raise UserError(
            f"{name} mixes the samples of a batch, so accuracy would depend on their order; keep "
            "them apart (neurons take (T, B, ...), not (T * B, ...)), or set "
            "model.mixes_samples=true to accept it"
        )
    if result.silent:
        message = "%s of %s is silent for random samples; whether it mixes them was not checked"
        logger.warning(message, result.silent, name)


@dataclass
class _Result:
    """The result of a trial.

    Attributes:
        mixes: True if a sample's logits differ between batches.
        silent: Kind of a module that stays silent, or "".
        error: Error that ended the trial.
        layer: Path of the module in which it was raised; None: outside the network.
    """

    mixes: bool = False
    silent: str = ""
    error: Exception | None = None
    layer: str | None = None


@dataclass(frozen=True)
class _Trial:
    """A number of timesteps, a side of the images (None: theirs) and a type to try a network in."""

    timesteps: int
    side: int | None
    dtype: torch.dtype

    def run(self, model: SpikingNetwork, samples: Tensor) -> _Result:
        """Try a copy of the network."""
        net, running = model, list[nn.Module]()
        try:
            net = copy.deepcopy(model)
            if self.timesteps < model.timesteps:
                net.set_timesteps(self.timesteps)
            x = samples[..., : self.side, : self.side].to(self.dtype)
            x = x if samples.ndim == 4 else x[:, : net.timesteps]
            with _noting_modules_in(running):
                silent = _make_fire(net.to(self.dtype), x[:2])
                return _Result(_mixes(net, x), silent)
        except Exception as error:  # any error of foreign code
            paths = {module: path for path, module in net.named_modules()}
            layers = [paths[module] for module in running if module in paths]
            return _Result(error=error, layer=layers[-1] if layers else None)


@contextlib.contextmanager
def _noting_modules_in(running: list[nn.Module]) -> Iterator[None]:
    """Keep the modules that run now in a list, the innermost last; an error leaves them there."""

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = nn.modules.module
    with (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ):
        yield


def _mixes(model: SpikingNetwork, x: Tensor) -> bool:
    """Return whether a sample's logits differ between batches."""
    alike = x.dtype != torch.float64
    each = [_logits(model, own.expand_as(x) if alike else own)[:, :1] for own in x.split(1)]
    alone = torch.cat(each, 1)
    within = 1e-9 * float(alone.abs().max())
    together = _logits(model, x), _logits(model, (x if alike else x[:2]).flip(0)).flip(1)
    return not all(
        torch.allclose(logits, alone[:, : logits.shape[1]], 0, within, equal_nan=True)
        for logits in together
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
        for module in (silent := [layer for layer, share in fired.items() if share < _ENOUGH]):
            module.register_forward_pre_hook(lambda _, x: (4 * x[0], *x[1:]))
        if not silent:
            break
    return next((type(module).__name__ for module, share in fired.items() if not share), "")


def _fired(model: nn.Module, x: Tensor) -> dict[nn.Module, float]:
    """Return the fraction of each module's outputs that is not 0, if its input is not."""
    shares: dict[nn.Module, float] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and isinstance(next(iter(inputs), None), Tensor):
            share = int(output.count_nonzero()) / max(output.numel(), 1)
            if inputs[0].any():
                shares[module] = max(share, shares.get(module, 0.0))

    with nn.modules.module.register_module_forward_hook(note):
        model(x)
    return shares


def _logits(model: SpikingNetwork, x: Tensor) -> Tensor:
    logits = model(x, per_timestep=True)
    check_logits(logits, model.timesteps, len(x), model.num_classes)
    return logits
