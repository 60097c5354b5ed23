"""A check that the samples of a batch do not influence each other in evaluation.

The accuracies of several published transformers are inflated because a layer of neurons runs over
the batch: a sample begins with the membranes of the sample before it, and in a folder sorted by
class both mostly have the same label. One sample alone never shows this.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork, check_logits
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.norm_neuron import FusedLayer

logger = logging.getLogger(__name__)

_SIDE = 64  # pixels that suffice, if the network takes other sizes than its own
_TIMESTEPS = 2  # and timesteps
_COMPARED = 20_000  # values of each tensor in the search for the module
_UNCHANGED = 3  # rounds that end the search if they find no earlier module
_GAINS = (4, 16, 64, 256)  # of a silent layer's input


@torch.no_grad()
def refuse_mixing(name: str, model: SpikingNetwork, shape: Sequence[int]) -> None:
    """Refuse a network on the CPU in which a sample's logits depend on the rest of its batch.

    Random samples of ``shape`` run alone and together, in both orders, through a copy of the
    network in float64, so that no spike flips by rounding. If it cannot run in float64, each runs
    among copies of itself instead of alone: batches of one size round alike.

    Raises:
        UserError: The network mixes samples, draws random numbers in evaluation mode, cannot be
            copied, or does not return logits (T, B, K).
    """
    before = torch.get_rng_state()
    samples = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    own, double = next(model.parameters()).dtype, torch.float64
    for timesteps, side, dtype in (
        (min(_TIMESTEPS, model.timesteps), _SIDE, double),
        (model.timesteps, _SIDE, double),
        (model.timesteps, None, double),
        (model.timesteps, None, own),
    ):
        try:
            net = _copy(name, model).to(dtype)
            if timesteps != model.timesteps:
                net.set_timesteps(timesteps)
            x = samples[: 8 if dtype is double else 4, ..., :side, :side].to(dtype)
            if len(shape) == 4:
                x = x[:, :timesteps]
            silent = _make_fire(net, x[:2])
            few = x[:2] if dtype is double else x
            together = [_logits(net, x), _logits(net, few.flip(0)).flip(1)]
            each = [one if dtype is double else one.expand_as(x) for one in x.split(1)]
            alone = torch.stack([_logits(net, y)[:, i % len(y)] for i, y in enumerate(each)], 1)
            break
        except Exception as error:  # any error of foreign code
            failure = error
    else:
        if isinstance(failure, UserError):
            raise failure
        logger.warning("%s cannot be checked for samples that it mixes: %s", name, failure)
        return
    if not torch.equal(before, torch.get_rng_state()):
        raise UserError(
            f"{name} draws random numbers in evaluation mode, so its results would not be "
            "reproducible; draw them in training mode only (module.training)"
        )
    tolerance = 1e-9 * float(alone.abs().max())

    def keeps(found: Tensor) -> bool:
        return torch.allclose(found, alone[:, : found.shape[1]], 0, tolerance, equal_nan=True)

    if not all(map(keeps, together)):
        logger.info("%s mixes the samples of a batch; searching for the module", name)
        module = _mixing_module(net, x, x if keeps(together[1]) else few)
        raise UserError(
            f"{module} of {name} mixes the samples of a batch, so accuracy would "
            "depend on their order; keep them apart (neurons take (T, B, ...), not (T * B, ...)), "
            "or set model.mixes_samples=true to accept it"
        )
    if silent is not None:
        message = "%s of %s is silent for random samples; whether it mixes them was not checked"
        logger.warning(message, silent, name)


def _copy(name: str, model: SpikingNetwork) -> SpikingNetwork:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UserError(
            f"{name} cannot be copied by copy.deepcopy ({error}), so whether it mixes samples is "
            "unknown; make it copyable, or set model.mixes_samples=true to go without this check"
        ) from error


def _make_fire(model: SpikingNetwork, pair: Tensor) -> str | None:
    """Make spikes leave every layer, also of a network that is not trained yet.

    Parameters that are all zero, such as gains of branches, become random, running statistics
    become those of the samples, norms' gains triple, and inputs of silent layers grow.

    Returns:
        The first layer that stays silent, if any.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(generator=generator)
    norms = [module for module in model.eval().modules() if isinstance(module, BatchNorm)]
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.execution = "reference"
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.mul_(3)
    for _ in range(4):
        for norm in norms:
            norm.training = True
        _logits(model, pair)
        model.eval()
        raised, silent = _raise_inputs(model, pair)
        if not raised and silent is None:
            break
        for parameter in model.parameters():  # Layers may be functions, which have no inputs here.
            parameter.mul_(1 + (parameter.ndim > 1 and silent is not None))
    return silent


