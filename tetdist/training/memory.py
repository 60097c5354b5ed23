"""Activation memory: counted of a network that runs, and computed of one that does not fit."""

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tetdist.config.schema import RunConfig
from tetdist.datasets.index import Index
from tetdist.errors import UserError
from tetdist.network import make_model
from tetdist.nn.precision import autocast, lay_out, parameter_type

logger = logging.getLogger(__name__)


class SavedBytes:
    """Counter of the bytes that autograd holds for the backward pass: present and peak.

    A storage counts once, however many operations keep it; parameters do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.now = self.most = 0
        self._holders: dict[int, int] = {}
        # Their addresses in torch, since fake tensors have no memory.
        self._ignored = {p.untyped_storage()._cdata for p in model.parameters()}

    def _pack(self, tensor: Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        kept = _Kept(tensor)
        address = storage._cdata
        if address not in self._ignored:
            if address not in self._holders:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            self._holders[address] = self._holders.get(address, 0) + 1
            weakref.finalize(kept, self._released, address, storage.nbytes())
        return kept

    def _released(self, address: int, num_bytes: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.now -= num_bytes

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved within this context."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def activation_bytes(config: RunConfig, index: Index, device: torch.device) -> int:
    """Compute the bytes of a micro-batch's activations on a GPU, of which nothing is used."""
    from tetdist.nn.fast import triton_kernels

    dtype = parameter_type(config.precision)
    with FakeTensorMode(), mock.patch.object(triton_kernels, "launch"), torch.enable_grad():
        model: Any = make_model(config, index).to(device, dtype).train()
        lay_out(model, torch.channels_last)
        size, frames = config.data.image_size, index.frames(config.data)
        sample = (3, size, size) if frames is None else (model.timesteps, *frames[1:])
        images = torch.empty((config.batch.micro, *sample), device=device, dtype=dtype)
        if frames is None:
            images = images.contiguous(memory_format=torch.channels_last)
        saved = SavedBytes(model)
        with saved.counting():
            with autocast(device, config.precision):
                logits = model(images, per_timestep=True)
            logits.float().square().mean().backward()
    return saved.most


@contextlib.contextmanager
def explained(config: RunConfig, index: Index, device: torch.device) -> Iterator[None]:
    """Say of a GPU that is out of memory which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        try:
            text = explanation(config, index, device)
        except Exception as reason:  # The computation must not hide the first error.
            logger.warning("the activations' memory cannot be computed: %r", reason)
            raise error from None
        raise UserError(text) from error


def explanation(config: RunConfig, index: Index, device: torch.device) -> str:
    """Return the sentence, with computed figures."""
    micro, halves = config.batch.micro, []
    if half := max((n for n in range(1, micro) if micro % n == 0), default=0):
        batch = config.batch.model_copy(update={"micro": half})
        halves.append((f"batch.micro={half}", {"batch": batch}))
    ways = [("recompute=blocks", {"recompute": "blocks"})] * (config.recompute == "none") + halves

    def gib(changes: dict[str, Any]) -> str:
        changed = config.model_copy(update=changes)
        return f"{activation_bytes(changed, index, device) / 2**30:.3g} GiB"

    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    less = []
    for name, changes in ways:
        with contextlib.suppress(UserError):  # Not every network recomputes its blocks.
            less.append(f"{name} about {gib(changes)}")
    others = (
        f"{', '.join(less)}, with the same images in a step" if less else "a smaller network less"
    )
    return (
        f"the GPU's memory is too small: batch.micro={micro} needs about {gib({})} for activations "
        f"(computed) of the {total:.3g} GiB that it has; {others}"
    )
