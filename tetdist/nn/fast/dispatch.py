"""Chooses the fused kernels that serve a neuron on a device.

On a CPU they are the C++ kernels of native.py; on a GPU the Triton kernels of triton_kernels.py.
Where they cannot be built, and for other data types, the neuron's definition in torch runs instead.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tetdist.nn.fast import build, native, native_library, native_pool
from tetdist.nn.fast.fused import NeuronKernels, NormKernels
from tetdist.nn.fast.pooling import Pooling
from tetdist.nn.neurons import NeuronConfig

logger = logging.getLogger(__name__)

# Families of Triton's kernels, each usable or not by itself: an older Triton compiles only some.
FAMILIES = {
    "neurons": "normalisation and neurons",
    "pooling": "max-pooling",
    "attention": "attention",
}
# Whether a family's kernels are used on GPUs; decided once in a process.
_uses_triton: dict[str, bool] = {}


def kernels_for(
    config: NeuronConfig,
    tensors: tuple[Tensor | None, ...],
    timesteps: int,
    *,
    carries: bool,
    packs: bool,
) -> NeuronKernels | None:
    """Return a neuron's kernels, or None to run its definition; warn once if a compiler is missing.

    Args:
        tensors: Current, shortcut and identity.
        carries: True if membranes are carried to a next segment.
        packs: True if spikes are also packed into bytes.
    """
    if not config.has_kernels:
        return None
    kernels = _module_for(*tensors)
    if kernels is None:
        return None
    if kernels is native and native.neuron_library(config) is None:
        _warn_of_missing_library()
        return None
    return _neuron_kernels(kernels, config, timesteps, carries, packs)


@functools.cache
def _neuron_kernels(
    kernels: Any, config: NeuronConfig, timesteps: int, carries: bool, packs: bool
) -> NeuronKernels:
    return kernels.NeuronKernels(config, timesteps, carries=carries, packs=packs)


def attention_kernels_for(
    config: NeuronConfig, q: Tensor, v: Tensor, heads: int, scale: float, *, carries: bool
) -> NeuronKernels | None:
    """Return the kernels of `LinearAttention` and the neurons behind it; None: definitions run."""
    gpu = triton_for("attention", q)
    if gpu is None or not config.has_kernels:
        return None
    options = {"carries": carries, "packs": torch.is_grad_enabled()}
    kernels = gpu.AttentionKernels(config, q, v, heads, scale, **options)
    return kernels if kernels.serve() else None


def norm_kernels_for(tensors: tuple[Tensor | None, ...], timesteps: int) -> NormKernels | None:
    """Return the kernels of normalisation alone; otherwise like `kernels_for`."""
    kernels = _module_for(*tensors)
    return None if kernels is None else kernels.NormKernels(timesteps)


def pooling_for(x: Tensor) -> Pooling | None:
    """Return the kernels that pool tensors like ``x``; None: torch pools."""
    if native_library.serves(x):
        return native_pool.pool()
    gpu = triton_for("pooling", x)
    return None if gpu is None else gpu.Pool()


def _module_for(*tensors: Tensor | None) -> Any:
    """Return the module, native or triton_kernels, that serves these tensors; None if neither."""
    if not native_library.serves(*tensors):
        return triton_for("neurons", *tensors)
    if native.norm_library() is None:
        _warn_of_missing_library()
        return None
    return native


@functools.cache
def _warn_of_missing_library() -> None:
    logger.warning(
        "the C++ kernels cannot be built or loaded here (%s), so normalisation and neurons run "
        "as plain torch operations, slower and with more memory; install a C++ compiler (Debian: "
        "apt-get install g++)",
        build.failures.get("neuron") or build.failures.get("norm", "for a reason unknown"),
    )


def triton_for(family: str, *tensors: Tensor | None) -> Any:
    """Return the module triton_kernels if its kernels of a family serve the tensors, or None."""
    devices = {tensor.device.type for tensor in tensors if tensor is not None}
    if devices != {"cuda"}:
        return None
    if not _uses_triton:
        decide(torch.device("cuda"))
    if not _uses_triton[family]:
        return None
    return importlib.import_module("tetdist.nn.fast.triton_kernels")


# Reasons against Triton's kernels, by family; without an entry they work.
Reasons = dict[str, str]


def decide(
    device: torch.device, gather: Callable[[Reasons], list[Reasons]] = lambda reasons: [reasons]
) -> None:
    """Decide which of Triton's kernels are used on a device: on all processes of a run, or on none.

    They round differently from the definition, so processes that decided differently would train
    different networks. Of those that are not used, each process logs why.

    Args:
        gather: Takes this process's reasons and returns those of all processes, by rank. All
            processes must call `decide` then.
    """
    if device.type != "cuda":
        return
    gathered = gather(
        {
            family: reason
            for family in FAMILIES
            if (reason := _reason_against_triton(family, device)) is not None
        }
    )
    unused: dict[str, list[str]] = {}  # families by reason
    for family, name in FAMILIES.items():
        reasons = [reasons[family] for reasons in gathered if family in reasons]
        _uses_triton[family] = not reasons
        if reasons:
            where = f" on {len(reasons)} of {len(gathered)} processes" if len(gathered) > 1 else ""
            unused.setdefault(f"{where} ({reasons[0]})", []).append(name)
    for reason, names in unused.items():
        logger.warning(
            "Triton's kernels of %s do not work here%s, so plain torch operations run, slower and "
            "with more memory. Install the version of triton that torch requires (pip show torch) "
            "and a C compiler (Debian: apt-get install gcc); docs/install.md has a table of "
            "versions.",
            " and of ".join(names),
            reason,
        )


def _reason_against_triton(family: str, device: torch.device) -> str | None:
    try:
        importlib.import_module("tetdist.nn.fast.triton_kernels").check(family, device)
    except Exception as error:  # Triton, the driver and the compiler raise many types of errors.
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None
