"""A check that the samples of a batch do not influence each other in evaluation.

The accuracies of several published transformers are inflated because a layer of neurons runs over
the batch: a sample begins with the membranes of the sample before it, and in a folder sorted by
class both mostly have the same label. One sample alone never shows this.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork, check_logits
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.norm_neuron import FusedLayer

logger = logging.getLogger(__name__)

_SIDE = 64  # pixels that suffice, if the network takes other sizes than its own
_COMPARED = 20_000  # values of each tensor in the search for the module


@torch.no_grad()
def refuse_mixing(name: str, model: SpikingNetwork, shape: Sequence[int]) -> None:
    """Refuse a network on the CPU in which a sample's logits depend on the rest of its batch.

    Two random samples of ``shape`` run alone and together, in both orders, through a copy of the
    network in float64, so that no spike flips by rounding. If it cannot run in float64, each runs
    beside itself instead of alone, in its own type: batches of one size round alike.

    Raises:
        UserError: The network mixes samples, draws random numbers in evaluation mode, or does not
            return logits (T, B, K).
    """
    before = torch.get_rng_state()
    samples = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    own = samples.to(next(model.parameters()).dtype)
    for x, copies in ((samples[..., :_SIDE, :_SIDE].double(), 1), (samples.double(), 1), (own, 2)):
        try:
            net = _firing(copy.deepcopy(model).to(x.dtype), x[:2])
            together = [_logits(net, x[:2]), _logits(net, x[:2].flip(0)).flip(1)]
            each = [_logits(net, torch.cat([one] * copies))[:, :1] for one in x[:2].split(1)]
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
    alone = torch.cat(each, 1)
    tolerance = 1e-9 * float(alone.abs().max())
    if not all(torch.allclose(one, alone, 0, tolerance, equal_nan=True) for one in together):
        raise UserError(
            f"{_mixing_module(net, x)} of {name} mixes the samples of a batch, so accuracy would "
            "depend on their order; keep them apart (neurons take (T, B, ...), not (T * B, ...)), "
            "or set model.mixes_samples=true to accept it"
        )


def _firing(model: SpikingNetwork, pair: Tensor) -> SpikingNetwork:
    """Make spikes reach the last layer, also in a network that is not trained yet.

    Parameters that are all zero, such as gains of branches, become random, running statistics
    become those of the samples, norms' gains triple, and weights double until logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(generator=generator)
    for module in model.eval().modules():
        if isinstance(module, FusedLayer):
            module.execution = "reference"
        if isinstance(module, BatchNorm):
            module.training, module.momentum = True, 1.0
            module.weight.mul_(3)
    for _ in range(8):
        first, second = _logits(model, pair).unbind(1)
        if not torch.equal(first, second):
            break
        for parameter in model.parameters():
            parameter.mul_(1 + (parameter.ndim > 1))
    return model.eval()


def _logits(model: SpikingNetwork, x: Tensor) -> Tensor:
    logits = model(x, per_timestep=True)
    check_logits(logits, model.timesteps, len(x), model.num_classes)
    return logits


def _mixing_module(model: nn.Module, samples: Tensor) -> str:
    """Return the first module with a value that depends on both samples of a batch."""

    def values(*pair: Tensor) -> list[tuple[str, Tensor]]:
        return trace(model, torch.stack(pair), lambda x: x.flatten()[:: x.numel() // _COMPARED + 1])

    a, b, *others = samples
    firsts, seconds = [values(x, b) for x in others], [values(a, x) for x in others]
    with contextlib.suppress(IndexError, RuntimeError):  # operations that depend on the sample
        for i, (name, value) in enumerate(values(a, b)):
            one, other = (
                torch.stack([found[i][1] for found in runs]).ne(value).any(0)
                for runs in (firsts, seconds)
            )
            if (one & other).any():
                return name
    return "a module"


def trace(
    model: nn.Module, x: Tensor, keep: Callable[[Tensor], Tensor]
) -> list[tuple[str, Tensor]]:
    """Record ``keep`` of the tensors between a model's modules, with the module that made each."""
    names = {
        m: f"{name or 'the network'} ({type(m).__name__})" for name, m in model.named_modules()
    }
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
