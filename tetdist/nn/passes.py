"""Chooses the passes over memory that serve a neuron on a device.

On a CPU they are those of native.py. Elsewhere, and for types that those do not know, they are
those of compiled.py. Without a working compiler the definition is used, with one warning.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from tetdist.nn import build, native
from tetdist.nn.compiled import (
    compiled_passes,
    reason_against_torch_compile,
    torch_compile_works,
)
from tetdist.nn.fused import Passes
from tetdist.nn.neurons import LIF, NeuronConfig

logger = logging.getLogger(__name__)


def passes_for(
    config: LIF, tensors: tuple[Tensor | None, ...], timesteps: int, *, carries: bool, packs: bool
) -> Passes:
    """The passes of a neuron.

    Args:
        config: The neuron, for which `passes_work`.
        tensors: Current, (T or 1, N, C), shortcut and identity.
        timesteps: T.
        carries: Whether membranes are carried on.
        packs: Whether spikes are packed, too.
    """
    current = tensors[0]
    assert current is not None
    of = _native_passes if native.serves(*tensors) else compiled_passes
    return of(config, timesteps, current.shape[0] == 1, carries, packs)


@functools.cache
def _native_passes(config: LIF, timesteps: int, shared: bool, carries: bool, packs: bool) -> Passes:
    passes = native.passes(config)
    if passes is None:
        return compiled_passes(config, timesteps, shared, carries, packs)
    return Passes(
        timesteps,
        passes.statistics,
        functools.partial(passes.spikes, timesteps=timesteps, packs=packs, carries=carries),
        passes.current_gradient,
        passes.input_gradient,
    )


def decide(device: torch.device, gather: Callable[[str | None], list[str | None]]) -> None:
    """Find out, before the first step, whether there are passes for a GPU on all processes.

    Args:
        device: This process's.
        gather: Given this process's reason why there are none (None: there are), returns those of
            all processes, by rank. It may raise where they are not of one mind.
    """
    if device.type == "cuda":
        gather(reason_against_torch_compile(device.type))
        torch_compile_works(device.type)


def passes_work(device_type: str, config: NeuronConfig) -> bool:
    """True if there are passes of the neuron for the device, or can be; if there is no compiler,
    this is said once."""
    if not isinstance(config, LIF) or not config.has_passes:
        return False
    if device_type == "cpu" and native.passes(config) is not None:
        return True
    works = torch_compile_works(device_type)
    if works and device_type == "cpu":
        _say_that_it_is_slower()
    return works


@functools.cache
def _say_that_it_is_slower() -> None:
    logger.warning(
        "the C++ kernels cannot be built or loaded here (%s): torch.compile's are used, which are "
        "slower to begin and to run",
        build.failures.get("neuron", "for a reason unknown"),
    )