def _raise_inputs(model: SpikingNetwork, x: Tensor) -> tuple[bool, str | None]:
    """Multiply the input of each layer that returns zeros, until some are not.

    A layer is an innermost module, or one around it, as neurons around a surrogate function.

    Returns:
        True if there were any, and the first one that stays silent.
    """
    names = _names(model)
    heights, trying, raised = [0], False, False
    fires: dict[nn.Module, bool] = {}

    def enter(_module: nn.Module, _inputs: Any) -> None:
        if not trying:
            heights.append(0)

    def leave(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> Any:
        nonlocal trying, raised
        if trying:
            return output
        height = heights.pop()
        heights[-1] = max(heights[-1], height + 1)
        x = inputs[0] if inputs else None
        if height > 1 or not (isinstance(x, Tensor) and isinstance(output, Tensor)):
            return output
        trying = True
        for gain in _GAINS if x.any() and not output.any() else ():
            again = module.forward(x * gain, *inputs[1:], **keywords)
            if 16 * again.count_nonzero() >= again.numel() or (gain == _GAINS[-1] and again.any()):
                output, raised = again, True
                module.register_forward_pre_hook(partial(_raised, gain))
                break
        trying = False
        if height == 0:
            fires[module] = fires.get(module, False) or bool(x.any() and output.any())
        return output

    hooks = nn.modules.module
    with (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, with_kwargs=True),
    ):
        model(x)
    return raised, next((names[module] for module, fired in fires.items() if not fired), None)


def _raised(gain: float, _module: nn.Module, inputs: Any) -> Any:
    return inputs[0] * gain, *inputs[1:]


def _logits(model: SpikingNetwork, x: Tensor) -> Tensor:
    logits = model(x, per_timestep=True)
    check_logits(logits, model.timesteps, len(x), model.num_classes)
    return logits


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {m: f"{name or 'the network'} ({type(m).__name__})" for name, m in model.named_modules()}


class _EnoughError(Exception):
    """The rest of a pass is not needed."""


def _mixing_module(model: nn.Module, samples: Tensor, batch: Tensor) -> str:
    """Return the first module with a value that depends on a batch's first sample and others."""

    def values(x: Tensor, most: int | None = None) -> tuple[list[Tensor], list[str]]:
        found: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            if len(found) == most:
                raise _EnoughError
            found.append(x.flatten()[:: x.numel() // _COMPARED + 1].clone())
            return x[:0]

        with contextlib.suppress(_EnoughError):
            return found, [name for name, _ in trace(model, x, keep)]
        return found, []

    base, names = values(batch)
    depends = [[torch.zeros_like(x, dtype=torch.bool) for x in base] for _ in range(2)]
    first, unchanged = len(base), 0
    with contextlib.suppress(RuntimeError):  # operations that depend on the sample
        for i in range(1, len(samples)):
            other = samples.roll(i, 0)[: len(batch)]
            mixed = torch.cat([other[:1], batch[1:]]), torch.cat([batch[:1], other[1:]])
            for changed, x in zip(depends, mixed, strict=True):
                for mask, new, old in zip(changed, values(x, first)[0], base, strict=False):
                    mask |= new != old
            both = (bool((one & two).any()) for one, two in zip(*depends, strict=True))
            before, first = first, next((k for k, mixes in enumerate(both) if mixes), first)
            unchanged = unchanged + 1 if first == before < len(base) else 0
            if unchanged == _UNCHANGED:
                break
    return [*names, "a module"][first]


def trace(
    model: nn.Module, x: Tensor, keep: Callable[[Tensor], Tensor]
) -> list[tuple[str, Tensor]]:
    """Record ``keep`` of the tensors between a model's modules, with the module that made each."""
    names = _names(model)
    found: list[tuple[str, Tensor]] = []
    around = [names[model]]

    def record(name: str, values: Any) -> None:
        tensors = values if isinstance(values, tuple) else (values,)
        found.extend((name, keep(x).clone()) for x in tensors if isinstance(x, Tensor))

    def enter(module: nn.Module, inputs: Any) -> None:
        record(around[-1], inputs)
        around.append(names.get(module, around[-1]))

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        record(around.pop(), output)

    hooks = nn.modules.module
    with hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave):
        model(x)
    return found
