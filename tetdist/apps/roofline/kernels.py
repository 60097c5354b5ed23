"""Stands in for the kernels of a GPU (nn/fast/triton_passes.py) while a step is counted (count.py).

Tensors have no numbers. The results have the shapes of the real ones, and each kernel is noted with
what it reads and writes: its arguments and results, each once. tests/roofline sees that these are
the bytes that Triton's kernels load and store.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.fused import Affine, Inputs, Sums
from tetdist.nn.fast.pooling import Pooling, Sizes
from tetdist.nn.neurons import LIF

# Takes a kind, a name, all tensors of a kernel and the number of kernels that are started.
Note = Callable[[str, str, tuple[Tensor | None, ...], int], None]

NORM_AND_NEURON, UNPACKING, POOLING = "norm and neuron", "unpacking", "pooling and sums"


def _ignored(*_: object) -> None:
    raise AssertionError("nothing is being counted")


note: Note = _ignored  # count.py sets it


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _like(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(one) for one in tensors)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class NormPasses:
    """See `tetdist.nn.fast.fused.NormPasses`."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def normalization(self, norm: BatchNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Affine:
        if norm.training:
            # Partial sums are a percent of what is read, and are left out.
            note(NORM_AND_NEURON, "statistics", (x,), 2)
        else:
            note(NORM_AND_NEURON, "normalization", (weight, bias), 1)
        return Affine(*_empty(x, 4, x.shape[2], dtype=_wide(x)).unbind())

    def add(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        _affine: Affine,
        _of_shortcut: Affine | None,
    ) -> Tensor:
        out = torch.empty_like(x)
        note(NORM_AND_NEURON, "add", (x, shortcut, out), 1)
        return out

    def add_sums(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        _affine: Affine,
        of_shortcut: Affine | None,
        grad: Tensor,
    ) -> Sums:
        note(NORM_AND_NEURON, "add_sums", (x, shortcut, grad), 2)
        return _sums(x, normalized=of_shortcut is not None)

    def norm_gradient(
        self, x: Tensor, grad: Tensor, _affine: Affine, _sums: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        grad_x = torch.empty_like(x)
        note(NORM_AND_NEURON, "norm_gradient", (x, grad, grad_x), 1)
        return grad_x


def _sums(x: Tensor, *, normalized: bool) -> Sums:
    sums = _empty(x, 3 if normalized else 2, x.shape[2], dtype=_wide(x))
    grad, grad_xhat, *others = sums.unbind()
    return Sums(grad, grad_xhat, others[0] if others else None)


class Passes(NormPasses):
    """See `tetdist.nn.fast.fused.Passes`."""

    def __init__(self, _config: LIF, timesteps: int, *, carries: bool, packs: bool) -> None:
        super().__init__(timesteps)
        self.carries, self.packs = carries, packs

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, channels = inputs.x.shape[1:]
        spikes = _empty(inputs.x, self.timesteps, rows, channels)
        packed = torch.empty_like(spikes, dtype=torch.uint8) if self.packs else None
        end = _empty(inputs.x, rows, channels, dtype=_wide(inputs.x)) if self.carries else None
        name = "fire" if identity is None else "fire with identity"
        read = (inputs.x, inputs.shortcut, inputs.start, identity)
        note(NORM_AND_NEURON, name, (*read, spikes, packed, end), 1)
        return spikes, packed, end

    def sums(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Sums, None]:
        read = (inputs.x, inputs.shortcut, inputs.start, grad_spikes, grad_end)
        note(NORM_AND_NEURON, "backward_sums", read, 2)
        found = _sums(inputs.x, normalized=inputs.of_shortcut is not None)
        return found._replace(grad_learned=_like(inputs.learned)), None

    def current_gradient(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        grad_x, _, grad_start = self.gradients(
            inputs, grad_spikes, grad_end, None, None, None, needs_x=True
        )
        assert grad_x is not None
        return grad_x, grad_start, _like(inputs.learned)

    def gradients(
        self,
        inputs: Inputs,
        grad_spikes: Tensor,
        grad_end: Tensor | None,
        _kept: None,
        _of_x: tuple[Tensor, Tensor] | None,
        _of_shortcut: tuple[Tensor, Tensor] | None,
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, shortcut, start = inputs.x, inputs.shortcut, inputs.start
        grad_x = torch.empty_like(x) if needs_x else None
        grad_shortcut = None if shortcut is None else torch.empty_like(shortcut)
        grad_start = None if start is None else torch.empty_like(start)
        results = (grad_x, grad_shortcut, grad_start)
        if results != (None, None, None):
            read = (x, shortcut, start, grad_spikes, grad_end)
            note(NORM_AND_NEURON, "backward", (*read, *results), 1)
        return results


class Pool(Pooling):
    """See `tetdist.nn.fast.pooling.Pooling`."""

    def start(
        self, name: str, tensors: tuple[Tensor, ...], _sizes: Sizes, _levels: int | None
    ) -> None:
        # Numbers of a channel are next to nothing.
        note(POOLING, f"pool {name}", tuple(one for one in tensors if one.ndim > 1), 1)


def unpack(values: Tensor, _levels: int, dtype: torch.dtype) -> Tensor:
    numbers = torch.empty_like(values, dtype=dtype)
    note(UNPACKING, "unpack", (values, numbers), 1)
    return numbers


def halve(values: Tensor) -> Tensor:
    halves = _empty(values, -(-values.numel() // 2))
    note(UNPACKING, "halve", (values, halves), 1)
    return halves


def unpack_halves(
    halves: Tensor, shape: torch.Size, strides: tuple[int, ...], _levels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    values = _empty(halves, math.prod(shape))
    numbers = torch.empty_like(values, dtype=dtype)
    note(UNPACKING, "unpack_halves", (halves, values, numbers), 1)
    return values.as_strided(shape, strides), numbers.as_strided(shape, strides)
