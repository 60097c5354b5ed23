"""Checks of a user's neuron and network: samples do not mix, timesteps may depend on later ones.

The accuracies of several published transformers are inflated because a layer of neurons runs over
the batch: a sample begins with the membranes of the sample before it, and in a folder sorted by
class both mostly have the same label. One sample alone never shows this.

A network that pools over time looks ahead: its logits at t depend on T. Then one pass does not show
the results at smaller T, and nothing can stop before T.
"""

import contextlib
import copy
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork, check_logits
from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm, running_states
from tetdist.nn.norm_neuron import FusedLayer, broadcasting, learned_of

logger = logging.getLogger(__name__)

_ROUNDS, _ENOUGH = 16, 1 / 16  # in which inputs grow, until this fraction of outputs is not 0


def check_neuron(neuron: neurons.NeuronConfig, timesteps: int) -> None:
    """Refuse a neuron without a gradient, or that does not continue from the state it returns."""
    axis, half, fault = neuron.sample_axis, timesteps // 2, ""
    remedy = "correct it, or set segments=False"
    try:
        with torch.random.fork_rng(devices=[]):
            values = learned_of(neuron, 4).double()
            for value in values.values():  # which training makes differ by timestep
                value.data += 0.1 * torch.rand_like(value)
            learned = broadcasting(neuron, values, 2)
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
        elif not grad.isfinite().all():
            fault, remedy = "passes a gradient that is not finite", "correct its backward pass"
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
def check_network(
    name: str, model: SpikingNetwork, shape: Sequence[int], *, may_mix: bool = False
) -> None:
    """Set a network's ``looks_ahead``, on the CPU, and refuse one that mixes samples.

    Random samples of ``shape`` run alone and together, in both orders, through a copy of the
    network in float64, so that no spike flips by rounding. If it cannot run in float64, each runs
    among copies of itself instead of alone: batches of one size round alike. A network with a
    module whose outputs at T - 1 differ from those of a pass at T before its last timestep looks
    ahead.

    Args:
        may_mix: True if its samples may mix and it may draw random numbers.

    Raises:
        UserError: The network mixes samples, draws random numbers in evaluation mode, changes a
            buffer that is no running state, or does not return logits (T, B, K).
    """
    before, started = torch.get_rng_state(), time.monotonic()
    model.looks_ahead = getattr(model, "looks_ahead", None)  # of the checkpoint
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
        if not may_mix and (is_of_the_network or isinstance(result.error, UserError)):
            raise result.error
        what = "samples that it mixes and timesteps that look ahead"
        logger.warning("%s cannot be checked for %s: %s", name, what, result.error)
        return
    draws = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    if result.changed:
        raise UserError(
            f"the forward pass of {name} changes the buffer {result.changed}, which would differ "
            "between processes and change twice with recompute; keep such a state in a "
            "tetdist.nn.batch_norm.RunningMean, or replace that module"
        )
    if draws and not may_mix:
        raise UserError(
            f"{name} draws random numbers in evaluation mode, so its results would not be "
            "reproducible; draw them in training mode only (module.training)"
        )
    if result.mixes and not may_mix:
        raise UserError(
            f"{name} mixes the samples of a batch, so accuracy would depend on their order; keep "
            "them apart (neurons take (T, B, ...), not (T * B, ...)), or set "
            "model.mixes_samples=true to accept it"
        )
    if result.silent:
        message = "%s of %s is silent for random samples; whether it mixes them was not checked"
        logger.warning(message, result.silent, name)
    if result.looks_ahead is not None:
        model.looks_ahead = model.looks_ahead or result.looks_ahead
    verdict, took = _VERDICTS[model.looks_ahead], time.monotonic() - started
    logger.info("%s %s (checked in %.1f s)", name, verdict, took)


_VERDICTS = {
    True: "looks ahead: its logits depend on later timesteps, so evaluations run each T by itself, "
    "a drawn T is a pass of its own, and there is no early exit and no stream",
    False: "does not look ahead: its logits at t are the same at every T",
    None: "may look ahead, which is not decided: its logits do not differ between timesteps, or it "
    "runs only one T; the first evaluation checks again",
}


@dataclass
class _Result:
    """The result of a trial.

    Attributes:
        mixes: True if a sample's logits differ between batches.
        looks_ahead: True if logits depend on later timesteps; None: not decided.
        changed: Name of a buffer that training changes, or "".
        silent: Kind of a module that stays silent, or "".
        error: Error that ended the trial.
        layer: Path of the module in which it was raised; None: outside the network.
    """

    mixes: bool = False
    looks_ahead: bool | None = None
    changed: str = ""
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
                changed = _changed_buffer(net.to(self.dtype), x[:2])
                silent, mixes = _make_fire(net, x[:2]), _mixes(net, x)
                whole = samples[:1, ..., : self.side, : self.side].to(self.dtype)
                return _Result(mixes, _looks_ahead(net, whole, model.timesteps), changed, silent)
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


def _looks_ahead(model: SpikingNetwork, x: Tensor, timesteps: int) -> bool | None:
    """Return whether a module's output at t depends on T, for one sample; None: not decided.

    Logits alone may hide it: a small change flips no spike. Batches of different sizes round
    differently, so float32 flips spikes and decides nothing.
    """
    if x.dtype != torch.float64 or (timesteps == 1 and x.ndim == 5):
        return None
    longer = max(timesteps, 2)
    try:
        whole = _marks(model, x, longer)
        # Every T, since a layer may join timesteps in groups.
        for shorter in range(1, longer):
            part = _marks(model, x, shorter)
            for key in whole.keys() & part.keys():
                if not torch.allclose(whole[key][:shorter], part[key], 1e-9, 1e-9, equal_nan=True):
                    return True
    except ValueError:  # it runs only one T
        return None
    logits = whole[None, 0]
    return None if torch.allclose(logits[1:], logits[:-1], 1e-9, 1e-9, equal_nan=True) else False


def _marks(
    model: SpikingNetwork, x: Tensor, timesteps: int
) -> dict[tuple[nn.Module | None, int], Tensor]:
    """Return a weighted sum of each timestep, (T,), of the n-th output of each module that has
    timesteps, and of the logits (None), for one sample."""
    marks: dict[tuple[nn.Module | None, int], Tensor] = {}
    calls = Counter[nn.Module | None]()

    def note(module: nn.Module | None, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim and len(output) == timesteps:
            rows = output.reshape(timesteps, -1).to(x.dtype)
            weights = torch.arange(1, rows.shape[1] + 1, dtype=x.dtype).sin()
            marks[module, calls[module]] = rows @ weights
        calls[module] += 1

    model.set_timesteps(timesteps)
    with nn.modules.module.register_module_forward_hook(note):
        note(None, None, _logits(model, x))
    return marks


def _changed_buffer(model: SpikingNetwork, x: Tensor) -> str:
    """Return the name of a buffer that training changes, besides running states, or ""."""
    own = {id(buffer) for state in running_states(model) for buffer in state.buffers()}
    before = [(name, b, b.clone()) for name, b in model.named_buffers() if id(b) not in own]
    # An error in training alone is shown by the training.
    with torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):
        _logits(model.train(), x)
    after = dict(model.named_buffers())
    changed = (
        name
        for name, buffer, value in before
        if after.get(name) is not buffer or not torch.equal(buffer, value)
    )
    return next(changed, "")


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
